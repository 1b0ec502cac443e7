"""The adapter `peft` sits the exam with methods of several kinds."""

from ftx.testing import AdapterContract
from ftx_peft import Peft


class TestPeft(AdapterContract):
    plugin = Peft
    options = [{}, {"method": "ia3"}, {"method": "vera", "args": {"r": 8}}, {"method": "oft", "args": {"oft_block_size": 4}}]


class TestPrompt(AdapterContract):
    """A learned prompt is there from the start, and cannot be merged."""

    plugin = Peft
    options = [{"method": "prompt_tuning", "args": {"num_virtual_tokens": 4}}]
    changes_at_start = True
