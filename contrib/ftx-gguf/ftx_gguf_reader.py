"""Reading a GGUF file back: by llama.cpp where it is installed, else by transformers."""

from __future__ import annotations

import importlib
import importlib.metadata as metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftx.errors import RowError, RunError, first_line
from ftx.parity import ROUNDED, Reader, TransformersReader, loading_problems

if TYPE_CHECKING:
    import torch

    from ftx.encode import Messages

#: For weights of 8 bits: the least share of tokens that must agree, the largest difference of a logit.
COARSE = (0.95, 0.2)


def read_gguf(file: Path, *, rounded: bool = False) -> Reader:
    """What reads `file` here; `rounded`: it holds 8-bit weights. An installed llama.cpp that cannot be loaded is named."""
    bounds = COARSE if rounded else ROUNDED
    if not find_spec("llama_cpp"):
        return read_with_transformers(file, bounds)
    try:
        importlib.import_module("llama_cpp")
    except Exception as error:  # a library that is missing, or was built for another processor
        reader = read_with_transformers(file, bounds)
        reader.name += f" (the installed llama-cpp-python cannot be loaded: {first_line(error)})"
        return reader
    return LlamaReader(file, bounds)


class LlamaReader:
    """A GGUF file as llama.cpp reads it, on the CPU."""

    def __init__(self, file: Path, bounds: tuple[float, float] = ROUNDED) -> None:
        from gguf import GGUFReader

        self.file, self.bounds, self.name, self.problems = file, bounds, f"llama.cpp (llama-cpp-python {metadata.version('llama-cpp-python')})", []
        field = GGUFReader(file).fields.get("tokenizer.chat_template")
        self.template = field.contents() if field else None
        self.model: Any = None
        self._open(512)

    def _open(self, length: int) -> None:
        """Open the file with room for `length` tokens: a logit is kept for each."""
        from llama_cpp import Llama

        if self.model is not None and self.model.n_ctx() >= length:
            return
        if self.model is not None:
            self.model.close()
        try:
            self.model = Llama(str(self.file), n_ctx=-(-length // 256) * 256, n_batch=512, n_gpu_layers=0, logits_all=True, verbose=False, seed=0)
        except Exception as error:  # ValueError where llama.cpp refuses the file
            raise RunError(f"llama.cpp cannot load {self.file.name}: {first_line(error)}", "See why: llama-cli -m FILE") from error

    def render(self, prompt: str | Messages) -> str:
        if isinstance(prompt, str):
            return prompt
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        if self.template is None:
            raise RowError("the file has no chat template")
        ids = {kind: getattr(self.model, f"token_{kind}")() for kind in ("bos", "eos")}
        written = {kind: self.model._model.token_get_text(number) if number >= 0 else "" for kind, number in ids.items()}
        formatter = Jinja2ChatFormatter(self.template, eos_token=written["eos"], bos_token=written["bos"])
        return str(formatter(messages=prompt).prompt)  # type: ignore[arg-type]

    def encode(self, text: str, special: bool) -> list[int]:
        return list(self.model.tokenize(text.encode(), add_bos=special, special=True))

    def logits(self, ids: list[int]) -> torch.Tensor:
        import torch

        self._open(len(ids))
        self.model.reset()
        self.model.eval(ids)
        return torch.from_numpy(self.model.scores[: len(ids)].copy()).float()

    def answers(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        self._open(max(map(len, prompts)) + max_new_tokens)
        found, ends = [], self.ends()
        for ids in prompts:
            self.model.reset()
            self.model.eval(ids)
            answer: list[int] = []
            while len(answer) < max_new_tokens:
                token = int(self.model.scores[self.model.n_tokens - 1].argmax())
                answer.append(token)
                if token in ends:
                    break
                self.model.eval([token])
            found.append(answer)
        return found

    def ends(self) -> set[int]:
        from llama_cpp import llama_cpp as library

        vocabulary = library.llama_model_get_vocab(self.model._model.model)
        return {token for token in range(self.model.n_vocab()) if library.llama_vocab_is_eog(vocabulary, token)}


def read_with_transformers(file: Path, bounds: tuple[float, float] = ROUNDED) -> TransformersReader:
    """The file through transformers' `gguf_file=`, dequantised to float32."""
    import contextlib
    import io

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ftx.models import mend_tokenizer

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the bar of the GGUF reader cannot be switched off
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
            model, info = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32, output_loading_info=True)
    except Exception as error:
        raise RunError(f"transformers cannot load {file.name}: {first_line(error)}", "See it all with --traceback.") from error
    mend_tokenizer(tokenizer, file, model.config)
    name = f"transformers {metadata.version('transformers')}"
    return TransformersReader(model.eval(), tokenizer, name=name, problems=loading_problems(info), bounds=bounds)
