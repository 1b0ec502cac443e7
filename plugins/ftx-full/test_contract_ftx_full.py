"""The adapter `full` sits the exam."""

from ftx.testing import AdapterContract
from ftx_full import Full


class TestFull(AdapterContract):
    plugin = Full
