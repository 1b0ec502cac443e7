"""What the parts of ftx-fast change in the memory of a step, for `ftx plan`. Imports no torch; its constants are tested against the parts'."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ftx.shape import Shape

#: ftx_fast_attention: queries of one block.
BLOCK = 48
#: ftx_fast_segments: the longest row that goes through the products, and what may stand in one batch.
PRODUCTS, NEAR, APART = 512, 0.75, 16
#: ftx_fast_head: logits computed at once.
ELEMENTS = {"cpu": 6 << 20, "cuda": 1 << 28}
#: ftx_fast_rows: share of padding from which rows are joined, and what a joined length is a multiple of on a CPU.
PAYS, MULTIPLE = 0.03, 32


def shaped(shape: Shape, parts: Collection[str], *, packed: bool = False) -> Shape:
    """The shape with those of the parts that apply to it, and its rows joined where that pays (and what they begin with alike there once),
    or where the trainer has `packed` them."""
    cpu = shape.device == "cpu"
    on = {part for part in parts if part not in ("products", "memory")}
    if "compile" in on and "graphs" not in on and not shape.checkpointing:  # of what transformers' own layers keep, the compiler makes some again
        on -= {"layers"}
    if shape.softcap:
        on -= {"head"}
    lengths, total = shape.lengths, sum(shape.lengths)
    shares = {"prefixes", "rows", "attention"} <= on and "graphs" not in on and not packed and len(lengths) > 1
    if shares and may_share(shape) and shape.alike + len(lengths) > PAYS * total:
        seen = tuple(length - 1 for length in lengths)  # a row's last token predicts nothing
        return replace(shape, fused=frozenset(on), joined=True, **filled(seen, min(shape.alike, sum(seen) - max(seen)), cpu))
    padded = len(lengths) * max(lengths, default=0)
    pays = {"rows", "attention"} <= on and padded - sum(lengths) > PAYS * padded
    joined = len(lengths) > 1 and (packed or pays)
    return replace(shape, fused=frozenset(on), joined=joined, **(filled(lengths, 0, cpu) if joined and not packed else {}))


def may_share(shape: Shape) -> bool:
    """Whether rows share what they begin with (`ftx_fast_prefixes.unfit`). Not assumed of a model of another kind, or of an adapter that says
    nothing of itself: it may drop something, or keep the rows apart."""
    return shape.known and bool(shape.trained or shape.trains_base) and not (shape.window or shape.dropout)


def filled(lengths: tuple[int, ...], shared: int, cpu: bool) -> dict[str, Any]:
    """Joined sequences with what they are filled up to a multiple of, which is one more."""
    rest = -(sum(lengths) - shared) % MULTIPLE if cpu else 0
    return {"lengths": (*lengths, rest) if rest else lengths, "shared": shared}


def changes(shape: Shape) -> dict[str, int]:
    """Bytes by kind over what the core counts for transformers' own layers."""
    from ftx import activations

    kept = 0
    if "layers" in shape.fused:
        kept += shape.norms * (norm(shape) - activations.norm(shape)) * shape.tokens
        kept -= shape.compute * shape.intermediate * shape.tokens  # silu(gate), computed again
        if shape.trains_base:
            kept -= shape.norms * shape.between * shape.hidden * shape.tokens  # what the norm's weight multiplies, too
    if "attention" in shape.fused and shape.device == "cpu":
        kept += sum(attention(shape, *batch) for batch in batches(shape)) - activations.attention(shape) * shape.tokens
        if shape.output_kept and (shape.joined or shape.longest <= PRODUCTS):  # as the projection takes it: without padding, where rows are joined
            kept += shape.compute * shape.queries * shape.tokens
    if shape.shared and shape.device != "cpu":  # attention's own copies of rows that are whole again, and of its output
        again = sum(shape.lengths) - shape.tokens
        kept += activations.attention(shape) * again + shape.compute * shape.queries * shape.tokens * shape.output_kept
    if shape.joined and "attention" not in shape.fused:  # packed rows under a mask: it as numbers, and keys and values repeated for each query head
        kept += shape.compute * (shape.tokens + 2 * (shape.queries - shape.keys)) * shape.tokens
    return {"activations": shape.layers * kept}


def norm(shape: Shape) -> int:
    """Of an RMSNorm, per token: its input as it came, and the inverse of its size."""
    return shape.between * shape.hidden + 4


def batches(shape: Shape) -> list[tuple[int, int, int]]:
    """(sequences, longest, first token that asks) of the batches that attention makes of the sequences; one of padded rows. What is shared
    is taken to be spread evenly over all sequences but the first."""
    if not shape.joined:
        return [(len(shape.lengths), shape.longest, 0)]
    each = shape.shared // max(1, len(shape.lengths) - 1)
    found: list[list[tuple[int, int]]] = []
    for number, length in sorted(enumerate(shape.lengths), key=lambda one: -one[1]):
        start = each if number and each < length <= PRODUCTS and shape.device == "cpu" else 0
        group = next((some for some in found if length >= NEAR * some[0][0] and all(abs(start - other) <= APART for _, other in some)), None)
        if group is None:
            found.append([(length, start)])
        else:
            group.append((length, start))
    return [(len(group), group[0][0], min(start for _, start in group)) for group in found]


def attention(shape: Shape, count: int, length: int, first: int = 0) -> int:
    """Bytes that one layer keeps for the attention of `count` sequences of `length` that ask from `first` on, its projection's input apart:
    query, key, value, and the probabilities of each block of short rows (longer ones: their output and the log-sums)."""
    e, asked = shape.compute, count * (length - first)
    own = e * (shape.queries * asked + 2 * shape.keys * count * length)
    if length > PRODUCTS:
        return own + shape.compute * shape.queries * asked + 4 * shape.heads * asked
    starts = range(first, length, BLOCK)
    seen = sum((min(start + BLOCK, length) - start) * min(start + BLOCK, length) for start in starts)
    return own + e * shape.heads * count * seen


def chunk(shape: Shape) -> int:
    """Rows of hidden states that go through the head at once."""
    return min(shape.supervised, max(32, ELEMENTS.get(shape.device, ELEMENTS["cuda"]) // shape.vocabulary))


def head(shape: Shape, *, compared: bool = False) -> int:
    """Bytes that the loss needs: hidden states and their gradients, one chunk of logits and what is made of it, and for a
    head that trains the gradient of its weight; `compared`: the KL to a reference is taken as well."""
    e = 2 if shape.autocast else shape.compute
    logits = chunk(shape) * shape.vocabulary
    found = 2 * e * shape.supervised * shape.hidden
    forward = logits * ((4 if e == 4 else 4 + e) if shape.device == "cpu" else e)  # fp32, and as the products have them; on a GPU a kernel needs the latter
    cast = e * shape.vocabulary * shape.hidden * (e != shape.loaded)  # the weight in the dtype of the products
    forward += cast
    if compared:
        forward = max(forward, logits * 20)
        found += e * shape.supervised * shape.hidden
    if shape.trains_base:
        weight = 4 * shape.vocabulary * shape.hidden  # its gradient, and that of one chunk, as it comes and in float32
        forward = max(forward, weight + cast + max(logits * 8, cast + weight + logits * 4))
    return found + forward


def plain_head(shape: Shape) -> int:
    """Bytes that the loss needs where the model's own head makes logits of the supervised positions: in float32 and, if that
    is another dtype, as they come; their log-softmax, its gradient; once more for a soft cap; the gradient of a head that trains."""
    e, logits = 2 if shape.autocast else shape.compute, shape.supervised * shape.vocabulary
    each = 12 + (e if e != 4 else 0) + e * shape.softcap
    return logits * each + e * shape.supervised * shape.hidden + 4 * shape.vocabulary * shape.hidden * shape.trains_base
