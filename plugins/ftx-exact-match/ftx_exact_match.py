"""The evaluator `exact-match`: answers compared with the references of the evaluation data."""

from __future__ import annotations

import re
import tempfile
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ftx import Evaluation, RowError, Score, hookimpl, option, plugin
from ftx.errors import RunError

if TYPE_CHECKING:
    from datasets import Dataset

    from ftx import Run
    from ftx.generate import Generate

NEEDS_DATA = "evaluator 'exact-match' needs questions with answers: give --eval-data FILE."


@plugin
class ExactMatch:
    """Share of answers equal to the reference, token F1, and field-wise scores where the answers are JSON objects."""

    max_new_tokens: int = option(128, "Longest answer, in tokens; a longer one is cut there and compared as it is.")
    regexes_to_ignore: list[str] = option([], "Regular expressions whose matches are removed from both texts, in order, before everything else.")
    ignore_case: bool = option(False, "Compare in lower case.")
    ignore_punctuation: bool = option(False, "Remove ASCII punctuation from both texts.")
    ignore_numbers: bool = option(False, "Remove the digits 0-9 from both texts.")
    strip: bool = option(True, "Remove white space around both texts; false compares as evaluate's exact_match does.")

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        for regex in self.regexes_to_ignore:
            try:
                re.compile(regex)
            except re.error as error:
                raise ValueError(f"regexes_to_ignore: '{regex}' is not a regular expression ({error})") from error

    @hookimpl
    def preflight(self, run: Run) -> list[str]:
        return [NEEDS_DATA] if run.recipe.eval_data is None else []

    @hookimpl
    def evaluate_model(self, generate: Generate, dataset: Dataset | None, run: Run) -> Evaluation:
        """Greedy answers to the questions of the data, so that base and tuned are asked the same in the same way.

        Scores: `exact_match` (Wilson interval), `token_f1` (bootstrap) and, where every reference is a JSON object,
        `field_f1`, `field_precision`, `field_recall` (bootstrap over items) and `valid_json` (Wilson).
        """
        if dataset is None:
            raise RunError(NEEDS_DATA)
        items = [_item(row) for row in dataset]
        scored = [item for item in items if item["verdict"] != "unscored"]
        unscored = len(items) - len(scored)
        if not scored:
            reason = f" ({items[0]['reason']})" if items else ""
            raise RunError(f"evaluator 'exact-match' can score none of the {len(items)} rows of the evaluation data{reason}.", NEEDS_DATA)
        if unscored:
            run.say(f"warning: exact-match cannot score {unscored} of {len(items)} rows; the items say why.")
        self._warn_of_long_references(scored, generate, run)
        answers = generate([item["prompt"] for item in scored], max_new_tokens=self.max_new_tokens, temperature=0)
        for item, answer in zip(scored, answers, strict=True):
            item["answer"] = answer
        scores = [*self._text_scores(scored, run), *self._field_scores(scored, run)]
        return Evaluation([Score(**score, n=len(scored), unscored=unscored) for score in scores], items)

    @hookimpl
    def compare_answers(self, base_items: list[dict[str, Any]], tuned_items: list[dict[str, Any]], run: Run) -> list[Score]:
        """How many items training fixed, broke and left as they were, and McNemar's exact p that this is chance."""
        if len(base_items) != len(tuned_items):
            raise RunError(
                f"exact-match: the base model has {len(base_items)} items and the tuned one {len(tuned_items)}, so they cannot be compared.",
                "Evaluate both on the same data: ftx eval RUN --evaluator exact-match",
            )
        for number, (base, tuned) in enumerate(zip(base_items, tuned_items, strict=True), start=1):
            if (base["prompt"], base["reference"]) != (tuned["prompt"], tuned["reference"]):
                raise RunError(
                    f"exact-match: item {number} is another question for the base model than for the tuned one, so they cannot be compared.",
                    "Evaluate both on the same data: ftx eval RUN --evaluator exact-match",
                )
        from ftx_exact_match_numbers import mcnemar

        pairs = [(base["verdict"], tuned["verdict"]) for base, tuned in zip(base_items, tuned_items, strict=True)]
        scored = [pair for pair in pairs if "unscored" not in pair]
        fixed, broken = scored.count(("wrong", "correct")), scored.count(("correct", "wrong"))
        values = {"fixed": fixed, "broken": broken, "unchanged": len(scored) - fixed - broken, "p_value": mcnemar(fixed, broken)}
        return [Score(metric=metric, value=float(value), n=len(scored), unscored=len(pairs) - len(scored)) for metric, value in values.items()]

    @hookimpl
    def check_environment(self) -> list[str]:
        try:
            import ftx_exact_match_metric  # noqa: F401  a subclass of evaluate.Metric: not every pair of evaluate and datasets can make it
        except Exception as error:
            return [f"failure: exact-match: evaluate does not work ({type(error).__name__}: {error}); pip install 'evaluate>=0.4.6'"]
        return [f"ok: evaluate {version('evaluate')}"]

    def _warn_of_long_references(self, scored: list[dict[str, Any]], generate: Generate, run: Run) -> None:
        tokenizer = getattr(generate, "tokenizer", None)  # a stand-in for the generator may have none
        if tokenizer is None:
            return
        lengths = [len(ids) for ids in tokenizer([item["reference"] for item in scored], add_special_tokens=False)["input_ids"]]
        too_long = sum(length > self.max_new_tokens for length in lengths)
        if too_long:
            run.say(
                f"warning: {too_long} of {len(scored)} references are longer than exact-match's max_new_tokens={self.max_new_tokens} (the longest has"
                f" {max(lengths)} tokens), so no answer can equal them: -o exact-match.max_new_tokens={max(lengths) + 1}"
            )

    def _ignore(self) -> dict[str, Any]:
        names = ("regexes_to_ignore", "ignore_case", "ignore_punctuation", "ignore_numbers", "strip")
        return {name: getattr(self, name) for name in names}

    def _text_scores(self, scored: list[dict[str, Any]], run: Run) -> list[dict[str, Any]]:
        """Fill in `verdict` and `f1`, and give the scores that every kind of answer has."""
        from ftx_exact_match_metric import ExactMatchMetric, token_f1
        from ftx_exact_match_numbers import ratio_of_sums, wilson

        answers, references = [item["answer"] for item in scored], [item["reference"] for item in scored]
        # evaluate makes an empty directory in the cache at home even when it keeps all in memory
        with tempfile.TemporaryDirectory() as cache:
            result = ExactMatchMetric(keep_in_memory=True, cache_dir=cache).compute(predictions=answers, references=references, **self._ignore())
        for item, match in zip(scored, result["matches"], strict=True):
            item["verdict"] = "correct" if match else "wrong"
            item["f1"] = token_f1(item["answer"], item["reference"])
        low, high = wilson(sum(result["matches"]), len(scored))
        exact = {"metric": "exact_match", "value": result["exact_match"], "ci_low": low, "ci_high": high}
        return [exact, _entry("token_f1", ratio_of_sums([item["f1"] for item in scored], [1] * len(scored), run.seed))]

    def _field_scores(self, scored: list[dict[str, Any]], run: Run) -> list[dict[str, Any]]:
        """Fill in `fields`, and give micro precision, recall and F1: sums over items, so a long answer counts for more."""
        from ftx_exact_match_metric import Rules, field_counts, json_object
        from ftx_exact_match_numbers import ratio_of_sums, wilson

        references = [json_object(item["reference"]) for item in scored]
        objects = sum(reference is not None for reference in references)
        if 0 < objects < len(scored):
            run.say(f"exact-match: {objects} of {len(scored)} references are JSON objects; fields are scored only where all are.")
        if objects < len(scored) or not any(references):
            return []
        for item, reference in zip(scored, references, strict=True):
            item["fields"] = field_counts(item["answer"], reference or {}, Rules(**self._ignore()))
        matched, given, expected, valid = ([item["fields"][name] for item in scored] for name in ("matched", "given", "expected", "valid_json"))
        low, high = wilson(sum(valid), len(scored))
        both = [g + e for g, e in zip(given, expected, strict=True)]
        return [
            _entry("field_f1", ratio_of_sums([2 * m for m in matched], both, run.seed)),
            _entry("field_precision", ratio_of_sums(matched, given, run.seed)),
            _entry("field_recall", ratio_of_sums(matched, expected, run.seed)),
            {"metric": "valid_json", "value": sum(valid) / len(scored), "ci_low": low, "ci_high": high},
        ]


def _item(row: dict[str, Any]) -> dict[str, Any]:
    """One item before it is answered; `unscored`, with the reason, for a row that holds no question or no right answer."""
    from ftx.encode import question_and_reference

    try:
        if row.get("label") is False:
            raise RowError("the row's answer is marked as a bad one, so it is no reference")
        prompt, reference = question_and_reference(row)
    except RowError as error:
        return {"prompt": "", "answer": "", "reference": "", "verdict": "unscored", "reason": str(error)}
    return {"prompt": prompt, "answer": "", "reference": reference, "verdict": ""}


def _entry(metric: str, ratio: tuple[float, float | None, float | None]) -> dict[str, Any]:
    value, low, high = ratio
    return {"metric": metric, "value": value, "ci_low": low, "ci_high": high}
