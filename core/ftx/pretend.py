"""A machine without memory: tensors of floats are shapes, integers and masks are real, and every storage is counted."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten
#: Factories whose result is of whole numbers unless they are told otherwise.
WHOLE = (aten.randperm, aten.arange)
#: Comparisons, by which a plugin tries whether a module does what it takes it for: it does.
ALIKE = (aten.allclose.default, aten.equal.default)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor)


class Pretend(FakeTensorMode):  # type: ignore[misc]
    """FakeTensorMode in which token ids, labels, positions and what is computed from them alone stay real, so that shapes which
    hang on them (the supervised positions, the lengths of rows) come out as they will be.

    A number read from a float tensor is 1.0, a truth value False, and two tensors are alike. `live` and `peak` are bytes of
    storage: each counts once, from the operator that made it until it is freed. What an operator takes inside itself is not
    seen, but for logsumexp's copy of its input.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.live = self.peak = self.depth = 0
        self.known = WeakIdKeyDictionary()

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.depth += 1
        try:
            result = self._result(func, types, args, kwargs or {})
        finally:
            self.depth -= 1
        if not self.depth:  # inside, an operator is taken apart, which the real one is not
            self.count(result)
            if func is aten.logsumexp.default:  # its kernel makes a copy of its input, which over a vocabulary is large
                self.peak = max(self.peak, self.live + args[0].nbytes)
            self.fake_tensor_converter.meta_converter.tensor_memo.clear()  # its weak references keep modules from being moved
        return result

    def count(self, result: Any) -> None:
        for one in tree_flatten(result)[0]:
            if isinstance(one, torch.Tensor):
                storage = one.untyped_storage()
                if storage not in self.known:
                    size = storage.nbytes()
                    self.known[storage] = size
                    self.live += size
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.live -= size

    def _result(self, func: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.Tensor)]
        fakes = [one for one in tensors if isinstance(one, FakeTensor)]
        if func is aten._local_scalar_dense.default and fakes:
            return 1.0 if fakes[0].is_floating_point() else fakes[0].dtype is not torch.bool and 1
        if func in ALIKE and fakes:
            return True
        if not fakes and self._is_whole(func, tensors, kwargs):
            with _disable_current_modes():
                result = func(*args, **kwargs)
            return tree_map_only(torch.Tensor, lambda one: self.from_tensor(one) if one.is_floating_point() else one, result)
        if func in INDEXING and fakes:
            args = (args[0], self._places(args[1]), *args[2:])
        if func is aten.masked_select.default and not isinstance(args[1], FakeTensor):
            with _disable_current_modes():
                count = int(torch.broadcast_tensors(torch.empty(args[0].shape, device="meta"), args[1].to("meta"))[0].numel() and args[1].sum())
            return args[0].new_empty((count,))
        return super().dispatch(func, types, args, kwargs)

    def hollowed(self, one: Any) -> Any:
        """A tensor, with whatever hangs on it, or an object that holds some, as shapes."""
        if isinstance(one, torch.Tensor):
            with _disable_current_modes():
                empty = torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="meta")
            fake = FakeTensor(self, empty, torch.device("cpu"))
            self.count(fake)
            vars(fake).update({name: self.hollowed(value) for name, value in vars(one).items()})
            fake.requires_grad_(one.requires_grad)
            fake._is_param = isinstance(one, torch.nn.Parameter)
            return fake
        if type(one).__module__.partition(".")[0] in ("builtins", "torch") or not hasattr(one, "__dict__"):
            return one
        copied = copy.copy(one)
        vars(copied).update({name: self.hollowed(value) for name, value in vars(one).items()})
        return copied

    def _is_whole(self, func: Any, tensors: list[Any], kwargs: dict[str, Any]) -> bool:
        """Whether an operator on real tensors, or on none, gives whole numbers or truth values."""
        wanted = kwargs.get("dtype")
        if tensors:
            return all(not one.is_floating_point() and one.device.type == "cpu" for one in tensors)
        if wanted is not None:
            return not wanted.is_floating_point
        return func.overloadpacket in WHOLE

    def _places(self, indices: Any) -> list[Any]:
        """Masks as the places where they are true."""
        found: list[Any] = []
        for one in indices:
            if isinstance(one, torch.Tensor) and one.dtype is torch.bool and not isinstance(one, FakeTensor):
                with _disable_current_modes():
                    found += one.nonzero(as_tuple=True)
            else:
                found.append(one)
        return found


def current() -> Pretend:
    """The Pretend of the block in hand."""
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    assert isinstance(mode, Pretend)
    return mode


@contextlib.contextmanager
def pretending() -> Iterator[Pretend]:
    """Everything in the block runs on a Pretend."""
    usual, mode = torch.utils.swap_tensors, Pretend()

    def swap(one: torch.Tensor, other: torch.Tensor) -> None:
        if (one.dtype, one.device, one.shape) != (other.dtype, other.device, other.shape):
            usual(one, other)  # else a module is moved to where it is, which fails for a tensor that something refers to weakly

    torch.utils.swap_tensors = swap
    try:
        with mode:
            yield mode
    finally:
        torch.utils.swap_tensors = usual
