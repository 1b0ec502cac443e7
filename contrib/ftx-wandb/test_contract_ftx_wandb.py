"""The observer `wandb` sits the exam."""

from ftx.testing import ObserverContract
from ftx_wandb import WandB


class TestWandB(ObserverContract):
    plugin = WandB
    options = [{"mode": "offline"}]
