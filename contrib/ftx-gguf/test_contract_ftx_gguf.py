"""The exporter `gguf` sits the exam."""

from ftx.testing import ExporterContract
from ftx_gguf import GGUF


class TestGGUF(ExporterContract):
    plugin = GGUF
    options = [{}, {"type": "f32"}, {"type": "bf16"}]


class TestGGUFInEightBits(ExporterContract):
    plugin = GGUF
    options = [{"type": "q8_0"}]
    least = 0.85
