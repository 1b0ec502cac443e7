"""A finished run's base and tuned model in hand: answers piece by piece, and answers to a file of prompts."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ftx import models, pipeline
from ftx.catalogue import Catalogue
from ftx.console import Console
from ftx.data import read_dataset
from ftx.encode import Messages, end_tokens, own_ends, prompt_text, question_and_reference, tools_onto
from ftx.errors import DataError, ModelError, RecipeError, RowError
from ftx.generate import context_length
from ftx.prepare import check_rows
from ftx.readback import recipe_of, reopen
from ftx.recipe import Choice, merge, read_recipe
from ftx.run import RunDir, write_lines

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

#: What cut an answer; None where it came to its end.
Cut = Literal["max_new_tokens", "context"] | None
#: Columns of answers by the names in use; a formatter's options that name one are called so too, with `_column` behind.
ANSWERS = ("completion", "response", "answer", "output", "chosen", "rejected")


class Voices:
    """A run's base and tuned model over one set of weights.

    The base is the tuned model with its adapter off (`adapter_off`). Where the adapter has overwritten the base there is
    none, unless it is loaded beside it (`second`: twice the memory) or alone (`only="base"`). `recipe` holds values that
    stand over the run's own recipe: `formatter`, `device`, `dtype`.
    """

    def __init__(
        self,
        path: str,
        catalogue: Catalogue,
        console: Console,
        *,
        only: str | None = None,
        second: bool = False,
        assignments: tuple[str, ...] = (),
        **recipe: Any,
    ) -> None:
        directory = RunDir(path)
        recipe_of(directory)
        if not pipeline.finished_training(directory):
            raise RecipeError(f"{directory} has no trained model yet.", f"Go on with it: ftx resume {path}")
        self.path = path
        wanted = merge(read_recipe(directory.recipe), recipe, assignments)
        self.run, self.hooks = reopen(directory, replace(wanted, evaluators=(), observers=()), catalogue, console)
        pipeline.preflight(self.hooks, self.run)
        self.tokenizer: Any = models.load_tokenizer(directory.model, code=self.run.recipe.trusts_model)
        base = pipeline.load_base(self.hooks, catalogue, self.run)
        self._loaded: dict[str, Any] = {"base": base}
        if only != "base":
            self._loaded = {"tuned": self.hooks.call("load_adapted", base=base, path=directory.model, run=self.run)}
            if second and self._off() is None:
                self._loaded["base"] = pipeline.load_base(self.hooks, catalogue, self.run)

    def _off(self) -> AbstractContextManager[Any] | None:
        """A context in which the tuned model is the base; None if the adapter has none."""
        off: AbstractContextManager[Any] | None = None
        if "tuned" in self._loaded:
            off = self.hooks.hook.adapter_off(model=self._loaded["tuned"], run=self.run)
        return off

    def model(self, phase: str) -> tuple[Any, AbstractContextManager[Any]]:
        """The model of a phase, and the context in which it is that. ModelError, with a way out, where it is not in memory."""
        if phase in self._loaded:
            return self._loaded[phase], nullcontext()
        if phase == "tuned":
            raise ModelError("only the base is loaded.", f"Start without --base: ftx chat {self.path}")
        off = self._off()
        if off is None:
            name = self.run.recipe.adapter.name if self.run.recipe.adapter else "none"
            raise ModelError(
                f"adapter '{name}' keeps no base beside the tuned model.",
                f"ftx chat {self.path} --second loads the base as a second model, --base loads it alone.",
            )
        return self._loaded["tuned"], off

    def answer(self, phase: str, prompt: str | Messages, *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0) -> Generator[str, None, Cut]:
        """The answer to a conversation in pieces, as they come; at its end, what cut it."""
        model, context = self.model(phase)
        with context:
            return (yield from stream(model, self.tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed))


def newest_run(folder: Path = Path("runs")) -> str:
    """The run under `folder` whose model was saved last: what a person means who names none. RecipeError if there is none."""
    found = [one for one in folder.glob("*") if pipeline.finished_training(RunDir(one))]
    if not found:
        raise RecipeError(f"no run with a trained model lies in {folder}/.", "Give the directory that `ftx run` printed.")
    return str(max(found, key=lambda one: (one / "model").stat().st_mtime))


def stream(model: Any, tokenizer: Any, prompt: str | Messages, *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0) -> Generator[str, None, Cut]:
    """One answer piece by piece, greedy at temperature 0: then it is what `Generate` gives, token for token.

    Its end says what cut it: `max_new_tokens`, the end of the model's context, or nothing. A loop of its own, because transformers' streamers hold text back
    to the next space, and its `generate` goes by a checkpoint's own penalties. Above temperature 0 tokens are drawn with
    `seed`; no global random state is touched. RowError where the prompt leaves the model no room to answer.
    """
    import torch

    ids = tokenizer(prompt_text(prompt, tokenizer), add_special_tokens=isinstance(prompt, str))["input_ids"]
    room = context_length(model) - len(ids)
    if room < 1:
        raise RowError(f"the conversation has {len(ids)} tokens, and the model takes {context_length(model)}")
    start = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), 0)
    ends = end_tokens(tokenizer) | own_ends(model)
    random = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    given, cache = torch.tensor([ids or [start]], device=device), None
    answer: list[int] = []
    text = said = ""
    while len(answer) < min(max_new_tokens, room):
        with torch.inference_mode():  # a token at a time: whoever reads the pieces must not be inside it
            out = model(input_ids=given, past_key_values=cache, use_cache=True)
            token = _pick(out.logits[0, -1], temperature, random)
            cache, given = out.past_key_values, torch.tensor([[token]], device=device)
        if token in ends:
            break
        answer.append(token)
        text = str(tokenizer.decode(answer, skip_special_tokens=True))
        whole = text.rstrip("\N{REPLACEMENT CHARACTER}")  # it may be the first bytes of a character of several
        if len(whole) > len(said):
            yield whole[len(said) :]
            said = whole
    if len(text) > len(said):
        yield text[len(said) :]
    return None if len(answer) < min(max_new_tokens, room) else "context" if room < max_new_tokens else "max_new_tokens"


def _pick(logits: torch.Tensor, temperature: float, random: torch.Generator) -> int:
    import torch

    if not temperature:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits.float().cpu() / temperature, -1), 1, generator=random))


def answer_file(
    voices: Voices,
    phase: str,
    data: str,
    output: Path,
    console: Console,
    *,
    raw: bool = False,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Answers to every row of a file as JSON lines, written whole or not at all; what was done.

    A line has `prompt`, `answer`, the row's own answer as `reference` where it has one, `phase`, and `file` and `line` of
    the row. Rows are read by the run's formatter; rows that have no answer may hold `prompt` or `messages` alone.
    """
    run = voices.run
    asked = list(_asked(read_dataset(data, run.ledger), voices, raw))[:limit]
    model, context = voices.model(phase)
    with context:
        answers = pipeline.generator(model, voices.tokenizer, console)(
            [one["prompt"] for one in asked], max_new_tokens=max_new_tokens, temperature=temperature, seed=run.seed if seed is None else seed
        )
    write_lines(output, [{"prompt": one.pop("prompt"), "answer": answer, **one, "phase": phase} for one, answer in zip(asked, answers, strict=True)])
    if run.ledger.entries:
        write_lines(output.with_name(f"{output.name}.ledger.jsonl"), run.ledger.as_rows())
        run.say(f"{len(run.ledger.entries)} rows were not used as they came: see {output.name}.ledger.jsonl")
    return {"output": str(output), "answers": len(asked), "phase": phase}


def _asked(rows: Dataset, voices: Voices, raw: bool) -> Iterator[dict[str, Any]]:
    """Prompts, references and where they came from."""
    columns = set(rows.column_names)
    alone = next((name for name in ("messages", "prompt") if name in columns), None)
    try:
        formatted = voices.hooks.call("format_dataset", dataset=rows, run=voices.run)
        check_rows(rows, formatted, "formatter", voices.hooks, voices.run)
    except DataError as error:
        if alone is None:
            raise DataError(error.problem, f"{error.remedy}\nPrompts without answers stand in a column called prompt, or messages.") from error
        if _answered(rows, voices.run.recipe.formatter):
            raise DataError(error.problem, f"{error.remedy}\nPrompts are taken alone only where no row has an answer: else leave its column out.") from error
        voices.run.say(f"no row has an answer that the formatter reads: column '{alone}' is asked as it stands")
        formatted = None
    for row in rows if formatted is None else formatted:
        source = {"file": row.pop("_file", "row"), "line": row.pop("_line", 0)}
        try:
            yield {**(_question(row, str(alone), voices.tokenizer, raw) if formatted is None else _formatted(row)), **source}
        except RowError as error:
            raise DataError(f"{source['file']}:{source['line']}: {error}.", "Give rows that ask something.") from error


def _answered(rows: Dataset, formatter: Choice | None) -> bool:
    """Whether a row holds an answer: in a column that the formatter reads one from, in one of the usual names, or as the last message."""
    from ftx.columns import chunks

    options = formatter.options if formatter else {}
    named = {value for key, value in options.items() if key.removesuffix("_column") in ANSWERS and key.endswith("_column")}
    reads_messages = formatter is not None and (formatter.name == "auto" or options.get("messages_column") == "messages")
    for row in (row for part in chunks(rows) for row in part):
        if any(row.get(name) not in (None, "", []) for name in {*ANSWERS, *named}):
            return True
        last = row["messages"][-1] if reads_messages and isinstance(row.get("messages"), list) and row["messages"] else None
        if isinstance(last, dict) and last.get("role") == "assistant":
            return True
    return False


def _formatted(row: dict[str, Any]) -> dict[str, Any]:
    prompt, reference = question_and_reference(row)
    return {"prompt": prompt, "reference": reference}


def _question(row: dict[str, Any], column: str, tokenizer: Any, raw: bool) -> dict[str, Any]:
    """A row that holds a prompt alone; a conversation may end with an answer, which is then the reference."""
    prompt = row.get(column)
    if isinstance(prompt, str) and prompt.strip():
        return {"prompt": prompt if raw or not tokenizer.chat_template else tools_onto([{"role": "user", "content": prompt}], _tools(row))}
    if isinstance(prompt, list) and prompt and all(isinstance(one, dict) and {"role", "content"} <= one.keys() for one in prompt):
        if prompt[-1]["role"] == "assistant" and len(prompt) > 1:
            return {"prompt": tools_onto(prompt[:-1], _tools(row)), "reference": prompt[-1]["content"]}
        return {"prompt": tools_onto(prompt, _tools(row))}
    raise RowError(f"field '{column}' holds neither a text nor messages")


def _tools(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """What stands in a column `tools`: a list, or its JSON text."""
    tools = row.get("tools") or None
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError as error:
        raise RowError(f"field 'tools' is no JSON: {error}") from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RowError("field 'tools' must be a list of objects, or the JSON text of one")
    return tools


def check_output(output: Path, data: str) -> None:
    """DataError, before a model is loaded, where nothing could be written, or the prompts would be written over."""
    asked = Path(data).expanduser()
    if output.exists() and asked.exists() and output.samefile(asked):
        raise DataError(f"{output} holds the prompts, and would be written over.", "Give another --output.")
    parent = next(one for one in [output.parent, *output.absolute().parents] if one.exists())
    if output.is_dir() or not parent.is_dir():
        raise DataError(f"{output} cannot be written.", "Give a file: --output answers.jsonl")
