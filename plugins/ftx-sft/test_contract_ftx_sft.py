"""The trainer `sft` sits the exam, with every installed adapter."""

from ftx.testing import TrainerContract
from ftx_sft import SFT


class TestSFT(TrainerContract):
    plugin = SFT
    options = [{}, {"packing": True, "max_length": 64}, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}]


class TestSFTOnConversations(TrainerContract):
    plugin = SFT
    rows = [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}."}]} for i in range(6)]
