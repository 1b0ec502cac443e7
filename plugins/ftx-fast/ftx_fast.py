"""Exact shortcuts of a training step, put on a model for as long as it trains: each by itself, each with its own way back."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ftx_fast_head import Head
    from ftx_fast_installed import Installed
    from ftx_fast_prefixes import Tree

logger = logging.getLogger(f"ftx.{__name__}")

#: What each part does.
PARTS = {
    "head": "the head only where there is a label, its gradient found in the forward pass",
    "attention": "causal attention without a mask",
    "rows": "rows joined into one sequence instead of padded (with attention)",
    "prefixes": "what rows of a batch begin with alike computed once (with rows)",
    "layers": "norms, rotary embedding and SwiGLU as one function each",
    "lora": "LoRA and DoRA as one function a group of layers",
    "products": "fp32 products through the faster library, on a CPU",
    "memory": "freed memory kept between steps, on a CPU",
}
#: Parts that `auto` leaves out, for they want something of a run first: to be long, or shapes that come again.
ASKED = {
    "compile": "what stands between a layer's matrix products made by torch's compiler, in place of layers",
    "graphs": "the layers of a small model as CUDA graphs, on a GPU",
}
#: Parts that generation may gain from; attention over a cache and the choice of tokens are the generator's own. Not the products: few
#: rows a step are half as fast through oneDNN, which packs each weight anew.
GENERATING = ("layers", "lora")
#: Kinds of layers that know where a joined row begins.
SEPARABLE = {"full_attention", "sliding_attention"}


def parts_of(fast: bool | str | Sequence[str]) -> list[str]:
    """`auto`, `off` or a list of parts (or with commas) -> the parts; ValueError for another word. In a list `auto` stands for its parts.

    YAML reads a bare off as false.
    """
    if fast in (False, "off"):
        return []
    names = ["auto"] if fast is True else [name.strip() for name in fast.split(",")] if isinstance(fast, str) else list(fast)
    known = {**PARTS, **ASKED}
    for name in names:
        if name not in (*known, "auto"):
            near = difflib.get_close_matches(str(name), [*known, "auto", "off"], n=1)
            raise ValueError(f"fast: '{name}' is no part.{f' Did you mean {near[0]}?' if near else ''} auto, off, or some of: {', '.join(known)}")
    return list(dict.fromkeys(part for name in names for part in (PARTS if name == "auto" else [name])))


@dataclass
class Fast:
    """What is on a model."""

    head: Head | None = None
    joins: bool = False
    multiple: int = 1
    """The tokens of a joined batch are filled up to a multiple of this."""
    shares: bool = False
    """Whether rows share what they begin with."""
    graphs: bool = False
    installed: list[Installed] = field(default_factory=list)

    @property
    def on(self) -> list[str]:
        return [line for one in self.installed for line in one.on]

    @property
    def off(self) -> list[str]:
        """Lines that say what was asked for and does not apply here, and why."""
        return [line for one in self.installed for line in one.off]

    def undo(self) -> None:
        for one in reversed(self.installed):
            one.undo()
        self.head, self.joins, self.multiple, self.shares, self.graphs, self.installed = None, False, 1, False, False, []

    def joined(self, given: dict[str, Any], labels: Tensor, lengths: Sequence[int], fill: int) -> tuple[dict[str, Any], Tensor]:
        """The model's arguments and the labels with the batch's rows joined into one, where that is on and pays; else as they were."""
        from ftx_fast_rows import join, pays

        if not self.joins or not (self.graphs or pays(lengths)):
            return given, labels
        one = join(given["input_ids"], labels, lengths, fill, self.multiple)
        return {**given, **one.arguments()}, one.labels

    def shared(self, given: dict[str, Any], tree: Tree | None, fill: int) -> dict[str, Any] | None:
        """The model's arguments with what the batch's rows begin with alike there once, if that is on and pays."""
        if not self.shares or tree is None or not tree.pays:
            return None
        return {**given, **tree.arguments(given["input_ids"], fill, self.multiple)}


def install(model: nn.Module, parts: Sequence[str], *, noise: bool = False, recomputed: bool = False) -> Fast:
    """Put the named parts on an adapted model; whatever does not apply is left as it was and named in `off`.

    `noise`: its embeddings are given some while it trains. `recomputed`: activations are computed again in the backward pass.
    """
    from ftx_fast_machine import fp32_products, keep_memory

    fast = Fast()
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    try:
        if "memory" in parts and on_cpu:
            fast.installed.append(keep_memory())
        if "products" in parts and on_cpu:
            fast.installed.append(fp32_products(model))
        if "attention" in parts:
            attend(fast, model, parts, on_cpu=on_cpu, noise=noise)
        elif "prefixes" in parts:
            fast.installed.append(without_prefixes("they want attention and rows"))
        uncompiled = why_uncompiled(model, parts, recomputed)
        if "layers" in parts and uncompiled:
            from ftx_fast_layers import install as layers

            fast.installed.append(layers(model))
        if "lora" in parts and any(hasattr(module, "lora_A") for module in model.modules()):
            from ftx_fast_lora import install as lora

            fast.installed.append(lora(model))
        if "head" in parts:
            from ftx_fast_head import install as head

            fast.head, installed = head(model)
            fast.installed.append(installed)
        if "graphs" in parts:  # the last, as is the compiler: they hold what the others put on the layers
            fast.installed.append(graphs(fast, on_cpu, model))
        if "compile" in parts:
            fast.installed.append(compiled(model, uncompiled))
    except BaseException:
        fast.undo()
        raise
    return fast


@contextmanager
def generating(model: nn.Module, parts: Sequence[str] = tuple(PARTS)) -> Iterator[Fast]:
    """While a model generates: of these parts those that a forward pass without gradients gains from."""
    fast = install(model, [part for part in parts if part in GENERATING])
    for line in fast.off:
        logger.debug("not fast: generation: %s", line)
    try:
        yield fast
    finally:
        fast.undo()


def attend(fast: Fast, model: nn.Module, parts: Sequence[str], *, on_cpu: bool, noise: bool) -> None:
    """Attention, and what goes with it: rows joined, and sharing what they begin with. The flash-attention library, where it is
    installed, knows no tree of rows, and is taken where they share nothing."""
    from ftx_fast_attention import install as attention
    from ftx_fast_prefixes import install as prefixes
    from ftx_fast_rows import MULTIPLE

    recorded = "graphs" in parts and not on_cpu
    shares = {"rows", "prefixes"} <= {*parts} and not recorded and not noise
    place = len(fast.installed)
    fast.installed.append(attention(model, flash=not (recorded or shares)))
    if "rows" in parts and fast.installed[-1].on:
        fast.joins, fast.multiple = knows_segments(model), MULTIPLE if on_cpu else 1
        fast.installed.append(rows(fast.joins))
    if shares and fast.joins:
        fast.installed.append(prefixes(model))
        fast.shares = bool(fast.installed[-1].on)
    elif "prefixes" in parts:
        why = "beside graphs" if recorded else "noise on the embeddings, which is each row's own" if noise else "rows are not joined"
        fast.installed.append(without_prefixes(why))
    if shares and not fast.shares:
        fast.installed[place].undo()
        fast.installed[place] = attention(model)


def without_prefixes(why: str) -> Installed:
    from ftx_fast_installed import Installed

    return Installed(lambda: None, off=[f"prefixes: {why}"])


def rows(joins: bool) -> Installed:
    from ftx_fast_installed import Installed

    why = [] if joins else ["rows: the model is not told where a joined row begins"]
    return Installed(lambda: None, on=["rows joined into one where that saves padding"] if joins else [], off=why)


def graphs(fast: Fast, on_cpu: bool, model: nn.Module) -> Installed:
    from ftx_fast_installed import Installed

    if on_cpu or not fast.joins:
        why = "these are for a GPU" if on_cpu else "they want rows (and attention), for they are made for joined batches"
        return Installed(lambda: None, off=[f"graphs: {why}"])
    from ftx_fast_graphs import TOKENS, install

    found = install(model)
    if found.on:
        fast.graphs, fast.multiple = True, TOKENS
    return found


def why_uncompiled(model: nn.Module, parts: Sequence[str], recomputed: bool) -> str:
    """Why no layers are compiled, or ""."""
    if "compile" not in parts:
        return "not asked for"
    if "graphs" in parts:
        return "beside graphs"
    from ftx_fast_compile import unfit

    return unfit(model, recomputed=recomputed)


def compiled(model: nn.Module, why_not: str) -> Installed:
    from ftx_fast_installed import Installed

    if why_not:
        return Installed(lambda: None, off=[f"compile: {why_not}"])
    from ftx_fast_compile import install

    return install(model)


def knows_segments(model: nn.Module) -> bool:
    """Whether every layer that mixes positions is an attention that transformers tells where a joined row begins.

    It tells it from `position_ids`: two tokens are sent through the model to see whether the transformers model in it gets those
    that were given. A wrapper may take none, and peft's virtual tokens make them None.
    """
    import inspect
    import warnings

    import torch
    from transformers import PreTrainedModel

    from ftx_fast_head import of_two_tokens

    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None or "position_ids" not in inspect.signature(inner.forward).parameters:
        return False
    if any(getattr(one, "alora_invocation_tokens", None) for one in getattr(model, "peft_config", {}).values()):
        return False  # each row of a batch is looked through for them
    if not set(getattr(inner.config.get_text_config(), "layer_types", None) or []) <= SEPARABLE:
        return False
    if inner is model:
        return True
    usual, patched, found = inner.forward, vars(inner).get("forward"), []

    def forward(*args: Any, **kwargs: Any) -> Any:
        found.append(inspect.signature(usual).bind(*args, **kwargs).arguments.get("position_ids"))
        return usual(*args, **kwargs)

    device = next(inner.parameters()).device
    given = torch.zeros(1, 2, dtype=torch.long, device=device)
    vars(inner)["forward"] = forward
    try:
        with warnings.catch_warnings(action="ignore"):
            through = of_two_tokens(model, device, position_ids=given) is not None
    finally:
        vars(inner).pop("forward")
        if patched is not None:
            vars(inner)["forward"] = patched
    return through and len(found) == 1 and found[0] is given
