"""Whether two models say the same: a probe, what the run answers to it, and what reads an export back."""

from __future__ import annotations

import importlib.metadata as metadata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ftx.encode import Messages, end_tokens, own_ends, prompt_text, question_and_reference, tools_apart
from ftx.errors import FtxError, RowError, RunError, first_line
from ftx.generate import evaluating

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

#: How many tokens of each answer are compared, and how many prompts are answered at once.
ANSWER_TOKENS, BATCH_ROWS = 48, 16
#: The least share of tokens that must agree and the largest difference of a centred logit, as a share of the largest logit: in
#: float32, and wherever weights or products are rounded.
EXACT, ROUNDED = (1.0, 1e-3), (0.98, 0.1)
#: Texts that tokenizers tell apart: digits, runs of spaces, line ends, case, marks, scripts, emoji, end of a turn.
TEXTS = (
    "a  12345  b 1,000.50 x86-64 2026-11-25",
    "if x:\n\treturn  y\n\n\n    # don't stop: it's 3'000 we'll see\r\n",
    "Größe, naïve, Ångström, ÉCOLE, Straße; déjà vu",
    "日本語のテキスト 한국어 текст на русском اللغة العربية हिन्दी",
    "emoji 👩‍👩‍👧 🇩🇪 e\u0301 \u00a0\u2003\u200b end",
    '{"name": "Tea", "price": 3.50, "tags": ["a", "b"]} <b>&amp;</b> $x^2$',
    "Hello, World!  ... ???  snake_case CamelCase ALLCAPS",
)
#: Conversations that every template must render as the run's does; those that the run's own refuses are left out.
CONVERSATIONS: tuple[Messages, ...] = (
    [{"role": "user", "content": "What is 2 + 2?"}],
    [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": 'Grün oder\n\nblau, {{ 1 }} or "2"?'}],
    [{"role": "user", "content": "One"}, {"role": "assistant", "content": "Two  2"}, {"role": "user", "content": "Three"}],
)


class Reader(Protocol):
    """What an export is read by. `name` says which program; `problems` what it lacks, or holds and does not use; `bounds`
    the least share of agreeing tokens and the largest difference of a centred logit, as a share of the largest logit."""

    name: str
    problems: list[str]
    bounds: tuple[float, float]

    def render(self, prompt: str | Messages) -> str:
        """A prompt by the export's own chat template, with the generation prompt; a string as it is."""

    def encode(self, text: str, special: bool) -> list[int]:
        """Token ids by the export's own tokenizer; `special`: with the tokens that it puts around a plain text."""

    def logits(self, ids: list[int]) -> torch.Tensor:
        """What the model says behind each of the tokens: (length, vocabulary), float32, on the CPU."""

    def answers(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy answers as token ids, up to and with the token at which the export by itself stops."""

    def ends(self) -> set[int]:
        """The tokens at which the export by itself stops."""


class TransformersReader:
    """A model and a tokenizer of transformers (or peft) as a Reader."""

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, *, name: str, problems: Sequence[str] = (), bounds: tuple[float, float] | None = None
    ) -> None:
        import torch

        self.model, self.tokenizer, self.name, self.problems = model, tokenizer, name, list(problems)
        exact = all(p.dtype == torch.float32 for p in model.parameters()) and not getattr(model, "is_quantized", False)
        self.bounds = bounds or (EXACT if exact else ROUNDED)

    def render(self, prompt: str | Messages) -> str:
        return prompt_text(prompt, self.tokenizer)

    def encode(self, text: str, special: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def logits(self, ids: list[int]) -> torch.Tensor:
        import torch

        with torch.inference_mode(), evaluating(self.model):
            tokens = torch.tensor([ids], device=next(self.model.parameters()).device)
            said: torch.Tensor = self.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0].float().cpu()
        return said

    def answers(self, prompts: list[list[int]], max_new_tokens: int, ends: Iterable[int] | None = None) -> list[list[int]]:
        """`ends`: other tokens to stop at than the model's own configuration names."""
        import torch

        stops = set(ends) if ends is not None else self.ends()
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        device = next(self.model.parameters()).device
        found: list[list[int]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        with torch.inference_mode(), evaluating(self.model):
            for rows in (order[at : at + BATCH_ROWS] for at in range(0, len(order), BATCH_ROWS)):
                width = len(prompts[rows[0]])
                ids = torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in rows], device=device)
                mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in rows], device=device)
                out = self.model.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=sorted(stops) or None, pad_token_id=pad
                )
                for i, answer in zip(rows, out[:, width:].tolist(), strict=True):
                    end = next((at for at, token in enumerate(answer) if token in stops), len(answer))
                    found[i] = answer[: end + 1]
        return found

    def ends(self) -> set[int]:
        return own_ends(self.model)


def read_with_transformers(path: Path, run: Any) -> TransformersReader:
    """The model directory `path`, loaded as anybody would: through transformers' own from_pretrained."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        model, info = AutoModelForCausalLM.from_pretrained(
            str(path), dtype="auto", device_map={"": run.device}, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:
        raise RunError(f"transformers cannot load what was exported: {first_line(error)}", "See it all with --traceback.") from error
    as_written(model, run)
    return TransformersReader(model.eval(), tokenizer, name=f"transformers {metadata.version('transformers')}", problems=loading_problems(info))


def as_written(model: Any, run: Any) -> None:
    """See to it that what a plugin does to a quantised model of the run is done to one that is read back: else it is not the weights that
    are compared (on a CPU with AVX-512-BF16 bitsandbytes would round their scales)."""
    if getattr(model, "is_quantized", False) and run.hooks is not None:
        run.hooks.hook.model_loaded(model=model, run=run)


def loading_problems(info: dict[str, Any]) -> list[str]:
    """transformers' loading info as a Reader's `problems`."""
    named = {"missing_keys": "lacks", "unexpected_keys": "holds, and nothing uses,", "mismatched_keys": "holds in another shape", "error_msgs": "cannot read"}
    return [f"it {words} {len(info[key])} weights, such as {min(map(str, info[key]))}" for key, words in named.items() if info.get(key)]


# --------------------------------------------------------------------------------------------------------------------
# The probe
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Probe:
    """Prompts, and what the run makes of them: its text, its tokens, its greedy answer with the token that ended it, and its
    logits (answer's length, vocabulary) at each token of the answer. `ends`: the tokens at which it stops."""

    prompts: list[str | Messages]
    texts: list[str]
    ids: list[list[int]]
    answers: list[list[int]] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    ends: set[int] = field(default_factory=set)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.answers))


@dataclass(frozen=True)
class Agreement:
    """How far a model says what the run says, on the run's own answers, token by token behind equal beginnings.

    `tokens` of `total` tokens agree; differences are of raw logits, over the whole vocabulary, but for `largest_centred`: of
    logits less their mean at each token, for a softmax does not see what all of them share (a merge rounded to bfloat16 shifts
    SmolLM2-135M's by 0.6 on average, and a centred one by 0.15); `prompt` and `position` tell where the first token differs.
    """

    tokens: int
    total: int
    largest_difference: float
    largest_centred: float
    mean_difference: float
    largest_logit: float
    prompt: int | None = None
    position: int | None = None

    @property
    def share(self) -> float:
        return self.tokens / self.total

    def as_dict(self) -> dict[str, Any]:
        return {"token_agreement": round(self.share, 6), **asdict(self)}

    def __str__(self) -> str:
        return (
            f"{self.tokens} of {self.total} tokens agree ({self.share:.2%}), "
            f"largest logit difference {self.largest_difference:.2g} (the largest logit is {self.largest_logit:.3g})"
        )


def questions(rows: Dataset, count: int) -> list[str | Messages]:
    """The first `count` different prompts of formatted rows; of plain text the first half of each."""
    found: dict[str, str | Messages] = {}
    for row in rows:
        try:
            prompt = question_and_reference(row)[0]
        except RowError:
            prompt = row.get("text", "")[: len(row.get("text", "")) // 2]
        prompt = tools_apart(prompt)[0]  # not every form of an export has a place for them
        if prompt:
            found.setdefault(repr(prompt), prompt)
        if len(found) == count:
            break
    return list(found.values())


def ask(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[str | Messages]) -> Probe:
    """The run's answers to the prompts, and its logits at them. A prompt that its template refuses is left out."""
    reader = TransformersReader(model, tokenizer, name="the run")
    probe = Probe([], [], [])
    for prompt in prompts:
        try:
            text = reader.render(prompt)
        except RowError:
            continue
        ids = reader.encode(text, isinstance(prompt, str))
        if ids:
            probe.prompts.append(prompt)
            probe.texts.append(text)
            probe.ids.append(ids)
    if not probe.ids:
        raise FtxError("no prompt is left to check the export with.", "Give data with prompts: --eval-data FILE")
    probe.ends = reader.ends() | end_tokens(tokenizer)
    probe.answers = reader.answers(probe.ids, ANSWER_TOKENS, probe.ends)
    probe.logits = [_at_answer(reader, ids, answer) for ids, answer in zip(probe.ids, probe.answers, strict=True)]
    return probe


def agreement(reader: Reader, probe: Probe) -> Agreement:
    """How far `reader` says what the run says, at each token of the run's answers."""
    same, largest, centred, total, logit = 0, 0.0, 0.0, 0.0, 0.0
    first: tuple[int, int] | None = None
    for number, (ids, answer, wanted) in enumerate(zip(probe.ids, probe.answers, probe.logits, strict=True)):
        found = _at_answer(reader, ids, answer)
        if found.shape != wanted.shape:
            raise RunError(f"the export has a vocabulary of {found.shape[-1]} tokens, the run one of {wanted.shape[-1]}.", "It is not this run's model.")
        if not bool(found.isfinite().all()):
            raise RunError("the export gives logits that are not numbers.", "Export in another precision: --dtype float32")
        equal = found.argmax(-1) == wanted.argmax(-1)
        same += int(equal.sum())
        if first is None and not bool(equal.all()):
            first = number, int((~equal).nonzero()[0])
        difference = found - wanted
        centred = max(centred, float((difference - difference.mean(-1, keepdim=True)).abs().max()))
        difference = difference.abs()
        largest, total, logit = max(largest, float(difference.max())), total + float(difference.mean(-1).sum()), max(logit, float(wanted.abs().max()))
    return Agreement(same, probe.tokens, largest, centred, total / probe.tokens, logit, *(first or (None, None)))


def check_text(reader: Reader, probe: Probe, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int, list[str]]:
    """Chat template and tokenizer of the export against the run's: how many renderings and texts were compared, and what
    differs."""
    wrong: list[str] = []
    renderings = dict(enumerate(zip(probe.prompts, probe.texts, strict=True)))
    if tokenizer.chat_template:
        for conversation in CONVERSATIONS:
            try:
                renderings[len(renderings)] = conversation, prompt_text(conversation, tokenizer)
            except RowError:
                continue
    for prompt, wanted in renderings.values():
        try:
            found = reader.render(prompt)
        except RowError as error:
            found = f"[{error}]"
        if found != wanted:
            wrong.append(f"the chat template gives {_around(found, wanted)} where the run's gives {_around(wanted, found)}")
    texts = [(text, False) for _, text in renderings.values()] + [(text, special) for text in TEXTS for special in (False, True)]
    for text, special in texts:
        found_ids, wanted_ids = reader.encode(text, special), list(tokenizer(text, add_special_tokens=special)["input_ids"])
        if found_ids != wanted_ids:
            at = next((i for i, (a, b) in enumerate(zip(found_ids, wanted_ids, strict=False)) if a != b), min(len(found_ids), len(wanted_ids)))
            wrong.append(f"the tokenizer reads {tokenizer.decode(wanted_ids[max(0, at - 2) : at + 4])!r} as other tokens than the run's")
    return len(renderings), len(texts), wrong


def check_ends(reader: Reader, probe: Probe, tokenizer: PreTrainedTokenizerBase) -> tuple[int, list[str]]:
    """How many of the answers that the export gives by itself are the run's, and what is wrong with how they end."""
    answers, elsewhere = reader.answers(probe.ids, ANSWER_TOKENS), 0
    for found, wanted in zip(answers, probe.answers, strict=True):
        shorter = min(len(found), len(wanted))
        elsewhere += len(found) != len(wanted) and found[:shorter] == wanted[:shorter]
    equal = sum(found == wanted for found, wanted in zip(answers, probe.answers, strict=True))
    wrong = [f"{elsewhere} answers end where the run's do not"] if elsewhere else []
    if missing := probe.ends - reader.ends():
        wrong.append(f"it does not stop at {', '.join(sorted(map(str, tokenizer.convert_ids_to_tokens(list(missing)))))}, where the run does")
    return equal, wrong


def _at_answer(reader: Reader, ids: list[int], answer: list[int]) -> torch.Tensor:
    return reader.logits(ids + answer[:-1])[len(ids) - 1 :]


def _around(text: str, other: str) -> str:
    """The piece of `text` around the first difference, quoted."""
    at = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    return repr(text[max(0, at - 20) : at + 20])
