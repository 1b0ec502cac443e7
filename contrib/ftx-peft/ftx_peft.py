"""The adapter `peft`: any method of the peft library, by its name and with its own options."""

from __future__ import annotations

import dataclasses
import typing
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftx import hookimpl, option, plugin
from ftx.errors import OptionError, did_you_mean
from ftx.options import Text, coerce, supported
from ftx_lora import LoRA, load, merge, note_low_precision, off, prepare_quantized, quiet, save, wrap

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

    from ftx import Run

#: Starts of peft's lora that a run cannot give it, and why.
STARTS = {
    "eva": "it decomposes what the layers see of the data, which an adapter does not get",
    "corda": "it decomposes what the layers see of the data, which an adapter does not get",
    "loftq": "it puts a quantised copy in the base's place, which no reader of the run would have",
}
#: Fields of peft's configurations that are ftx's business.
OURS = ("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode")


@plugin
class Peft:
    """Any adapter of the peft library: -o adapter.method=vera, and the fields of its configuration class as options."""

    method: str = option("lora", "The method's name in peft, in small letters: lora, vera, ia3, oft, boft, prompt_tuning, ...")
    args: dict[str, Any] = option({}, "Fields of the method's configuration; -o adapter.NAME=VALUE sets one.", rest=True)

    suggests = LoRA.suggests

    def __post_init__(self) -> None:
        self.peft_config()

    def peft_config(self) -> PeftConfig:
        """peft's configuration. Raises OptionError for an unknown method or field or a value of the wrong type, and
        ValueError for what the method itself refuses. Imports peft: only it knows its methods."""
        cls = methods().get(self.method)
        if cls is None:
            raise OptionError(f"peft has no method '{self.method}'.{did_you_mean(self.method, methods())}", f"Methods: {', '.join(sorted(methods()))}.")
        start = self.args.get("init_lora_weights")
        if start in STARTS:
            raise ValueError(f"init_lora_weights={start} is not to be had: {STARTS[start]}")
        known = [field.name for field in dataclasses.fields(cls) if field.init and field.name not in OURS]
        annotations = typing.get_type_hints(cls)
        values = {}
        for name, value in self.args.items():
            if name not in known:
                raise OptionError(
                    f"adapter 'peft' with method '{self.method}' has no option '{name}'.{did_you_mean(name, known)}", f"Options: {', '.join(sorted(known))}."
                )
            annotation = plain_arms(annotations[name])
            # text is read by the field's type also where it comes from a recipe: a written one holds what was typed
            values[name] = coerce(Text(value) if isinstance(value, str) else value, annotation, f"adapter.{name}") if annotation is not None else value
        config: PeftConfig = cls(task_type="CAUSAL_LM", **values)
        return config

    @hookimpl
    def model_loaded(self, model: PreTrainedModel, run: Run) -> None:
        prepare_quantized(model)

    @hookimpl
    def adapt_model(self, model: PreTrainedModel, run: Run) -> PeftModel:
        adapted = wrap(model, self.peft_config())
        note_low_precision(adapted, run)
        return adapted

    @hookimpl
    def save_adapted(self, model: PeftModel, path: Path, run: Run) -> None:
        save(model, path, run)

    @hookimpl
    def load_adapted(self, base: PreTrainedModel, path: Path, run: Run) -> PeftModel:
        return load(base, path)

    @hookimpl
    def merge_adapted(self, model: PeftModel, run: Run) -> PreTrainedModel:
        """RunError for the methods that have no merged form, such as those that learn a prompt."""
        return merge(model, run)

    @hookimpl
    def adapter_off(self, model: PeftModel, run: Run) -> AbstractContextManager[Any] | None:
        return off(model)


def methods() -> dict[str, Any]:
    """peft's configuration classes by the method's name in small letters."""
    quiet()
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {kind.value.lower(): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def plain_arms(annotation: Any) -> Any:
    """The part of a field's type that can be written in a recipe, or None if there is none (nested configurations)."""
    if supported(annotation):
        return annotation
    arms = tuple(arm for arm in typing.get_args(annotation) if supported(arm) and arm is not type(None))
    return typing.Union[arms] if arms else None  # noqa: UP007
