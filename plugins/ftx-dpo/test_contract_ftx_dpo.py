"""The exam of the trainer `dpo`."""

from __future__ import annotations

from ftx.testing import TrainerContract
from ftx_dpo import DPO


class TestDPO(TrainerContract):
    plugin = DPO
    options = [{}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "gradient_accumulation_steps": 2}, {"precompute_ref_log_probs": True}]
