"""Bytes that transformers' own decoder layers keep for the backward pass, and need beside it: closed forms for Llama-like models.

Per token and layer, with h hidden, f intermediate, q and k the widths of queries and keys, e bytes of a number: 8 h + 8 for two
RMSNorms (a float32 input and one number each), e (2 q + 2 k) for attention through SDPA and 4 a head for its log-sums, 3 e f for
SwiGLU. What an adapter or a training base adds is theirs to say; what a trainer computes otherwise, the trainer's.
"""

from __future__ import annotations

from ftx.shape import Shape


def layers(shape: Shape) -> int:
    """Bytes that all layers together keep, with frozen weights and no adapter."""
    return shape.layers * shape.tokens * (norm(shape) * shape.norms + attention(shape) + mlp(shape))


def norm(shape: Shape) -> int:
    """Of an RMSNorm, per token: its input in float32, and the inverse of its size."""
    return 4 * shape.hidden + 4


def attention(shape: Shape) -> int:
    """Of SDPA without a mask, per token: query, key, value, output; and the log-sum of each head."""
    return shape.compute * (2 * shape.queries + 2 * shape.keys) + 4 * shape.heads


def mlp(shape: Shape) -> int:
    """Of SwiGLU, per token: gate, silu(gate), up."""
    return 3 * shape.compute * shape.intermediate


def last_norm(shape: Shape) -> int:
    """Bytes that the norm behind the layers keeps."""
    return shape.tokens * norm(shape)


def trained_inputs(shape: Shape) -> int:
    """Bytes more in all layers where the weights train: the inputs of linear layers, and what a norm's weight multiplies.
    The output projection's input is the attention's own output."""
    e, h = shape.compute, shape.hidden
    return shape.layers * shape.tokens * (e * (2 * h + shape.intermediate) + shape.norms * shape.between * h)


def boundary(shape: Shape) -> int:
    """Bytes between two layers: what checkpointing keeps of each."""
    return shape.tokens * shape.between * shape.hidden


def backward(shape: Shape) -> int:
    """Bytes beside what is saved when the backward pass of a layer stands highest, in its SwiGLU: the gradients of its
    three, less the down projection's input, which is gone by then; and the layer's own gradient."""
    return shape.tokens * (2 * shape.compute * shape.intermediate + shape.between * shape.hidden)
