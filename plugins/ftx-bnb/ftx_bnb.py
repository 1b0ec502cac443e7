"""The quantizers `nf4`, `fp4` and `int8`: the base in 4 or 8 bits, through bitsandbytes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ftx import hookimpl, option, plugin

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

    from ftx import Run
    from ftx.shape import Shape


@plugin
class NF4:
    """4 bits a weight on the quantiles of a normal distribution (Dettmers et al., 2023, arXiv 2305.14314)."""

    double_quant: bool = option(True, "Quantise the scales too: saves about 0.4 bits a weight.")

    @hookimpl
    def preflight(self, run: Run) -> list[str]:
        return obstacles(run)

    @hookimpl
    def plan_shape(self, shape: Shape, run: Run) -> Shape:
        return packed(shape, 4)

    @hookimpl
    def memory_use(self, shape: Shape, run: Run) -> dict[str, int]:
        return packing(shape, bits=4, double_quant=self.double_quant)

    @hookimpl
    def quantization_config(self, run: Run) -> BitsAndBytesConfig:
        return four_bits("nf4", double_quant=self.double_quant, run=run)

    @hookimpl
    def model_loaded(self, model: PreTrainedModel, run: Run) -> None:
        keep_weights(model)

    @hookimpl
    def check_environment(self) -> list[str]:
        return environment()


@plugin
class FP4:
    """4 bits a weight as small floating-point numbers."""

    double_quant: bool = option(True, "Quantise the scales too: saves about 0.4 bits a weight.")

    @hookimpl
    def preflight(self, run: Run) -> list[str]:
        return obstacles(run)

    @hookimpl
    def plan_shape(self, shape: Shape, run: Run) -> Shape:
        return packed(shape, 4)

    @hookimpl
    def memory_use(self, shape: Shape, run: Run) -> dict[str, int]:
        return packing(shape, bits=4, double_quant=self.double_quant)

    @hookimpl
    def quantization_config(self, run: Run) -> BitsAndBytesConfig:
        return four_bits("fp4", double_quant=self.double_quant, run=run)

    @hookimpl
    def model_loaded(self, model: PreTrainedModel, run: Run) -> None:
        keep_weights(model)

    @hookimpl
    def check_environment(self) -> list[str]:
        return environment()


@plugin
class Int8:
    """8 bits a weight, outlying activations apart in 16 bits (Dettmers et al., 2022, arXiv 2208.07339)."""

    threshold: float = option(6.0, "Activations larger than this are multiplied in 16 bits; 0 turns that off.")

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"threshold must be at least 0, got {self.threshold:g}")

    @hookimpl
    def preflight(self, run: Run) -> list[str]:
        return obstacles(run, needs_capability=(7, 5))

    @hookimpl
    def plan_shape(self, shape: Shape, run: Run) -> Shape:
        return packed(shape, 8)

    @hookimpl
    def memory_use(self, shape: Shape, run: Run) -> dict[str, int]:
        return packing(shape, bits=8)

    @hookimpl
    def quantization_config(self, run: Run) -> BitsAndBytesConfig:
        from transformers import BitsAndBytesConfig

        quiet()
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=self.threshold)

    @hookimpl
    def check_environment(self) -> list[str]:
        return environment()


# --------------------------------------------------------------------------------------------------------------------
# Also used by ftx-qlora
# --------------------------------------------------------------------------------------------------------------------


def four_bits(kind: Literal["nf4", "fp4"], *, double_quant: bool, run: Run) -> BitsAndBytesConfig:
    """The configuration of a 4-bit base that computes in the run's dtype; the head stays as it is."""
    import torch
    from transformers import BitsAndBytesConfig

    quiet()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=run.dtype or torch.float32,
    )


def packed(shape: Shape, bits: Literal[4, 8]) -> Shape:
    """The shape of a base whose layers are packed."""
    return replace(shape, packed=bits)


def packing(shape: Shape, *, bits: Literal[4, 8], double_quant: bool = False) -> dict[str, int]:
    """Bytes that packing the layers' matrices saves, and what it takes to unpack one: bitsandbytes' blocks of 64 numbers with
    one scale in float32, or one byte and a float32 for 256 of those; in 8 bits a float32 scale a row."""
    numbers, matrices = shape.linear_parameters, shape.layers * len(shape.linears)
    if bits == 8:
        size = numbers + 4 * shape.layers * sum(outputs for _, outputs in shape.linears.values())
    else:
        blocks = numbers // 64
        scales = blocks + 4 * -(-blocks // 256) + (1024 + 4) * matrices if double_quant else 4 * blocks
        size = numbers // 2 + scales + 64 * matrices  # and the 16 values of each
    largest = max(inputs * outputs for inputs, outputs in shape.linears.values())
    # one is unpacked while the gradients of a layer's SwiGLU are not there yet: only what it takes beyond them counts
    beyond = max(0, shape.loaded * largest - shape.compute * shape.intermediate * shape.tokens)
    return {"weights": size - shape.loaded * numbers, "buffers": beyond}


def keep_weights(model: PreTrainedModel) -> None:
    """See to it that evaluation leaves 4-bit weights alone.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks every 4-bit weight at the first forward pass in eval mode, with
    scales rounded to bfloat16, and training goes on with those: an evaluation between two steps would change the model.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def obstacles(run: Run, *, needs_capability: tuple[int, int] = (6, 0)) -> list[str]:
    """Reasons why bitsandbytes cannot quantise for `run.device` here, found without importing it."""
    kind = "cuda" if run.device == "cuda" else "cpu"
    if not native_libraries(kind):
        return [f"the installed bitsandbytes has no library for {kind} on this platform: drop the quantizer, or use --adapter lora."]
    if run.device == "cuda":
        import torch

        found = torch.cuda.get_device_capability()
        if found < needs_capability:
            needed = ".".join(map(str, needs_capability))
            return [f"bitsandbytes needs a GPU of compute capability {needed} for this, here is {found[0]}.{found[1]}: drop the quantizer, or try nf4."]
    return []


def native_libraries(kind: Literal["cpu", "cuda"]) -> list[Path]:
    """The compiled libraries that the installed bitsandbytes brings for a kind of device; none if it is not installed."""
    spec = importlib.util.find_spec("bitsandbytes")
    places = list(spec.submodule_search_locations or []) if spec else []
    return sorted(file for place in places for file in Path(place).glob(f"libbitsandbytes_{kind}*"))


def environment() -> list[str]:
    """Lines for `ftx doctor`."""
    try:
        version = importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        return ["failure: bitsandbytes is not installed: pip install bitsandbytes"]
    brings = [kind for kind in ("cpu", "cuda") if native_libraries(kind)]
    if not brings:
        return [f"failure: bitsandbytes {version} has no compiled library for this platform"]
    return [f"ok: bitsandbytes {version} with libraries for {' and '.join(brings)}"]


def quiet() -> None:
    """Silence two lines of bitsandbytes: at import, that an optional CPU kernel (which we never use) is missing, and at
    every 8-bit product, that its input is cast to float16."""
    for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(name).setLevel(logging.ERROR)
