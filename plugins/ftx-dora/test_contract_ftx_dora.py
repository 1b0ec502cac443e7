"""The adapter `dora` sits the exam."""

from ftx.testing import AdapterContract
from ftx_dora import DoRA


class TestDoRA(AdapterContract):
    plugin = DoRA
    options = [{}, {"r": 4, "target_modules": ["q_proj", "down_proj"]}]
