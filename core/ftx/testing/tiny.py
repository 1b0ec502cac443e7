"""A tiny random Llama and its tokenizer: for unit tests only, built in a moment with no network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


#: Merges of `tiny_tokenizer(merges=True)`, first to last ("Ġ" is a space).
MERGES = [("t", "h"), ("th", "e"), ("i", "n"), ("a", "n"), ("e", "r"), ("r", "e"), ("Ġ", "the"), ("Ġ", "a"), ("Ġ", "Ġ"), ("in", "g"), ("1", "2"), ("Ġ", "1")]


def tiny_tokenizer(*, merges: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level, one token a byte; ChatML template; `<|im_end|>` ends a turn and a text.

    With `merges` it cuts digits apart, as SmolLM2's does, and has a few tokens of several bytes: what exporters must keep.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    pairs = MERGES if merges else []
    vocabulary |= {left + right: len(vocabulary) + i for i, (left, right) in enumerate(pairs)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_bytes]) if merges else by_bytes
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", bos_token="<|im_start|>", eos_token="<|im_end|>")
    fast.chat_template = CHATML
    return fast


def tiny_model(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """Two layers, 32 wide, 4 query and 2 key heads, fp32, eager to train; `overrides` go into its LlamaConfig."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        # wide enough that random logits differ clearly from one another
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**(shape | overrides)))


def tiny_model_dir(path: str | Path, seed: int = 0, *, merges: bool = False, **overrides: Any) -> Path:
    """Write the tiny model and its tokenizer as a model directory that `--model` takes."""
    tokenizer = tiny_tokenizer(merges=merges)
    tiny_model(seed, **({"vocab_size": len(tokenizer)} | overrides)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return Path(path)
