"""The rules of docs/when-to-fine-tune.md, applied to rows and memory: each choice with the reason for it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from ftx.catalogue import Catalogue
from ftx.data import read_dataset, row_type
from ftx.errors import DataError
from ftx.foresight import CONFIGS, machine_of
from ftx.ledger import Ledger
from ftx.machine import Machine, said
from ftx.planning import AGAIN, MICRO, TIMES, Case, Planner, settle, with_options
from ftx.readers import absolute
from ftx.recipe import Recipe, merge, resolve
from ftx.recommended import recommended
from ftx.run import Run
from ftx.shape import read_shape
from ftx_audit_task import NAMES, SIZES, Answers, size_advice
from ftx_audit_text import Said, all_said

if TYPE_CHECKING:
    from datasets import Dataset

#: Rank by kind of task: what is to be learned is little for labels, more for free text.
RANKS = {"classification": 8, "extraction": 16, "instruction": 32, "code": 32}
#: Rows of one optimizer step.
EFFECTIVE = 16
#: Tokens on the safe side: of a word's small letters three make one, of anything else (digits, marks, other scripts) every byte
#: may be one, and a chat template adds some to a row and some to each turn.
WORD, TOGETHER, TEMPLATE, TURN = re.compile(r" ?[a-z]+"), 3, 128, 8
#: Where no model takes the longest row, rows are cut here.
CUT = 4096
#: A model that a CPU trains in minutes to hours; the recommended ones take days there.
SMALL = "smollm2"


@dataclass
class Facts:
    """What the rows say: their type and kind of task, how many, the tokens that the longest may have, and how many are longer than `CUT`."""

    kind: str
    task: str | None
    rows: int
    longest: int
    over: int
    reached: str

    @property
    def length(self) -> int:
        """A max_length under which no row is cut."""
        return max(256, -(-self.longest // 64) * 64)


@dataclass
class Advice:
    """A recipe's content, a reason for each of its parts, what the plan says it needs, and what to do besides."""

    recipe: dict[str, Any]
    reasons: dict[str, str]
    needs: str = ""
    notes: list[str] = field(default_factory=list)


def advise(data: str, eval_data: str | None, formatter: str, device_memory: str | None, *, skip_bad_rows: bool = False) -> Advice:
    """A recipe for these rows and this memory. Raises FtxError where the rows cannot be read, or no model fits."""
    catalogue = Catalogue()
    facts = look(data, formatter, catalogue, skip_bad_rows=skip_bad_rows)
    if facts.kind not in ("prompt-completion", "conversation", "preference", "text"):
        raise DataError(f"{data}: {facts.kind} rows, for which no trainer is installed.", "Make pairs of them, or train on the good answers: ftx data convert")
    machine = machine_of(merge({}, {}), device_memory)
    advice = Advice({"model": "", "data": absolute(data) or data}, {})
    if eval_data:
        advice.recipe["eval_data"] = absolute(eval_data) or eval_data
    advice.recipe["formatter"] = formatter
    _trainer(advice, facts)
    _adapter(advice, facts)
    case = _model(advice, facts, machine, catalogue)
    advice.needs = f"{said(case.prediction.needed)} of {said(machine.memory)}" if machine.memory else said(case.prediction.needed)
    _evaluators(advice, facts, eval_data)
    if facts.reached == "below the minimum" and facts.task:
        sizes = size_advice(facts.rows, facts.task, SIZES[facts.task])[0]
        advice.notes.append(f"{sizes}: more rows help more than any option; try a better prompt first")
    resolve(merge(advice.recipe, {}), catalogue)
    return advice


def look(data: str, formatter: str, catalogue: Catalogue, *, skip_bad_rows: bool = False) -> Facts:
    """Read and format the rows, and see what they are."""
    recipe, hooks = resolve(Recipe(data=data, formatter=merge({}, {"formatter": formatter}).formatter, skip_bad_rows=skip_bad_rows), catalogue, training=False)
    run = Run(recipe=recipe, ledger=Ledger(skip_bad_rows=skip_bad_rows), hooks=hooks, say=lambda text: None)
    rows: Dataset = hooks.call("format_dataset", dataset=read_dataset(data, run.ledger), run=run)
    answers, longest, over = Answers(), 0, 0
    for one in all_said(rows):
        answers.see(one)
        tokens = row_tokens(one)
        longest, over = max(longest, tokens), over + (tokens > CUT)
    kind = row_type(rows.column_names) or "unknown"
    task = answers.task() if kind != "preference" else "instruction"
    reached = size_advice(len(rows), task, SIZES[task])[1]["reached"] if task else "good"
    return Facts(kind, task, len(rows), longest, over, reached)


def row_tokens(one: Said) -> int:
    """The tokens that a row may have, on the safe side; of a pair those of the longer answer."""
    answer = max(most_tokens(one.answer), most_tokens(one.other or ""))
    return sum(most_tokens(text) + TURN for _, text in one.asked) + answer + most_tokens(one.tools) + TURN + TEMPLATE


def most_tokens(text: str) -> int:
    """The tokens that a text may have in a vocabulary made of bytes that knows little of its script."""
    words = [len(word) for word in WORD.findall(text)]
    return len(text.encode("utf-8", "surrogatepass")) - sum(words) + sum(-(-length // TOGETHER) for length in words)


def _trainer(advice: Advice, facts: Facts) -> None:
    pairs = facts.kind == "preference"
    epochs = 1 if pairs or facts.rows > 10_000 else 2 if facts.rows > 2_000 else 3
    advice.recipe["trainer"] = {"name": "dpo" if pairs else "sft", "num_train_epochs": float(epochs), "max_length": facts.length}
    advice.reasons["trainer"] = "rows are pairs of a better and a worse answer" if pairs else f"rows are {facts.kind}: what was asked, and the right answer"
    advice.reasons["trainer.num_train_epochs"] = f"{facts.rows:,} rows" + (": one pass is usual for pairs" if pairs else "; more rows need fewer passes")
    advice.reasons["trainer.max_length"] = f"the longest row has {facts.longest:,} tokens at most; a longer one is refused, not cut"


def _adapter(advice: Advice, facts: Facts) -> None:
    task = facts.task or "instruction"
    rank = RANKS[task]
    name, why = "lora", "the default: near full fine-tuning at two thirds of its products a token"
    if facts.rows < SIZES[task][1] and rank <= 16:
        name, why = "dora", "few rows and a small rank, where DoRA is better than LoRA"
    advice.recipe["adapter"] = {"name": name, "r": rank, "alpha": 2 * rank}
    advice.reasons["adapter"] = why
    advice.reasons["adapter.r"] = f"enough for {NAMES.get(task, task)}; alpha is twice the rank"


def _model(advice: Advice, facts: Facts, machine: Machine, catalogue: Catalogue) -> Case:
    """The largest recommended model that fits with the adapter, in 4 bits for tasks of many kinds where that is a larger one; the small one on a CPU."""
    if machine.device == "cpu":
        return _small(advice, facts, machine, catalogue)
    own = advice.recipe["adapter"]["name"]
    pairs, open_task = advice.recipe["trainer"]["name"] == "dpo", facts.task in ("instruction", "code", None)
    preferred = [own, "qlora"] if open_task and not pairs else [own]
    fitting = _all_fitting(preferred, advice, machine, catalogue) or _all_fitting(["qlora"], advice, machine, catalogue)
    if not fitting and facts.length > CUT:
        _cut(advice, facts)
        fitting = _all_fitting(preferred, advice, machine, catalogue) or _all_fitting(["qlora"], advice, machine, catalogue)
    if not fitting:
        return _small(advice, facts, machine, catalogue)
    size, name, adapter, case = max(fitting, key=lambda one: one[0])
    advice.recipe["model"] = recommended()[name]["hub"]
    advice.reasons["model"] = f"the largest recommended model that fits in {said(machine.memory or 0)} ({size / 1e9:.1f} billion parameters)"
    if adapter != own:
        advice.recipe["adapter"]["name"] = adapter
        advice.reasons["adapter"] = "the base in 4 bits makes room for a larger model; it costs time"
    _batch(advice, case)
    return case


def _cut(advice: Advice, facts: Facts) -> None:
    """Shorter rows than the data have, which must be said: an answer that is cut is refused otherwise."""
    advice.recipe["trainer"]["max_length"] = CUT
    advice.recipe["allow_truncation"] = True
    advice.reasons["trainer.max_length"] = f"the longest row may have {facts.longest:,} tokens, more than a model has room for here"
    advice.reasons["allow_truncation"] = f"up to {facts.over:,} of {facts.rows:,} rows are cut at {CUT:,} tokens, each in the ledger; or shorten them first"


def _small(advice: Advice, facts: Facts, machine: Machine, catalogue: Catalogue) -> Case:
    from ftx import models

    advice.recipe["model"] = SMALL
    where = "a CPU trains it in minutes to hours" if machine.device == "cpu" else f"nothing larger fits in {said(machine.memory or 0)}"
    advice.reasons["model"] = f"{where}; for a GPU say --device-memory"
    config = models.resolve(SMALL, lambda text: None)
    while True:
        wanted = merge(advice.recipe, {})
        recipe, hooks = resolve(wanted, catalogue)
        planner = Planner(catalogue, Run(recipe=recipe, ledger=Ledger(), device=machine.device, hooks=hooks), machine, config)
        case = settle(planner, wanted, fit=True)[0]
        if (planner.fits(case) and _has_context(planner, advice)) or advice.recipe["trainer"]["max_length"] <= CUT:
            break
        _cut(advice, facts)
    _batch(advice, case)
    return case


def _all_fitting(adapters: list[str], advice: Advice, machine: Machine, catalogue: Catalogue) -> list[tuple[int, str, str, Case]]:
    """(parameters, model, the first of the adapters under which it fits, its plan) of each recommended model that fits."""
    found = []
    for name in recommended():
        for adapter in adapters:
            case = _fitting(name, adapter, advice, machine, catalogue)
            if case is not None:
                found.append((read_shape(CONFIGS / name).parameters, name, adapter, case))
                break
    return found


def _has_context(planner: Planner, advice: Advice) -> bool:
    return not planner.model.context or advice.recipe["trainer"]["max_length"] <= planner.model.context


def _fitting(name: str, adapter: str, advice: Advice, machine: Machine, catalogue: Catalogue) -> Case | None:
    """The plan of a model under an adapter with whatever batch and checkpointing make it fit; None if none does."""
    content = {**advice.recipe, "model": name, "adapter": {**advice.recipe["adapter"], "name": adapter}, "device": machine.device}
    wanted = with_options(merge(content, {}), **{MICRO: 4, TIMES: EFFECTIVE // 4})
    recipe, hooks = resolve(wanted, catalogue)
    planner = Planner(catalogue, Run(recipe=recipe, ledger=Ledger(), device=machine.device, hooks=hooks), machine, CONFIGS / name)
    if not _has_context(planner, advice):
        return None
    for micro, again in ((4, False), (2, False), (1, False), (4, True), (1, True)):
        case = planner.case(with_options(wanted, **{MICRO: micro, TIMES: EFFECTIVE // micro, AGAIN: again}))
        if planner.fits(case):
            return case
    return None


def _batch(advice: Advice, case: Case) -> None:
    options = case.recipe.trainer.options if case.recipe.trainer else {}
    for name in (MICRO, TIMES):
        if name in options:
            advice.recipe["trainer"][name] = options[name]
    advice.reasons[f"trainer.{MICRO}"] = "what fits at once; with the accumulation it gives the rows of a step"


def _evaluators(advice: Advice, facts: Facts, eval_data: str | None) -> None:
    if eval_data is None:
        advice.notes.append("keep rows apart to see whether it helps: `ftx data split`, then --eval-data")
        return
    if facts.kind == "preference":
        advice.recipe["evaluators"], why = ["reward-accuracy"], "held-out pairs: is the better answer the likelier one?"
    elif facts.task in ("classification", "extraction"):
        advice.recipe["evaluators"], why = ["exact-match"], "there is one right answer"
    else:
        advice.recipe["evaluators"], why = ["exact-match"], "token F1 tells a little; a judge tells more: --evaluator llm-judge"
    advice.reasons["evaluators"] = why


def written(advice: Advice) -> str:
    """The recipe as YAML, each part behind the reason for it."""
    lines = [f"# {note[0].upper()}{note[1:]}." for note in advice.notes]
    lines += [f"# The plan: {advice.needs}."]
    for key, value in advice.recipe.items():
        if reason := advice.reasons.get(key):
            lines.append(f"# {key}: {reason}")
        for option in value if isinstance(value, dict) else ():
            if reason := advice.reasons.get(f"{key}.{option}"):
                lines.append(f"# {key}.{option}: {reason}")
        lines.append(yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True).rstrip())
    return "\n".join(lines) + "\n"
