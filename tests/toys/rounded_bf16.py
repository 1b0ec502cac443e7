"""ftx with bfloat16 products on a processor that has none: `python tests/toys/rounded_bf16.py export RUN --to merged --dtype bfloat16`.

torch emulates them there, several hundred times slower than fp32. Here each is made in fp32 and rounded to bfloat16 once, as a
processor with bfloat16 does it (it adds up in fp32): the same rounding, in another order of the sum.
"""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode

PRODUCTS = {torch.nn.functional.linear, torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.bmm}


class Rounded(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.copies: dict[int, tuple[torch.Tensor, int, torch.Tensor]] = {}  # of weights, beside the weight and which version of it

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS and args[0].dtype is torch.bfloat16 and args[0].device.type == "cpu":
            return func(*map(self.wide, args), **{name: self.wide(value) for name, value in (kwargs or {}).items()}).bfloat16()
        return func(*args, **(kwargs or {}))

    def wide(self, value):
        if not isinstance(value, torch.Tensor):
            return value
        if not isinstance(value, torch.nn.Parameter) or value.requires_grad:
            return value.float()
        known, version, copy = self.copies.get(id(value), (None, 0, None))
        if known is not value or version != value._version:
            self.copies[id(value)] = value, value._version, (copy := value.float())
        return copy


if __name__ == "__main__":
    from ftx.cli import main

    with Rounded():
        main()
