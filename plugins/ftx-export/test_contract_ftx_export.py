"""The exporters of ftx-export sit the exam."""

from ftx.testing import ExporterContract
from ftx_export import Adapter, Merged
from ftx_export_hub import Hub
from ftx_export_ollama import Ollama


class TestMerged(ExporterContract):
    plugin = Merged
    options = [{}, {"max_shard_size": "200KB"}]


class TestAdapter(ExporterContract):
    plugin = Adapter


class TestOllama(ExporterContract):
    plugin = Ollama


class TestHub(ExporterContract):
    plugin = Hub


class TestHubWithAnAdapter(ExporterContract):
    plugin = Hub
    adapter = "lora"
    options = [{"repo": "acme/tiny", "what": "adapter", "base_model": "acme/base", "dry_run": True}]
