"""The exam's own plugins, so that one plugin can be examined where no other is installed."""

from __future__ import annotations

import signal
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from ftx import format_rows, hookimpl, option, plugin

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from datasets import Dataset
    from transformers import PreTrainedModel, TrainerCallback

    from ftx import Run

#: Training rows of each row type: six, so that five steps of two rows go into the second epoch.
ROWS: dict[str, list[dict[str, Any]]] = {
    "prompt-completion": [{"prompt": f"{i} + {i} = ", "completion": f"{2 * i}."} for i in range(6)],
    "conversation": [{"messages": [{"role": "user", "content": f"{i} + {i}?"}, {"role": "assistant", "content": f"It is {2 * i}."}]} for i in range(6)],
    "preference": [{"prompt": f"{i} + {i} = ", "chosen": f"{2 * i}.", "rejected": f"{2 * i + 1}, I think."} for i in range(6)],
    "unpaired-preference": [{"prompt": f"{i} + {i} = ", "completion": f"{2 * i + i % 2}.", "label": i % 2 == 0} for i in range(6)],
    "text": [{"text": f"Twice {i} is {2 * i}."} for i in range(6)],
}


@plugin
class Rows:
    """The rows as they are: their columns already make a row type."""

    @hookimpl
    def format_dataset(self, dataset: Dataset, run: Run) -> Dataset:
        return format_rows(dataset, dict, run)


@plugin
class Norms:
    """The scales of the normalisation layers train, and nothing else."""

    @hookimpl
    def adapt_model(self, model: PreTrainedModel, run: Run) -> PreTrainedModel:
        model.requires_grad_(False)
        for scale in _scales(model).values():
            scale.requires_grad_(True)
        model.ftx_before = {name: scale.detach().clone() for name, scale in _scales(model).items()}
        return model

    @hookimpl
    def save_adapted(self, model: PreTrainedModel, path: Path, run: Run) -> None:
        from safetensors.torch import save_file

        save_file({name: scale.detach().clone() for name, scale in _scales(model).items()}, path / "norms.safetensors")

    @hookimpl
    def load_adapted(self, base: PreTrainedModel, path: Path, run: Run) -> PreTrainedModel:
        from safetensors.torch import load_file

        self.adapt_model(model=base, run=run)
        _write(base, load_file(path / "norms.safetensors"))
        return base.eval()

    @hookimpl
    def merge_adapted(self, model: PreTrainedModel, run: Run) -> PreTrainedModel:
        return model

    @hookimpl
    def adapter_off(self, model: PreTrainedModel, run: Run) -> AbstractContextManager[Any]:
        return _base(model)


@plugin
class CtrlC:
    """Presses Ctrl-C in the step behind step `after`."""

    after: int = option(2, "Steps before the one in which it is pressed.")

    @hookimpl
    def trainer_callbacks(self, run: Run) -> list[TrainerCallback]:
        from transformers import TrainerCallback

        after = self.after

        class Press(TrainerCallback):  # type: ignore[misc]
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step == after:
                    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # so a shell starts what it runs in the background
                        signal.signal(signal.SIGINT, signal.default_int_handler)
                    signal.raise_signal(signal.SIGINT)

        return [Press()]


def _scales(model: PreTrainedModel) -> dict[str, Any]:
    return {name: parameter for name, parameter in model.named_parameters() if "norm" in name}


def _write(model: PreTrainedModel, values: dict[str, Any]) -> dict[str, Any]:
    """Put `values` into the scales; what was there."""
    scales = _scales(model)
    before = {name: scale.detach().clone() for name, scale in scales.items()}
    for name, value in values.items():
        scales[name].data.copy_(value)
    return before


@contextmanager
def _base(model: Any) -> Iterator[Any]:
    tuned = _write(model, model.ftx_before)
    try:
        yield model
    finally:
        _write(model, tuned)
