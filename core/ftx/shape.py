"""The numbers of a model and of its largest batch: what the plan's formulas hang on. From config.json alone; imports no torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftx.errors import ModelError

#: Config values under other names than Llama's.
OTHER_NAMES = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "num_layers"),
    "num_attention_heads": ("n_head",),
    "intermediate_size": ("n_inner", "ffn_dim"),
}
#: Model types whose config classes tie the embeddings unless they say otherwise.
TIED = {"gemma", "gemma2", "gemma3_text", "gpt2", "smollm3"}
#: Model types that the formulas were made for: decoders of Llama's kind, and where a layer of theirs departs from it.
KNOWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"attention_bias": True},
    "qwen3": {"head_norms": True},
    "smollm3": {},
    "gemma": {},
    "gemma2": {"norms": 4},
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's sizes, the batch that needs most, and what the run's plugins make of both (`plan_shape`)."""

    model_type: str = "llama"
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    attention_bias: bool = False
    """Of the query, key and value projections."""
    output_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False
    norms: int = 2
    """RMSNorms of width `hidden` in a layer."""
    softcap: bool = False
    """The logits go through a function before the loss."""
    window: int = 0
    context: int = 0
    """Longest input that the model was made for; 0 where its config says nothing."""

    device: str = "cpu"
    loaded: int = 4
    """Bytes of a number of the base as it is loaded. An adapter that has `base_dtype` says so."""
    compute: int = 4
    """Bytes of a number that a layer computes."""
    counted: int = 0
    """Numbers in the weights' files; 0 where there are none. Counts for kinds of models whose sizes say too little."""

    lengths: tuple[int, ...] = (512,) * 4
    """Tokens of each sequence of the largest forward pass."""
    supervised: int = 2048
    """Positions of it whose next token counts in the loss."""
    alike: int = 0
    """Tokens of it with which a sequence begins as another one does: what the data say."""
    shared: int = 0
    """Positions that are not computed again for them. A trainer that `joined` its sequences so says it."""
    accumulation: int = 1
    checkpointing: bool = False

    trained: int = 0
    """Numbers that train. An adapter says so."""
    trains_base: bool = False
    packed: int = 0
    """Bits of a number of the layers' weight matrices, where they are packed. A quantizer says so."""
    output_kept: bool = True
    """The input of the attention's output projection is kept, because that projection is adapted or trains. An adapter says if not."""
    residual: int = 0
    """Bytes of a number between the layers, if not `compute`."""
    autocast: bool = False
    """Products in bfloat16 over float32 weights."""
    fused: frozenset[str] = frozenset()
    """Parts of ftx-fast or the like by name, that a trainer puts on the model."""
    joined: bool = False
    """The sequences are one row without padding, and without what is `shared`."""
    dropout: bool = False
    """Each row drops something of its own in training. The config or an adapter says so."""
    reference: bool = False
    """A trainer needs the starting model beside the one that trains, and the adapter cannot be switched off."""

    # ---- sizes

    @property
    def tokens(self) -> int:
        """Positions of the largest forward pass, padding included."""
        return sum(self.lengths) - self.shared if self.joined else len(self.lengths) * max(self.lengths, default=0)

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @property
    def between(self) -> int:
        """Bytes of a number between the layers."""
        return self.residual or self.compute

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Linear layers of one decoder layer -> (inputs, outputs)."""
        h, f, q, k = self.hidden, self.intermediate, self.queries, self.keys
        attention = {"q_proj": (h, q), "k_proj": (h, k), "v_proj": (h, k), "o_proj": (q, h)}
        return attention | {"gate_proj": (h, f), "up_proj": (h, f), "down_proj": (f, h)}

    @property
    def biases(self) -> int:
        """Numbers in the biases of one layer."""
        own = (self.queries + 2 * self.keys) * self.attention_bias + self.hidden * self.output_bias
        return own + (2 * self.intermediate + self.hidden) * self.mlp_bias

    @property
    def linear_parameters(self) -> int:
        """Numbers in all layers' weight matrices: what a quantizer packs."""
        return self.layers * sum(i * o for i, o in self.linears.values())

    @property
    def embeddings(self) -> int:
        """Numbers in embedding and head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def other_parameters(self) -> int:
        """Numbers in norms and biases."""
        layer = self.norms * self.hidden + (2 * self.head_dim if self.head_norms else 0) + self.biases
        return self.layers * layer + self.hidden

    @property
    def parameters(self) -> int:
        if self.counted and not self.known:
            return self.counted
        return self.linear_parameters + self.embeddings + self.other_parameters

    @property
    def known(self) -> bool:
        """Whether the formulas were made for this kind of model."""
        return self.model_type in KNOWN

    def with_batch(self, lengths: tuple[int, ...], supervised: int | None = None, alike: int = 0) -> Shape:
        """The same with another largest batch; every token of it counts in the loss unless `supervised` says how many."""
        return replace(self, lengths=lengths, supervised=sum(lengths) if supervised is None else supervised, alike=alike)


def read_shape(path: Path, **more: Any) -> Shape:
    """The shape of the model in a directory (or of a config.json); `more` are fields over it. ModelError if it holds no model's sizes."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path} has no config.json, so it is not a model directory.", "Give a directory with a config.json.") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as JSON ({error}).", "Get the file again.") from error
    counted = sum(map(numbers_in, file.parent.glob("*.safetensors")))
    return shape_of(config if isinstance(config, dict) else {}, where=str(file), counted=counted, **more)


def numbers_in(file: Path) -> int:
    """How many numbers a safetensors file holds, from its header alone; 0 if it is none."""
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(length, 100 << 20)))
        return sum(math.prod(about["shape"]) for name, about in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 0


def shape_of(config: dict[str, Any], *, where: str = "the config", **more: Any) -> Shape:
    """The shape that a model's config describes; ModelError names what is missing."""
    config = {**config, **(config.get("text_config") or {})}
    wanted = {name: _whole(config, name, where) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")}
    hidden, heads = wanted["hidden_size"], wanted["num_attention_heads"]
    kind = str(config.get("model_type", "unknown"))
    known = {name: value for name, value in KNOWN.get(kind, {}).items()}
    said = config.get("attention_bias")
    return Shape(
        **{
            "model_type": kind,
            "hidden": hidden,
            "intermediate": _find(config, "intermediate_size") or 4 * hidden,
            "layers": wanted["num_hidden_layers"],
            "heads": heads,
            "kv_heads": config.get("num_key_value_heads") or heads,
            "head_dim": config.get("head_dim") or hidden // heads,
            "vocabulary": wanted["vocab_size"],
            "tied": bool(config.get("tie_word_embeddings", kind in TIED)),
            "output_bias": bool(said) and kind != "qwen2",
            "mlp_bias": bool(config.get("mlp_bias", False)),
            "softcap": config.get("final_logit_softcapping") is not None,
            "window": int(config.get("sliding_window") or 0) if config.get("use_sliding_window", True) else 0,
            "dropout": any(isinstance(value, float) and value > 0 for name, value in config.items() if "dropout" in name or "pdrop" in name),
            "context": int(_find(config, "max_position_embeddings") or 0),
            **({"attention_bias": bool(said)} if said is not None else {}),
            **known,
            **more,
        }
    )


def _find(config: dict[str, Any], name: str) -> Any:
    return next((config[one] for one in (name, *OTHER_NAMES.get(name, ())) if config.get(one) is not None), None)


def _whole(config: dict[str, Any], name: str, where: str) -> int:
    value = _find(config, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{where}: {name} is {'missing' if value is None else repr(value)}.", "It must be a whole number: is this a language model's config?")
    return value
