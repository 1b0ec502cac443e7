"""The exporter `gguf`: the tuned model as one file for llama.cpp."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from ftx import hookimpl, option, plugin
from ftx.encode import end_tokens, own_ends
from ftx.errors import RunError
from ftx.export import Exported

if TYPE_CHECKING:
    import numpy
    import torch
    from gguf import GGUFWriter
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from ftx import Run
    from ftx.parity import Reader

#: transformers' model type -> the name of the architecture in the gguf library.
ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2"}
#: Rules by which a byte-level tokenizer cuts a text before it merges -> llama.cpp's name for them.
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    ("digits", "bytes by words"): "smollm",
    ("bytes by words",): "gpt-2",
    (LLAMA3, "bytes"): "llama-bpe",
    (LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"), "bytes"): "qwen2",
}
LOAD = """```sh
llama-cli -m {name} -cnv            # llama.cpp
```

```python
from llama_cpp import Llama          # llama-cpp-python

model = Llama("{name}", n_ctx=2048)
print(model.create_chat_completion([{{"role": "user", "content": "..."}}], temperature=0))
```
"""


@plugin
class GGUF:
    """One file for llama.cpp and what builds on it (Ollama, LM Studio), for models of Llama's shape. Merged in float32, and
    rounded once."""

    type: Literal["f32", "f16", "bf16", "q8_0"] = option("f16", "How weights are stored: 32, 16, 16 or 8.5 bits each; norms and biases keep 32.")
    pre: str | None = option(None, "llama.cpp's name for the tokenizer's rules, where they are none that ftx knows.")

    @hookimpl
    def exported_form(self, model: Any, run: Run) -> Any:
        return merged_in_float32(model, run)

    @hookimpl
    def export_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, run: Run) -> Exported:
        file = write_gguf(model, tokenizer, path / f"{file_stem(run)}-{self.type}.gguf", self.type, self.pre)
        return Exported(f"a GGUF file in {self.type}", LOAD.format(name=file.name))

    @hookimpl
    def read_exported(self, path: Path, run: Run) -> Reader:
        from ftx_gguf_reader import read_gguf

        return read_gguf(next(iter(sorted(path.glob("*.gguf")))), rounded=self.type == "q8_0")

    @hookimpl
    def check_environment(self) -> list[str]:
        from importlib.util import find_spec

        if find_spec("llama_cpp"):
            return ["ok: GGUF exports are read back by llama.cpp"]
        return ["ok: GGUF exports are read back by transformers; by llama.cpp after pip install llama-cpp-python"]


def file_stem(run: Run) -> str:
    """A file name from the run's."""
    name = run.directory.path.name if run.directory else "model"
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def merged_in_float32(model: Any, run: Run) -> Any:
    """The tuned model as a plain one whose weights were never rounded after the merge."""
    import torch

    assert run.hooks is not None
    if not run.hooks.owners("quantization_config"):
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
    return run.hooks.call("merge_adapted", model=model, run=replace(run, dtype=torch.float32))


def write_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path, kind: str, pre: str | None = None) -> Path:
    """Write a plain model as GGUF; RunError for what the file or llama.cpp cannot hold. The model is left as it was."""
    import gguf

    config = model.config
    if config.model_type not in ARCHITECTURES:
        raise RunError(f"a model of type '{config.model_type}' cannot be written as GGUF here.", f"Those that can: {', '.join(ARCHITECTURES)}. Or: --to merged")
    architecture = gguf.MODEL_ARCH[ARCHITECTURES[config.model_type]]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    try:
        _write_shape(writer, config, file.stem, kind)
        _write_tokenizer(writer, tokenizer, model, pre)
        names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
        tensors = dict(_tensors(model, names))
        for name, tensor in tensors.items():
            stored = _stored(name, tensor, kind)
            shape, element, size = _layout(tensor, stored)
            writer.add_tensor_info(name, shape, element, size, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors.items():
            writer.write_tensor_data(_rounded(name, tensor, _stored(name, tensor, kind)))
    finally:
        writer.close()
    return file


# --------------------------------------------------------------------------------------------------------------------
# Shape and weights
# --------------------------------------------------------------------------------------------------------------------


def _write_shape(writer: GGUFWriter, config: PretrainedConfig, name: str, kind: str) -> None:
    import gguf

    heads, head_size = config.num_attention_heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if getattr(config, "hidden_act", "silu") != "silu":
        raise RunError(f"llama.cpp computes SiLU in models of this kind, this one has {config.hidden_act}.", "Export it otherwise: --to merged")
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(
        {
            "f32": gguf.LlamaFileType.ALL_F32,
            "f16": gguf.LlamaFileType.MOSTLY_F16,
            "bf16": gguf.LlamaFileType.MOSTLY_BF16,
            "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
        }[kind]
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_size)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise RunError("llama.cpp computes no sliding window in models of this kind.", "Export it otherwise: --to merged")
    rope = config.rope_parameters
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    kind_of_rope = rope.get("rope_type", "default")
    if kind_of_rope == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind_of_rope not in ("default", "llama3"):
        raise RunError(f"rotary embeddings of type '{kind_of_rope}' cannot be written as GGUF here.", "Export it otherwise: --to merged")


def _tensors(model: PreTrainedModel, names: gguf.TensorNameMap) -> Any:  # noqa: F821
    """(name in the file, tensor) in the file's order; tied weights stand there once. Query and key rows are laid out as
    llama.cpp's rotary embedding wants them."""
    config = model.config
    heads, key_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    seen: set[int] = set()
    for key, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.data_ptr() in seen:
            continue
        seen.add(parameter.data_ptr())
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise RunError(f"GGUF has no place for the weight {key}.", "Export it otherwise: --to merged")
        tensor = parameter.detach()
        if config.model_type in ("llama", "mistral") and re.search(r"\.(q|k)_proj\.", key):
            tensor = _interleaved(tensor, heads if ".q_proj." in key else key_heads)
        yield name, tensor
    if config.rope_parameters.get("rope_type") == "llama3":
        yield "rope_freqs.weight", _rope_factors(config)


def _interleaved(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """transformers turns the pairs (i, i + half) of a head, llama.cpp the pairs (2i, 2i + 1)."""
    return tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _rope_factors(config: PretrainedConfig) -> torch.Tensor:
    """By what llama.cpp is to divide each rotary frequency: transformers' own plain ones over its scaled ones."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, size, 2).float() / size)
    return plain / scaled


def _stored(name: str, tensor: torch.Tensor, kind: str) -> Any:
    import gguf

    if kind == "f32" or tensor.dim() == 1:
        return gguf.GGMLQuantizationType.F32
    if kind == "q8_0" and tensor.shape[-1] % 32:
        return gguf.GGMLQuantizationType.F16  # as llama.cpp's own converter: a row must be whole blocks of 32
    return gguf.GGMLQuantizationType[kind.upper()]


def _layout(tensor: torch.Tensor, stored: Any) -> tuple[tuple[int, ...], Any, int]:
    """Shape, element type and bytes of a tensor as it stands in the file: of packed ones the shape in bytes."""
    import gguf
    import numpy

    block, size = gguf.GGML_QUANT_SIZES[stored]
    plain = {gguf.GGMLQuantizationType.F32: numpy.float32, gguf.GGMLQuantizationType.F16: numpy.float16}
    shape = tuple(tensor.shape)
    if stored not in plain:
        shape = tuple(gguf.quant_shape_to_byte_shape(shape, stored))
    return shape, numpy.dtype(plain.get(stored, numpy.uint8)), tensor.numel() // block * size


def _rounded(name: str, tensor: torch.Tensor, stored: Any) -> numpy.ndarray[Any, Any]:
    """The numbers as they stand in the file; RunError where one is too large for 16 bits."""
    import gguf
    import numpy

    exact = tensor.float().cpu().contiguous().numpy()
    with numpy.errstate(over="ignore"):
        rounded: numpy.ndarray[Any, Any] = gguf.quants.quantize(exact, stored)
    if stored == gguf.GGMLQuantizationType.F16 and not numpy.isfinite(rounded).all():
        raise RunError(f"a number in {name} is too large for float16.", "Give -o exporter.type=bf16")
    return rounded


# --------------------------------------------------------------------------------------------------------------------
# Tokenizer
# --------------------------------------------------------------------------------------------------------------------


def _write_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, pre: str | None) -> None:
    """Tokens, merges, special tokens and chat template, through the gguf library's own reading of the tokenizer's files."""
    import gguf

    with TemporaryDirectory(prefix="ftx-gguf-") as scratch:
        tokenizer.save_pretrained(scratch)
        about = json.loads((Path(scratch) / "tokenizer.json").read_text("utf-8"))
        rules = pre or pre_tokenizer(about)
        special = gguf.SpecialVocab(scratch, load_merges=True, n_vocab=model.config.vocab_size)
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    size = model.get_input_embeddings().weight.shape[0]
    if max(tokens) >= size:
        raise RunError(f"the tokenizer has {max(tokens) + 1} tokens and the model {size}.", "Resize its embeddings before training.")
    kinds = []
    for number in range(size):
        if number not in tokens:
            kinds.append(gguf.TokenType.UNUSED)
        elif number in added:
            kinds.append(gguf.TokenType.CONTROL if added[number].special else gguf.TokenType.USER_DEFINED)
        else:
            kinds.append(gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rules)
    writer.add_token_list([tokens.get(number, f"[PAD{number}]") for number in range(size)])
    writer.add_token_types(kinds)
    special.special_token_ids |= {kind: number for kind in ("bos", "eos", "unk", "pad") if (number := getattr(tokenizer, f"{kind}_token_id", None)) is not None}
    plain = list(tokenizer("a")["input_ids"])
    special.add_special_token = {
        "bos": bool(plain) and plain[0] == tokenizer.bos_token_id,
        "eos": bool(plain) and plain[-1] == tokenizer.eos_token_id,
    }
    template = tokenizer.chat_template
    special.chat_template = template.get("default") if isinstance(template, dict) else template
    special.add_to_gguf(writer, quiet=True)
    ends = (own_ends(model) | end_tokens(tokenizer)) - {tokenizer.eos_token_id}
    # llama.cpp has one name for each kind of end beside the end of a text
    for number, add in zip(sorted(ends), (writer.add_eot_token_id, writer.add_eom_token_id), strict=False):
        add(number)


def pre_tokenizer(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for the rules of a tokenizer.json; RunError for a tokenizer that is no byte-level BPE, and for rules
    that have no name here: with wrong ones the model would read other tokens than it was trained on."""
    if tokenizer["model"].get("type") != "BPE" or tokenizer["model"].get("byte_fallback"):
        raise RunError("the model's tokenizer is no byte-level BPE, which is the only kind written as GGUF here.", "Export it otherwise: --to merged")
    steps = tokenizer.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    rules = PRE_TOKENIZERS.get(tuple(_rule(step) for step in steps))
    if rules is None:
        raise RunError(
            f"how the model's tokenizer cuts a text has no name in llama.cpp that ftx knows ({', '.join(_rule(step) for step in steps)[:200]}).",
            "If you know it: -o exporter.pre=NAME; its tokens are compared with the run's.",
        )
    return rules


def _rule(step: dict[str, Any]) -> str:
    kind = step.get("type")
    if kind == "Digits" and step.get("individual_digits"):
        return "digits"
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "bytes by words" if step.get("use_regex", True) else "bytes"
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return str(step["pattern"].get("Regex"))
    return json.dumps(step)
