"""The adapter `lora` sits the exam."""

from ftx.testing import AdapterContract
from ftx_lora import LoRA


class TestLoRA(AdapterContract):
    plugin = LoRA
    options = [{}, {"r": 4, "target_modules": ["q_proj"]}, {"rslora": True, "modules_to_save": ["lm_head"]}]


class TestLoRAFromTheBase(AdapterContract):
    plugin = LoRA
    options = [{"init": "pissa", "r": 4}]
    #: saved as a plain LoRA of twice the rank: the same sum in another order
    load_tolerance = 1e-4


class TestLoRARandom(AdapterContract):
    plugin = LoRA
    options = [{"init": False, "dropout": 0.1}]
    changes_at_start = True
