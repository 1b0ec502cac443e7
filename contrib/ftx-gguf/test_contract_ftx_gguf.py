"""The exporter `gguf` sits the exam."""

from ftx.testing import ExporterContract
from ftx_gguf import GGUF


class TestGGUF(ExporterContract):
    plugin = GGUF
    options = [{}, {"type": "f32"}]


class TestGGUFInEightBits(ExporterContract):
    plugin = GGUF
    options = [{"type": "bf16"}, {"type": "q8_0"}]  # both have eight bits where it counts
    least = 0.85
