"""The exporters `merged` (a plain model) and `adapter` (peft's format)."""

from __future__ import annotations

import importlib.metadata as metadata
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ftx import hookimpl, models, option, plugin
from ftx.errors import RunError, first_line
from ftx.export import Departure, Exported
from ftx.parity import ROUNDED, TransformersReader, as_written

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ftx import Run

#: Files of a run's model/ that belong to the tokenizer.
TOKENIZER = ("tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model")
LOAD = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # the directory that this file lies in
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
messages = [{"role": "user", "content": "..."}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```"""
LOAD_ADAPTER = """The base is `{base}`; its weights are not in here.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
{more}
path = "."  # the directory that this file lies in
tokenizer = AutoTokenizer.from_pretrained(path)
base = AutoModelForCausalLM.from_pretrained({reference}, dtype="auto")
model = PeftModel.from_pretrained(base, path)
model.generation_config = GenerationConfig.from_pretrained(path)  # where an answer ends
```
"""
#: A base that an installed distribution provides under a name is known to nobody else.
NAMED = "\nfrom ftx.models import resolve  # ftx-core, and the distribution that provides the base\n"


# --------------------------------------------------------------------------------------------------------------------
# merged
# --------------------------------------------------------------------------------------------------------------------


@plugin
class Merged:
    """The tuned model as one plain model: safetensors, tokenizer and chat template. Every weight is merged in float32 and
    rounded once."""

    base: Literal["dequantised", "original", "requantised"] = option(
        "dequantised",
        "Where the run's base was quantised: merge into the weights that the adapter was trained on (dequantised), into those that they "
        "were made from (original), or quantise the merged weights again (requantised). The last two say something else than the run.",
    )
    max_shard_size: str = option("5GB", "Larger models are written as several files of this size.")

    @hookimpl
    def preflight(self, run: Run) -> list[str]:
        if self.base != "dequantised" and not quantised(run):
            return [f"exporter.base={self.base}: this run's base is not quantised, so there is only one way to merge: leave the option out."]
        return []

    @hookimpl
    def exported_form(self, model: Any, run: Run) -> Any:
        return merged(model, run, self.base)

    @hookimpl
    def export_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, run: Run) -> Exported:
        return write_merged(model, tokenizer, path, self.max_shard_size)


def quantised(run: Run) -> bool:
    return bool(run.hooks and run.hooks.owners("quantization_config"))


def merged(model: Any, run: Run, way: str = "dequantised") -> Any:
    """The tuned model as a plain one; a Departure where it is to say something else than the run."""
    assert run.hooks is not None
    hooks = run.hooks
    if way == "dequantised":
        return hooks.call("merge_adapted", model=model, run=run)
    if way == "original":
        assert run.directory is not None
        plain = models.load_model(run.model_path, dtype=run.dtype, device=run.device)  # type: ignore[arg-type]
        tuned = hooks.call("load_adapted", base=plain, path=run.directory.model, run=run)
        return Departure(hooks.call("merge_adapted", model=tuned, run=run), "merged into the base as it was before it was quantised")
    with tempfile.TemporaryDirectory(prefix="ftx-merged-") as scratch:
        hooks.call("merge_adapted", model=model, run=run).save_pretrained(scratch)
        again = models.load_model(Path(scratch), dtype=run.dtype, device=run.device, quantization_config=hooks.call("quantization_config", run=run))  # type: ignore[arg-type]
        hooks.hook.model_loaded(model=again, run=run)
    return Departure(again, "merged, then quantised again as the base was")


def write_merged(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, max_shard_size: str = "5GB") -> Exported:
    """The model and its tokenizer as a directory that transformers loads."""
    model.save_pretrained(path, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(path)
    kind = "4- or 8-bit weights of bitsandbytes" if getattr(model, "is_quantized", False) else str(model.dtype).removeprefix("torch.")
    return Exported(f"one plain model in {kind}, as safetensors", LOAD)


# --------------------------------------------------------------------------------------------------------------------
# adapter
# --------------------------------------------------------------------------------------------------------------------


@plugin
class Adapter:
    """What was trained, without its base, in peft's format: plain peft loads it, and vLLM where it is a LoRA."""

    base_model: str | None = option(None, "What the adapter's configuration names as its base (default: the run's model, if it is no path).")

    exam = {"adapter": "lora", "options": [{"base_model": "acme/base"}]}

    @hookimpl
    def preflight(self, run: Run) -> list[str]:
        return adapter_obstacles(run, self.base_model)

    @hookimpl
    def exported_form(self, model: Any, run: Run) -> Any:
        return model

    @hookimpl
    def export_model(self, model: Any, tokenizer: PreTrainedTokenizerBase, path: Path, run: Run) -> Exported:
        return write_adapter(model, path, run, self.base_model)

    @hookimpl
    def read_exported(self, path: Path, run: Run) -> TransformersReader:
        return read_adapter(path, run)


def adapter_obstacles(run: Run, base_model: str | None) -> list[str]:
    """Why the run's adapter cannot be handed on alone."""
    assert run.directory is not None
    reasons = []
    if not (run.directory.model / "adapter_config.json").is_file():
        name = run.recipe.adapter.name if run.recipe.adapter else "none"
        reasons.append(f"what adapter '{name}' saved is not in peft's format: use --to merged.")
    if run.recipe.start is not None:
        reasons.append("this run started from another run's model, which nobody else has as a base: use --to merged.")
    elif base_model is None and Path(run.model).expanduser().exists() and run.model not in models.installed():
        reasons.append("the base is a directory of this machine, which means nothing elsewhere: say what it is called, -o exporter.base_model=OWNER/NAME.")
    return reasons


def write_adapter(model: Any, path: Path, run: Run, base_model: str | None) -> Exported:
    """The adapter's two files, with a reference to the base that holds anywhere, the tokenizer's files, and the end tokens in
    a generation_config.json: a base that was trained on plain text alone knows no end of a turn."""
    assert run.directory is not None
    source = run.directory.model
    config = json.loads((source / "adapter_config.json").read_text("utf-8"))
    config["base_model_name_or_path"] = base = base_model or run.model
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    model.generation_config.save_pretrained(path)
    names = {file for pattern in ("adapter_model.safetensors", *TOKENIZER) for file in source.glob(pattern)}
    for file in sorted(names):
        shutil.copyfile(file, path / file.name)
    method = str(config.get("peft_type", "")).lower()
    unknown = [what for what in ("use_dora", "modules_to_save") if config.get(what)] + (["bias"] if config.get("bias", "none") != "none" else [])
    if method != "lora" or unknown:
        run.say(f"note: vLLM does not load {', '.join(unknown) or method}; export it merged for that")
    named = base_model is None and run.model in models.installed()
    load = LOAD_ADAPTER.format(base=base, reference=f"resolve({base!r})" if named else repr(base), more=NAMED if named else "")
    if quantised(run):
        load += "\nThe run had its base in 4 or 8 bits (see the recipe): load it with the same `quantization_config` for the same answers.\n"
    if method == "lora" and not unknown:
        load += f"\nvLLM: `--enable-lora --max-lora-rank {config.get('r')} --lora-modules tuned=PATH`, with the base as its model.\n"
    return Exported(f"an adapter ({method}) in peft's format", load)


def read_adapter(path: Path, run: Run) -> TransformersReader:
    """The export on the run's base, both through from_pretrained; what peft would only warn of is a problem."""
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    assert run.hooks is not None
    config = run.hooks.hook.quantization_config(run=run)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        base = AutoModelForCausalLM.from_pretrained(
            str(run.model_path), dtype=run.dtype, device_map={"": run.device}, use_safetensors=True, quantization_config=config
        )
        as_written(base, run)
        model = PeftModel.from_pretrained(base, str(path), torch_device=run.device)
        base.generation_config = GenerationConfig.from_pretrained(str(path))
    except Exception as error:
        raise RunError(f"peft cannot load what was exported: {first_line(error)}", "See it all with --traceback.") from error
    with safe_open(path / "adapter_model.safetensors", framework="pt") as file:
        held = set(file.keys())
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    problems = [
        f"it {words} {len(keys)} weights, such as {min(keys)}"
        for words, keys in (("lacks", wanted - held), ("holds, and nothing uses,", held - wanted))
        if keys
    ]
    return TransformersReader(
        model.eval(),
        tokenizer,
        name=f"peft {metadata.version('peft')}",
        problems=problems,
        bounds=None if run.dtype == torch.float32 and config is None else ROUNDED,
    )
