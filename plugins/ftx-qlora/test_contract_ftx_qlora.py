"""The adapter `qlora` sits the exam, on the base that it loads in 4 bits."""

from ftx.testing import AdapterContract
from ftx_qlora import QLoRA


class TestQLoRA(AdapterContract):
    plugin = QLoRA
    options = [{}, {"r": 4, "target_modules": ["q_proj"]}]
