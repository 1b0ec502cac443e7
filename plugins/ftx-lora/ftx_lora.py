"""The adapter `lora`, and what every adapter through peft shares: wrapping, saving, loading, merging, switching off."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import math
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ftx import hookimpl, option, plugin
from ftx.errors import RunError, did_you_mean

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftConfig, PeftModel
    from transformers import PreTrainedModel

    from ftx import Run
    from ftx.shape import Shape

#: How A and B may start beside true and false: the schemes of peft that need the weights alone.
SCHEMES = ("gaussian", "orthogonal", "olora", "pissa", "pissa_niter_N", "mica")

#: How far a merge may move a logit, as a share of the largest: rounding moves them by about 1 %, a wrong merge by far more.
LOOSE = 0.1


@plugin
class LoRA:
    """Low-rank adaptation (Hu et al., 2021, arXiv 2106.09685): W + (alpha / r) B A, with W frozen."""

    r: int = option(16, "Rank of the update.")
    alpha: int = option(32, "Scale of the update; the update is multiplied by alpha / r.")
    dropout: float = option(0.0, "Share of the update's inputs dropped in training.")
    target_modules: list[str] | str = option(
        "all-linear", "What is adapted: all-linear (all linear layers but the head), module names, or a regular expression of whole paths."
    )
    bias: Literal["none", "all", "lora_only"] = option("none", "Which biases of the base train too.")
    modules_to_save: list[str] = option([], "Modules that train in full and are saved with the adapter, such as lm_head.")
    rslora: bool = option(False, "Scale by alpha / sqrt(r) instead of alpha / r (Kalajdzievski, 2023).")
    init: bool | str = option(
        True,
        "How A and B start: true (peft's default, B = 0), false (both random: the output changes), or a scheme of peft: gaussian, orthogonal, "
        "olora, pissa, pissa_niter_N (pissa by a quick decomposition of N iterations) or mica. "
        "Not eva and corda, which read data first, nor loftq, which quantises the base.",
    )

    suggests = {
        "trainer.learning_rate": 2e-4,
        "trainer.num_train_epochs": 3,
        "trainer:dpo.learning_rate": 1e-4,
        "trainer:dpo.num_train_epochs": 1,
    }

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r must be at least 1, got {self.r}")
        if self.alpha < 1:
            raise ValueError(f"alpha must be at least 1, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout:g}")
        if not self.target_modules:
            raise ValueError("target_modules must name at least one module")
        if isinstance(self.init, str) and not re.fullmatch("|".join(SCHEMES).replace("N", r"[1-9]\d*"), self.init):
            raise ValueError(f"init must be true, false, {', '.join(SCHEMES[:-1])} or {SCHEMES[-1]}, got {self.init}")
        if self.init == "orthogonal" and self.r % 2:
            raise ValueError(f"init=orthogonal needs an even r, got {self.r}")
        object.__setattr__(self, "target_modules", listed(self.target_modules))
        if isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise ValueError(f"target_modules is not a regular expression ({error}): {self.target_modules}") from error

    def lora_config(self, **more: Any) -> LoraConfig:
        """peft's configuration; `more` are further fields of it."""
        quiet()
        from peft import LoraConfig

        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            bias=self.bias,
            modules_to_save=self.modules_to_save or None,
            use_rslora=self.rslora,
            init_lora_weights=self.init,
            **more,
        )

    @hookimpl
    def preflight(self, run: Run) -> list[str]:
        if run.recipe.quantizer is not None and changes_base(self.init):
            return [f"init={self.init} changes the base's weights, which cannot be done to quantised ones: use init=true."]
        return []

    @hookimpl
    def plan_shape(self, shape: Shape, run: Run) -> Shape:
        from ftx_lora_plan import shaped

        return shaped(self, shape)

    @hookimpl
    def memory_use(self, shape: Shape, run: Run) -> dict[str, int]:
        from ftx_lora_plan import memory

        return memory(self, shape)

    @hookimpl
    def model_loaded(self, model: PreTrainedModel, run: Run) -> None:
        prepare_quantized(model)

    @hookimpl
    def adapt_model(self, model: PreTrainedModel, run: Run) -> PeftModel:
        """The base with fresh float32 adapters; RunError for targets that the model does not have."""
        note_learning_rate(run)
        if getattr(model, "is_quantized", False) and changes_base(self.init):
            raise RunError(f"init={self.init} cannot be taken from quantised weights.", "Use init=true.")
        check_names(model, self.target_modules if isinstance(self.target_modules, list) else [], "target_modules")
        check_names(model, self.modules_to_save, "modules_to_save")
        adapted = wrap(model, self.lora_config())
        if changes_base(self.init):
            # kept for saving: see as_plain_lora
            adapted.initial_state = {key: tensor.clone() for key, tensor in adapter_state(adapted).items()}
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
        return merge(model, run)

    @hookimpl
    def adapter_off(self, model: PeftModel, run: Run) -> AbstractContextManager[Any] | None:
        return off(model)


# --------------------------------------------------------------------------------------------------------------------
# Shared by the adapters through peft
# --------------------------------------------------------------------------------------------------------------------


def changes_base(init: bool | str) -> bool:
    """True for an initialisation that moves a part of the base's weights into the adapter."""
    return isinstance(init, str) and init.startswith(("olora", "pissa"))


def quiet() -> None:
    """`import peft` imports bitsandbytes where it is installed, which logs that an optional CPU kernel is missing."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def prepare_quantized(model: PreTrainedModel) -> None:
    """Freeze a quantised base; nothing for a plain model.

    What is not quantised in it stays in the run's dtype, as it does under plain LoRA. peft's own preparation makes it
    float32, and with it all that the layers compute: embeddings, head and activations would take twice their memory.
    """
    if getattr(model, "is_quantized", False):
        model.requires_grad_(False)


@contextlib.contextmanager
def _no_quantized_layers(model: PreTrainedModel) -> Iterator[None]:
    """In here peft does not look for 4- and 8-bit layers in a model that has none: it would import bitsandbytes, for seconds."""
    import peft.tuners.lora.model as lora

    names = () if getattr(model, "is_quantized", False) else ("is_bnb_available", "is_bnb_4bit_available")
    before = {name: getattr(lora, name) for name in names if hasattr(lora, name)}
    vars(lora).update(dict.fromkeys(before, lambda: False))
    try:
        yield
    finally:
        vars(lora).update(before)


def wrap(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """The base with freshly initialised weights of a peft configuration, in float32; RunError for what peft refuses."""
    quiet()
    import torch
    from peft import get_peft_model
    from peft.utils.other import ModulesToSaveWrapper

    prepare_quantized(model)
    try:
        with _no_quantized_layers(model):
            wrapped = get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise RunError(
            f"peft refuses: {(str(error).strip() or type(error).__name__).splitlines()[0]}", "Check the adapter's options against the model."
        ) from error
    for module in wrapped.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for trained in module.modules_to_save.values():
                dtype = next((p.dtype for p in trained.parameters()), torch.float32)
                if dtype != torch.float32:
                    compute_in_float32(trained, dtype)
    return wrapped


def compute_in_float32(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Make a float32 module of one in `dtype`, to be called and to answer in `dtype` as before. Updates of a usual size
    vanish in bfloat16; peft casts the low-rank weights, but not whole modules that train."""
    module.float()
    module.register_forward_pre_hook(_inputs_to_float32)
    module.register_forward_hook(functools.partial(_output_to, dtype))


def _inputs_to_float32(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if hasattr(x, "is_floating_point") and x.is_floating_point() else x for x in inputs)


def _output_to(dtype: torch.dtype, module: Any, inputs: Any, output: Any) -> Any:
    return output.to(dtype) if hasattr(output, "is_floating_point") and output.is_floating_point() else output


def _drop_casts(module: torch.nn.Module) -> None:
    """Take the hooks of `compute_in_float32` off again."""
    ours = [
        (module._forward_pre_hooks, lambda hook: hook is _inputs_to_float32),
        (module._forward_hooks, lambda hook: getattr(hook, "func", None) is _output_to),
    ]
    for hooks, is_ours in ours:
        for key in [key for key, hook in hooks.items() if is_ours(hook)]:
            del hooks[key]


def listed(targets: list[str] | str) -> list[str] | str:
    """Text that is nothing but names, such as q_proj or q_proj,v_proj, as a list of them: as a regular expression of whole paths it
    could match nothing."""
    if isinstance(targets, str) and re.fullmatch(r"\w+|[\w.]+(\s*,\s*[\w.]+)+", targets.strip()):
        return [name.strip() for name in targets.split(",")]
    return targets


def check_names(model: PreTrainedModel, names: Iterable[str], what: str) -> None:
    """RunError for a name that no module of the model has; peft is content if one of several is found."""
    import torch

    modules = dict(model.named_modules())
    for name in names:
        if not any(known == name or known.endswith(f".{name}") for known in modules):
            leaves = {known.rpartition(".")[2] for known, module in modules.items() if isinstance(module, torch.nn.Linear | torch.nn.Embedding)}
            raise RunError(f"{what}: the model has no module '{name}'.{did_you_mean(name, leaves)}", f"It has: {', '.join(sorted(leaves))}.")


def note_learning_rate(run: Run) -> None:
    """Say so where the trainer's learning rate is unusual for low-rank updates."""
    trainer = run.recipe.trainer
    rate = trainer.options.get("learning_rate") if trainer else None
    low, high = ("5e-6", "2e-4") if trainer and trainer.name == "dpo" else ("1e-4", "3e-4")
    if rate is not None and not float(low) <= rate <= float(high):
        run.say(f"note: learning rate {rate:g} is outside {low} to {high}, the usual range for LoRA")


def note_low_precision(model: PeftModel, run: Run) -> None:
    """Say so where something trains in less than float32 all the same (biases of a bfloat16 base, some peft methods)."""
    import torch

    low = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32}
    if low:
        name, dtype = next(iter(low.items()))
        run.say(f"note: {len(low)} weights train in {str(dtype).removeprefix('torch.')}, where small updates are lost ({name}): --dtype float32 avoids that")


def adapter_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """The trained tensors by the names that peft gives them on disk."""
    from peft import get_peft_model_state_dict

    # never the embeddings too: "auto" asks the hub whether the vocabulary has grown
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return state


def save(model: PeftModel, path: Path, run: Run) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`, in peft's format, into the directory `path`.

    The configuration names the base by its portable reference. peft's own save_pretrained would write the path of a
    cache there, and a README.
    """
    from safetensors.torch import save_file

    config = copy.copy(model.peft_config["default"])
    state = adapter_state(model)
    if hasattr(model, "initial_state"):
        state = as_plain_lora(state, model.initial_state, config)
    config.base_model_name_or_path = run.model
    config.inference_mode = True
    if isinstance(getattr(config, "target_modules", None), set):
        config.target_modules = sorted(config.target_modules)
    path.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.detach().cpu().contiguous().clone() for key, tensor in state.items()}, path / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(path))


def as_plain_lora(state: dict[str, torch.Tensor], initial: dict[str, torch.Tensor], config: LoraConfig) -> dict[str, torch.Tensor]:
    """The state of an adapter that started from a part of the base's weights, for the untouched base; changes `config`.

    W - s B0 A0 + s B A = W + s [B, -B0] [A; A0]: a LoRA of twice the rank. Otherwise a reader would have to repeat the
    decomposition to the bit, on whatever machine it has.
    """
    import torch

    plain = dict(state)
    for key, tensor in state.items():
        if re.search(r"lora_(embedding_)?A", key):
            plain[key] = torch.cat([tensor, initial[key]], dim=0)
        elif re.search(r"lora_(embedding_)?B", key):
            plain[key] = torch.cat([tensor, -initial[key]], dim=1)
    config.r *= 2
    config.lora_alpha *= math.sqrt(2) if config.use_rslora else 2  # the scale s stays
    config.init_lora_weights = True
    return plain


def load(base: PreTrainedModel, path: Path) -> PeftModel:
    """The base with the adapter in `path`, frozen and in eval mode; RunError if anything is missing, left over or misshapen."""
    quiet()
    from peft import PeftConfig, set_peft_model_state_dict
    from safetensors.torch import load_file

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (path / name).is_file():
            raise RunError(f"{path} holds no adapter ({name} is missing).", "It must come from a run with an adapter of peft, such as lora.")
    config = PeftConfig.from_pretrained(str(path))
    config.inference_mode = True
    config.base_model_name_or_path = None  # peft would warn that the base has another name
    model = wrap(base, config)
    wanted, found = adapter_state(model), load_file(path / "adapter_model.safetensors", device=str(base.device))
    wrong = {
        "missing": wanted.keys() - found.keys(),
        "unexpected": found.keys() - wanted.keys(),
        "misshapen": {key for key in wanted.keys() & found.keys() if wanted[key].shape != found[key].shape},
    }
    for what, names in wrong.items():
        if names:
            raise RunError(f"{path}: {len(names)} {what} weights, such as {min(names)}.", "The adapter belongs to another model, or the file is damaged.")
    set_peft_model_state_dict(model, found)
    model.requires_grad_(False)
    return model.eval()


def merge(model: PeftModel, run: Run) -> PreTrainedModel:
    """The base with the adapter in its weights, as a plain model in the base's dtype; uses the adapted model up.

    Every product is added in float32 and rounded once. A quantised base is dequantised first, to the very weights that
    the adapter was trained on; the result is not quantised. How far the logits of a probe move is said; RunError where
    they become others, and for a method that has no merged form.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    config = model.peft_config["default"]
    method = config.peft_type.value.lower()
    if config.is_prompt_learning or not hasattr(model, "merge_and_unload"):
        raise RunError(f"{method} cannot be merged into the weights.", "Use the model with its adapter, or train with --adapter lora.")
    before = probe(model)
    if getattr(model.get_base_model(), "is_quantized", False):
        model = on_dequantized(model, run)
    base = model.get_base_model()
    dtypes = {re.sub(r"\.(base_layer|original_module)\b", "", name): p.dtype for name, p in base.named_parameters(remove_duplicate=False)}
    tied = (base.get_input_embeddings(), base.get_output_embeddings()) if base.config.tie_word_embeddings else ()
    for layer in base.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge = functools.partial(_merge_in_float32, layer, layer.merge, layer in tied)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the embeddings are no longer tied
        try:
            merged: PreTrainedModel = model.merge_and_unload(safe_merge=True)
        except (NotImplementedError, AttributeError, ValueError) as error:
            raise RunError(f"{method} cannot be merged into the weights: {error}", "Use the model with its adapter.") from error
    for module in merged.modules():
        _drop_casts(module)
    for name, parameter in merged.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))
        parameter.requires_grad_(True)
    moved, largest = (probe(merged) - before).abs().max().item(), before.abs().max().item()
    run.say(f"merged {method} into the weights: on a probe no logit moved by more than {moved:.1g} (the largest is {largest:.3g})")
    if not moved <= LOOSE * largest:
        raise RunError(f"merging {method} changed what the model says: a logit moved by {moved:.3g}.", "Use the model with its adapter.")
    return merged


def probe(model: Any) -> torch.Tensor:
    """The logits (1, 32, vocabulary) in float32, on the CPU, that the model gives 32 arbitrary tokens in eval mode."""
    import torch

    training = model.training
    tokens = torch.arange(32).mul(7919).remainder(model.config.vocab_size).unsqueeze(0).to(model.device)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=tokens).logits.float().cpu()
    model.train(training)
    return logits


def _merge_in_float32(layer: Any, merge_layer: Any, is_tied: bool, *positional: Any, **named: Any) -> None:
    """Merge one adapted layer in float32, then return to its dtype: one layer at a time costs next to no memory."""
    import torch

    inner = layer.get_base_layer()
    if is_tied:
        # the other end shares this weight and must stay as it is; peft then marks the two as no longer tied
        inner.weight = torch.nn.Parameter(inner.weight.detach().clone(), requires_grad=False)
    dtype = next((p.dtype for p in inner.parameters()), torch.float32)
    inner.float()
    merge_layer(*positional, **named)
    inner.to(dtype)


def on_dequantized(model: PeftModel, run: Run) -> PeftModel:
    """The same adapter on the dequantised base, in the dtype in which the quantised one computes."""
    from peft import set_peft_model_state_dict

    config, state, training = model.peft_config["default"], adapter_state(model), model.training
    base = model.unload()
    dtype = run.dtype or base.config.dtype
    base = base.dequantize(dtype=dtype)
    for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        base.__dict__.pop(mark, None)
    for parameter in base.parameters():  # not base.to(dtype), which would round the rotary frequencies too
        parameter.data = parameter.data.to(dtype)
    plain = wrap(base, config)
    set_peft_model_state_dict(plain, state)
    return plain.train(training)


def off(model: PeftModel) -> AbstractContextManager[Any] | None:
    """The model as the base, or None where training reaches the base's own weights (PiSSA, OLoRA, trained biases)."""
    config = model.peft_config["default"]
    trains_biases = getattr(config, "bias", "none") != "none" and any(name.endswith("bias") and "lora_" not in name for name, _ in model.named_parameters())
    if trains_biases or changes_base(getattr(config, "init_lora_weights", True)):
        return None
    disabled: AbstractContextManager[Any] = model.disable_adapter()
    return disabled
