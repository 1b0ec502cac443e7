"""The exam for authors of plugins: contract classes, a tiny model, and runs to try a plugin in. Loads on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "AdapterContract": "ftx.testing.adapter",
    "CommandContract": "ftx.testing.command",
    "EvaluatorContract": "ftx.testing.evaluator",
    "ExporterContract": "ftx.testing.exporter",
    "FormatterContract": "ftx.testing.formatter",
    "ObserverContract": "ftx.testing.observer",
    "QuantizerContract": "ftx.testing.quantizer",
    "TrainerContract": "ftx.testing.trainer",
    "catalogue": "ftx.testing.runs",
    "finished_run": "ftx.testing.runs",
    "ftx": "ftx.testing.runs",
    "make_run": "ftx.testing.runs",
    "shared_model_dir": "ftx.testing.runs",
    "train": "ftx.testing.runs",
    "tiny_model": "ftx.testing.tiny",
    "tiny_model_dir": "ftx.testing.tiny",
    "tiny_tokenizer": "ftx.testing.tiny",
}

__all__ = [
    "AdapterContract",
    "CommandContract",
    "EvaluatorContract",
    "ExporterContract",
    "FormatterContract",
    "ObserverContract",
    "QuantizerContract",
    "TrainerContract",
    "catalogue",
    "finished_run",
    "ftx",
    "make_run",
    "shared_model_dir",
    "tiny_model",
    "tiny_model_dir",
    "tiny_tokenizer",
    "train",
]

if TYPE_CHECKING:
    from ftx.testing.adapter import AdapterContract
    from ftx.testing.command import CommandContract
    from ftx.testing.evaluator import EvaluatorContract
    from ftx.testing.exporter import ExporterContract
    from ftx.testing.formatter import FormatterContract
    from ftx.testing.observer import ObserverContract
    from ftx.testing.quantizer import QuantizerContract
    from ftx.testing.runs import catalogue, finished_run, ftx, make_run, shared_model_dir, train
    from ftx.testing.tiny import tiny_model, tiny_model_dir, tiny_tokenizer
    from ftx.testing.trainer import TrainerContract


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ftx.testing' has no attribute {name!r}")
