"""Batched generation over the model in hand: the one generator that every evaluator uses."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from ftx.encode import Messages, end_tokens, own_ends, prompt_text

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("ftx")

#: Prompts in one batch, and the most tokens (prompt and answer, padding included) that one batch may hold.
BATCH_ROWS, BATCH_TOKENS = 96, 16384
#: What generation keeps of a checkpoint's own settings.
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


class Generate:
    """`generate(prompts, max_new_tokens=...)` -> one answer a prompt, in the order asked.

    Prompts go in by length and padded on the left, what all of them begin with is read once, and a finished row makes room for
    the next prompt; an answer does not depend on its batch (fp32: token for token, lower precisions up to rounding). Models whose
    cache is no plain keys and values go through transformers' own loop, in batches. `model` and `tokenizer` are there for those who
    score likelihoods. `progress`, if set, is called with (done, total) as answers come; `around` gives a context manager in
    which the model runs; `say` is told of prompts that are longer than the model takes.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        progress: Callable[[int, int], None] | None = None,
        around: Callable[[], Any] = nullcontext,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.progress, self.around, self.say = progress, around, say

    def __call__(
        self, prompts: Sequence[str | Messages], *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0, stop: Sequence[str] = ()
    ) -> list[str]:
        """Answers without special tokens, cut before the first stop string. Greedy at temperature 0; else each item is
        sampled with its own seed, made from `seed` and its prompt."""
        texts = [prompt_text(prompt, self.tokenizer) for prompt in prompts]
        # a rendered template holds its own special tokens; plain text gets the tokenizer's, and an empty one something to start from
        start = next((i for i in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id) if i is not None), 0)
        ids = [self.tokenizer(text, add_special_tokens=isinstance(prompt, str))["input_ids"] or [start] for text, prompt in zip(texts, prompts, strict=True)]
        answers = [""] * len(texts)
        done = 0
        if not texts:
            return []
        stop = list(stop)
        room = context_length(self.model)
        if self.say and (long := sum(len(row) >= room for row in ids)):
            longest = max(map(len, ids))
            self.say(f"warning: {long} of {len(ids)} prompts leave no room to answer: the model takes {room} tokens, the longest prompt has {longest}")
        seeds = [_item_seed(seed, text) for text in texts] if temperature else None
        with evaluating(self.model), self.around():
            try:
                for i, answer in self._decoded(ids, max_new_tokens, temperature, seeds, stop):
                    answers[i] = answer
                    done += 1
                    if self.progress:
                        self.progress(done, len(texts))
                return answers
            except _unfit() as why:
                log.info("answers come from transformers' own loop: %s", why)
                done = 0
            for batch in _batches(ids, max_new_tokens):
                own = [seeds[i] for i in batch] if seeds is not None else None
                for i, answer in zip(batch, self._batch([ids[i] for i in batch], max_new_tokens, temperature, own, stop), strict=True):
                    answers[i] = answer
                done += len(batch)
                if self.progress:
                    self.progress(done, len(texts))
        return answers

    def _decoded(self, ids: list[list[int]], max_new_tokens: int, temperature: float, seeds: list[int] | None, stop: list[str]) -> Iterator[tuple[int, str]]:
        """(number, answer) as they are ready."""
        import torch

        from ftx.decode import Decoder

        def stopped(made: list[int]) -> bool:
            tail = self._text(made[-16 - max(map(len, stop)) :])  # a character is at least a token, and the whole is looked at only if it may be there
            return any(one in tail for one in stop) and any(one in self._text(made) for one in stop)

        decoder = Decoder(self.model, ends=self._ends(), most=max_new_tokens, temperature=temperature, stopped=stopped if stop else None)
        rows = max(1, min(BATCH_ROWS, BATCH_TOKENS // (max(map(len, ids)) + max_new_tokens)))
        with torch.inference_mode():
            for number, tokens in decoder.answers(ids, seeds, rows):
                yield number, _cut(self._text(tokens), stop)

    def _text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _batch(self, rows: list[list[int]], max_new_tokens: int, temperature: float, seeds: list[int] | None, stop: list[str]) -> list[str]:
        import torch

        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        device = next(self.model.parameters()).device
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        ends = self._ends()
        more: dict[str, Any] = {"stop_strings": stop, "tokenizer": self.tokenizer} if stop else {}
        if seeds is not None:
            more["logits_processor"] = [_Gumbel(seeds, temperature)]
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=sorted(ends),
                pad_token_id=pad,
                **more,
            )
        answers = [list(takewhile(lambda token: token not in ends, row)) for row in out[:, width:].tolist()]
        return [_cut(self._text(answer), stop) for answer in answers]

    def _ends(self) -> set[int]:
        return end_tokens(self.tokenizer) | own_ends(self.model)


class _Gumbel:
    """Sampling as an argmax: logits / temperature + Gumbel noise, drawn for each item from its own generator, so that an
    item's answer depends neither on its batch nor on its place in it (Gumbel, 1954)."""

    def __init__(self, seeds: list[int], temperature: float) -> None:
        import torch

        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature = temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import torch

        noise = torch.stack([torch.empty(scores.shape[-1]).exponential_(generator=one).log().neg() for one in self.generators])
        return scores.float() / self.temperature + noise.to(scores.device)


def context_length(model: Any) -> int:
    """Tokens that the model can look at, prompt and answer together; 2 ** 30 where its config does not say."""
    config = model.config.get_text_config() if hasattr(getattr(model, "config", None), "get_text_config") else getattr(model, "config", None)
    return int(getattr(config, "max_position_embeddings", None) or 1 << 30)


def _unfit() -> type[Exception]:
    from ftx.decode import Unfit

    return Unfit


def _item_seed(seed: int, text: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\0{text}".encode()).digest()[:7], "big")


def _batches(ids: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Row numbers by falling length (the largest batch first: it fails at once if it does not fit), in batches."""
    batches: list[list[int]] = []
    for i in sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i)):
        rows = max(1, min(BATCH_ROWS, BATCH_TOKENS // (len(ids[batches[-1][0]]) + max_new_tokens))) if batches else 0
        if batches and len(batches[-1]) < rows:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _cut(text: str, stop: Sequence[str]) -> str:
    ends = [at for at in (text.find(one) for one in stop) if at >= 0]
    return text[: min(ends)] if ends else text


@contextmanager
def evaluating(model: Any) -> Any:
    """Eval mode with the KV cache on and without the checkpoint's own generation settings (penalties, beams, forced
    tokens), which would bend the measurement; the model as it was afterwards. On a GPU without cuDNN's attention, which makes a plan for
    each new length of the cache, that is for each token."""
    import torch
    from transformers import GenerationConfig

    modes, config = [(module, module.training) for module in model.modules()], getattr(model, "config", None)
    cached, cudnn = getattr(config, "use_cache", None), torch.backends.cuda.cudnn_sdp_enabled()
    owners = [(module, own) for module, _ in modes if (own := vars(module).get("generation_config")) is not None]
    model.eval()
    for module, own in owners:
        module.generation_config = GenerationConfig(**{name: getattr(own, name, None) for name in SPECIAL_IDS})
    if config is not None:
        config.use_cache = True
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        for module, training in modes:
            module.training = training
        for module, own in owners:
            module.generation_config = own
        if config is not None:
            config.use_cache = cached
