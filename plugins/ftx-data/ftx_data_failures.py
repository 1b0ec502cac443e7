"""What a run got wrong, as rows to correct and train on."""

from __future__ import annotations

from typing import Any

from ftx.catalogue import Catalogue
from ftx.encode import tools_apart
from ftx.errors import DataError, RecipeError, RowError
from ftx.hooks import Hooks
from ftx.options import build
from ftx.readback import recipe_of
from ftx.run import Run, RunDir
from ftx_data_convert import Format
from ftx_data_files import Book, Output


def failures(path: str, output: Output, ledger: Book, say: Any, *, evaluator: str | None, below: float | None, broken: bool) -> dict[str, Any]:
    """The items of a run's tuned model that were wrong, in the form that the run was trained on; what was done.

    The reference is the answer to train on; where an item has none, the model's own answer stands there to be corrected.
    `model_answer`, `verdict` and `evaluator` stand beside it. `below`: for evaluators that rate, what counts as wrong;
    `broken`: only what the base got right. Raises DataError.
    """
    directory = RunDir(path)
    recipe = recipe_of(directory)
    names = sorted(file.parent.name for file in (directory / "eval").glob("*/tuned.jsonl"))
    if not names:
        raise RecipeError(f"{directory} has no evaluation.", f"Make one: ftx eval {path} --evaluator exact-match --eval-data FILE")
    if evaluator is not None and evaluator not in names:
        raise RecipeError(f"{directory} has no evaluation by '{evaluator}'.", f"It has: {', '.join(names)}.")
    form = _form(recipe, ledger, say)
    seen, counts = 0, {"unscored": 0, "without_reference": 0}
    with output:
        for name in [evaluator] if evaluator else names:
            tuned, base = directory.read_items(name, "tuned"), directory.read_items(name, "base")
            for number, item in enumerate(tuned):
                seen += 1
                wrong = _wrong(item, below, name)
                if wrong is None:
                    counts["unscored"] += 1
                if not wrong or (broken and (len(base) != len(tuned) or _wrong(base[number], below, name) is not False)):
                    continue
                counts["without_reference"] += not item.get("reference")
                row = _row(item, form, f"{name}, item {number + 1}", ledger)
                if row is not None:
                    output.write({**row, "model_answer": item.get("answer"), "verdict": item.get("verdict"), "evaluator": name})
    if not output.rows:
        say("nothing is wrong by these items")
    return {"items": seen, "written": output.rows, **counts, "output": str(output.file)}


def _form(recipe: Any, ledger: Book, say: Any) -> Format | None:
    """The run's formatter, if it can write."""
    if recipe.formatter is None:
        return None
    chosen, hooks = recipe.formatter, Hooks()
    plugin = build(Catalogue().load("formatter", chosen.name), chosen.options, stage="formatter", name=chosen.name)
    hooks.add(plugin, "formatter", chosen.name)
    form = Format(chosen.name, plugin, hooks, Run(recipe=recipe, ledger=ledger, hooks=hooks, say=say))
    return form if form.hooks.owners("unformat_row") else None


def _wrong(item: dict[str, Any], below: float | None, evaluator: str) -> bool | None:
    """Whether the answer was wrong; None where there is no verdict on it."""
    verdict = item.get("verdict")
    if isinstance(verdict, int | float) and not isinstance(verdict, bool):
        if below is None:
            raise DataError(f"'{evaluator}' rates answers and calls none wrong.", "Say what counts as wrong: --below 5")
        return verdict < below
    return {"wrong": True, "correct": False, False: True, True: False}.get(verdict) if isinstance(verdict, str | bool) else None


def _row(item: dict[str, Any], form: Format | None, where: str, ledger: Book) -> dict[str, Any] | None:
    prompt, answer = item.get("prompt"), item.get("reference") or item.get("answer")
    if not prompt or not isinstance(answer, str) or not isinstance(prompt, str | list):
        ledger.add(where, 0, "the item has no prompt and answer that a row could be made of", "dropped")
        return None
    prompt, tools = tools_apart(prompt)
    row = {"prompt": prompt, "completion": answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]}
    if tools:
        row["tools"] = tools
    if form is not None:
        try:
            return form.unformat(row)
        except RowError as error:
            ledger.add(where, 0, f"written as prompt and completion: {error}", "repaired", kind="written as prompt and completion")
    return row
