"""The kernels of norms, rotary embedding, SwiGLU and the head: the numbers and gradients of the functions for a CPU.

With `pytest -m gpu` they run on a GPU; else in Triton's interpreter, which takes the same code a program at a time on a CPU.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

import ftx_fast_layers as plain  # noqa: E402
import ftx_fast_triton as fast  # noqa: E402

if DEVICE == "cpu" and type(fast.turn).__name__ != "InterpretedFunction":
    pytest.skip("the kernels were declared for a GPU, and there is none", allow_module_level=True)
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]  # the interpreter cuts where bfloat16 rounds


def normal(*shape: int, seed: int = 0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def both(function, *inputs, others=()):
    """Outputs and input gradients of the function of each module, in order."""
    found = []
    for module in (plain, fast):
        given = [x.detach().clone().requires_grad_() for x in inputs]
        out = getattr(module, function).apply(*given, *others)
        out = out if isinstance(out, tuple) else (out,)
        torch.autograd.backward(out, [normal(*x.shape, seed=9, dtype=x.dtype) for x in out])
        found.append([*out, *(x.grad for x in given)])
    return list(zip(*found, strict=True))


def near(pairs):
    for wanted, got in pairs:
        assert got.shape == wanted.shape and got.dtype == wanted.dtype
        bound = 1e-5 if got.dtype is torch.float32 else 2**-8
        assert (got.double() - wanted.double()).norm() <= bound * wanted.double().norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 33), (1, 5)])
def test_norm(shape, dtype):
    near(both("RMSNorm", normal(*shape, dtype=dtype), normal(shape[-1], seed=1, dtype=dtype), others=(1e-5,)))


def test_the_widest_row():
    assert fast.fits(fast.WIDEST) and not fast.fits(fast.WIDEST + 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2])
def test_rotary(rows, dtype):
    query, key = normal(2, 5, 3, 12, dtype=dtype).transpose(1, 2), normal(2, 5, 1, 12, seed=1, dtype=dtype).transpose(1, 2)
    angles = normal(rows, 1, 5, 12, seed=2)
    near(both("Rotary", query, key, others=(angles.cos().to(dtype), angles.sin().to(dtype))))


def test_rotary_of_expanded_rows():
    """Rows that are one in memory and have places of their own."""
    key, angles = normal(1, 3, 5, 12).expand(2, 3, 5, 12), normal(2, 1, 5, 12, seed=2)
    near([(plain.turned(key, angles.cos(), angles.sin()), fast.turned(key, angles.cos(), angles.sin(), False))])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 7), (1100,), (2, 2, 600)])
def test_swiglu(shape, dtype):
    near(both("SwiGLU", normal(*shape, dtype=dtype), normal(*shape, seed=1, dtype=dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [7, fast.PIECE, fast.PIECE + 5, 3 * fast.PIECE - 1])
def test_the_softmax_of_the_head(size, dtype):
    """Rows whose largest logit is in any piece, and some that are far from 0."""
    logits = normal(4, size, dtype=dtype) * 3 + torch.tensor([[0.0], [300.0], [-300.0], [0.0]], device=DEVICE).to(dtype)
    logits[3, -1] = 40
    targets = torch.tensor([0, size - 1, size // 2, 1], device=DEVICE)
    wanted = logits.double().log_softmax(-1)
    for write in (False, True):
        given = logits.clone()
        found = fast.logps_of(given, targets, write=write)
        assert found.dtype is torch.float32 and torch.allclose(found.double(), wanted.gather(-1, targets[:, None])[:, 0], atol=1e-4)
        assert torch.allclose(given.double(), wanted.exp(), atol=1e-6 if dtype is torch.float32 else 2**-9) if write else torch.equal(given, logits)
    assert fast.logps_of(logits[:0], targets[:0], write=True).shape == (0,)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_head_on_a_gpu_is_that_of_a_cpu(dtype):
    from ftx_fast_head import TokenLogps

    hidden, weight = normal(300, 64, dtype=dtype), normal(5000, 64, seed=1, dtype=dtype)
    targets, grads = torch.arange(300, device=DEVICE) * 7, []
    for device in ("cpu", "cuda"):
        given = hidden.detach().to(device, torch.float32 if device == "cpu" else dtype).requires_grad_()
        out = TokenLogps.apply(given, weight.to(given), targets.to(device), None)
        out.sum().backward()
        grads.append((out.detach().cpu(), given.grad.float().cpu()))
    bound = 1e-4 if dtype is torch.float32 else 2e-2
    for exact, ours in zip(*grads, strict=True):
        assert (ours - exact).norm() <= bound * exact.norm()


@pytest.mark.gpu
def test_a_model_on_a_gpu_trains_as_without_them():
    """A whole model in bf16: in sum over four batches its gradients are no further from fp32's with the kernels than without."""
    from ftx.testing.tiny import tiny_model

    def gradients(dtype, ids, installs=False):
        model = tiny_model().to("cuda", dtype)
        put = plain.install(model) if installs else None
        model(input_ids=ids, labels=ids).loss.backward()
        found = {name: one.grad.double() for name, one in model.named_parameters()}
        if put is not None:
            assert len(put.on) == 3 and not put.off
            put.undo()
        return found

    def away(found):
        return sum(float((found[name] - value).norm() / value.norm()) for name, value in exact.items())

    usual = ours = 0.0
    for ids in torch.randint(1, 60, (4, 2, 17), generator=torch.Generator().manual_seed(0)).cuda():
        exact = gradients(torch.float32, ids)
        usual += away(gradients(torch.bfloat16, ids))
        ours += away(gradients(torch.bfloat16, ids, installs=True))
    assert ours <= 1.1 * usual, (ours, usual)
