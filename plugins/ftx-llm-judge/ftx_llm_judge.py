"""The evaluator `llm-judge`: answers rated by a rubric, and base against tuned in pairs, by one language model or several."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from ftx import Evaluation, RowError, Score, hookimpl, option, plugin
from ftx.errors import DataError, RunError
from ftx_llm_judge_options import Judging

if TYPE_CHECKING:
    from datasets import Dataset

    from ftx import Run
    from ftx.generate import Generate
    from ftx_llm_judge_rubric import Criterion

NEEDS_DATA = "evaluator 'llm-judge' needs questions: give --eval-data FILE (or -o llm-judge.check=FILE, without a run, to check the judge itself)."
NO_RUN_FOR_CHECK = "llm-judge.check judges the judge and no model: ftx eval --evaluator llm-judge -o llm-judge.check=FILE, without a run."
SAME_DATA = "Evaluate both on the same data: ftx eval RUN --evaluator llm-judge"


@plugin
class LLMJudge(Judging):
    """Ratings by a rubric (helpfulness, accuracy, coherence, or your own) and base against tuned, from language models as judges."""

    called = "llm-judge"

    mode: Literal["both", "rubric", "pairwise"] = option("both", "rubric: rate every answer; pairwise: compare base and tuned.")
    rubric: str | None = option(None, "YAML file of criteria, NAME: {description: TEXT, 1: TEXT, ... 5: TEXT, reference: true|false} (default: built in).")
    show_reference: bool = option(True, "Show the judge the data's own answer, where there is one.")
    jury: Literal["mean", "majority"] = option("mean", "What several judges say together.")
    against: str | None = option(None, "What tuned is compared with in pairs: another run's directory or JSON lines {prompt, answer} (default: base).")
    max_items: int | None = option(None, "Only the first of the questions, this many (default: all).")
    max_new_tokens: int = option(512, "Longest answer, in tokens.")
    check: str | None = option(None, "Labelled pairs or scores to check the judge on, without a run.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_items", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")

    @hookimpl
    def preflight(self, run: Run) -> list[str]:
        reasons = self.preflight_reasons(run)
        if self.check is None and run.recipe.eval_data is None:
            reasons.append(NEEDS_DATA)
        if self.check is not None and run.recipe.data is not None:
            reasons.append(NO_RUN_FOR_CHECK)
        for read in (self._criteria, self._other_answers, self._labels):
            try:
                read()
            except DataError as error:
                reasons.append(str(error).replace("\n", " "))
        return reasons

    @hookimpl
    def evaluate_model(self, generate: Generate | None, dataset: Dataset | None, run: Run) -> Evaluation:
        """Greedy answers, rated. Scores: `rating` (the mean of the criteria, 1 to 5), each criterion, and `answer_length` in
        characters; of `mode=pairwise` the length only, of a dry run none. With `check`: what the judges are worth."""
        if self.check is not None:
            return self._checked(run)
        if dataset is None or generate is None:
            raise RunError(NEEDS_DATA)
        items = [_item(row) for row in itertools.islice(dataset, self.max_items)]
        asked = [item for item in items if item["prompt"]]
        if not asked:
            raise RunError(f"evaluator 'llm-judge' finds no question in the {len(items)} rows of the evaluation data.", NEEDS_DATA)
        answers = generate([item["prompt"] for item in asked], max_new_tokens=self.max_new_tokens, temperature=0)
        for item, answer in zip(asked, answers, strict=True):
            item["answer"] = answer
        ratings = self._ratings(items, run) if self.mode != "pairwise" else []
        if self.dry_run:
            return Evaluation([], items)
        length = Score(metric="answer_length", value=fmean(map(len, answers)), n=len(asked), unscored=len(items) - len(asked))
        return Evaluation([*ratings, length], items)

    @hookimpl
    def compare_answers(self, base_items: list[dict[str, Any]], tuned_items: list[dict[str, Any]], run: Run) -> Evaluation:
        """The tuned model against the base (or `against`) in pairs, `win_rate` first, and how the ratings changed; no scores in a dry run."""
        _check_same_questions(base_items, tuned_items)
        from ftx_llm_judge_jury import jury, warn_of_unscored
        from ftx_llm_judge_pairs import compare_items, pair_scores
        from ftx_llm_judge_rating import rating_changes

        changes = rating_changes(base_items, tuned_items, run.seed)
        if self.mode == "rubric":
            return Evaluation(changes, [])
        with jury(self, run) as judges:
            before = self._before(base_items)
            items = compare_items(before, tuned_items, judges, self.jury, run.seed, references=self.show_reference)
        if self.dry_run:  # equal answers are a tie, asked or not: that is no score of a judge who was not asked
            return Evaluation([], items)
        reasons = [item["reason"] for item in items if item["verdict"] == "unscored"]
        if len(reasons) == len(items):
            raise RunError(f"llm-judge: none of the {len(items)} pairs could be scored ({reasons[0]}).")
        warn_of_unscored(len(reasons), len(items), reasons, run)
        return Evaluation([*pair_scores(items, run.seed), *changes], items)

    def _ratings(self, items: list[dict[str, Any]], run: Run) -> list[Score]:
        """Rate what can be rated; no scores in a dry run, else RunError where nothing could be rated."""
        from ftx_llm_judge_jury import jury, warn_of_unscored
        from ftx_llm_judge_rating import rate_items, rating_scores

        criteria = self._criteria()
        for item in items:
            if item["prompt"] and not item["reference"] and any(one.reference for one in criteria):
                item |= {"verdict": "unscored", "reason": "the rubric needs a reference answer, and the row has none"}
        with jury(self, run) as judges:
            rate_items([item for item in items if not item["verdict"]], criteria, judges, self.jury, run.seed, references=self.show_reference)
        if self.dry_run:
            return []
        reasons = [item["reason"] for item in items if item["verdict"] == "unscored"]
        if len(reasons) == len(items):
            raise RunError(f"llm-judge: none of the {len(items)} answers could be rated ({reasons[0]}).")
        warn_of_unscored(len(reasons), len(items), reasons, run)
        return rating_scores(items, criteria, run.seed)

    def _checked(self, run: Run) -> Evaluation:
        from ftx_llm_judge_check import check_pairs, check_scores
        from ftx_llm_judge_jury import jury
        from ftx_llm_judge_labels import LabelledPair

        labelled = self._labels()[: self.max_items]
        scores, items = [], []
        with jury(self, run) as judges:
            for judge in judges:
                checked = check_pairs if isinstance(labelled[0], LabelledPair) else check_scores
                its_scores, its_items = checked(labelled, judge, run.seed)
                scores += its_scores
                items += its_items
        return Evaluation([] if self.dry_run else scores, items)

    def _criteria(self) -> tuple[Criterion, ...]:
        from ftx_llm_judge_rubric import DEFAULT, read_rubric

        return DEFAULT if self.rubric is None else read_rubric(self.rubric)

    def _labels(self) -> list[Any]:
        from ftx_llm_judge_labels import read_labels

        return [] if self.check is None else read_labels(self.check)

    def _other_answers(self) -> list[dict[str, Any]]:
        return [] if self.against is None else _read_answers(self.against)

    def _before(self, base_items: list[dict[str, Any]]) -> list[str | None]:
        """The answers that tuned is compared with, in the order of the items; None where there is none."""
        from ftx_llm_judge_prompts import question_text

        if self.against is None:
            return [item["answer"] for item in base_items]
        others = self._other_answers()
        if all("prompt" in other for other in others):
            known = {question_text(other["prompt"]): other["answer"] for other in others}
            return [known.get(question_text(item["prompt"])) for item in base_items]
        if len(others) != len(base_items):
            raise RunError(
                f"llm-judge: {self.against} has {len(others)} answers without prompts for {len(base_items)} questions.",
                "Give each line its prompt, or one line a question in the order of the data.",
            )
        return [other["answer"] for other in others]


def _item(row: dict[str, Any]) -> dict[str, Any]:
    """One item before it is answered; `unscored`, with the reason, for a row that holds no question."""
    from ftx.encode import question_and_reference

    try:
        prompt, reference = question_and_reference(row)
        if not prompt:
            raise RowError("the row holds no question")
    except RowError as error:
        messages = row.get("messages") or []
        if not messages or messages[-1]["role"] != "user":
            return {"prompt": "", "answer": "", "reference": "", "verdict": "unscored", "reason": str(error)}
        prompt, reference = list(messages), ""  # a question that nobody answered yet can be judged too
    bad = row.get("label") is False  # an answer that is marked as a bad one is no reference
    return {"prompt": prompt, "answer": "", "reference": "" if bad else reference, "verdict": ""}


def _check_same_questions(base_items: list[dict[str, Any]], tuned_items: list[dict[str, Any]]) -> None:
    if len(base_items) != len(tuned_items):
        raise RunError(f"llm-judge: the base model has {len(base_items)} items and the tuned one {len(tuned_items)}, so they cannot be compared.", SAME_DATA)
    for number, (base, tuned) in enumerate(zip(base_items, tuned_items, strict=True), start=1):
        if base["prompt"] != tuned["prompt"]:
            raise RunError(f"llm-judge: item {number} is another question for the base model than for the tuned one, so they cannot be compared.", SAME_DATA)


def _read_answers(path: str) -> list[dict[str, Any]]:
    """The tuned answers of another run that llm-judge evaluated, or the lines of a file; DataError where there are none."""
    from ftx.run import RunDir, read_lines

    file = RunDir(path).items("llm-judge", "tuned") if Path(path).is_dir() else Path(path)
    try:
        answers = read_lines(file)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"llm-judge.against: {file} cannot be read ({error}).", "It must hold JSON lines with prompt and answer.") from error
    if not answers:
        hint = f"ftx eval {path} --evaluator llm-judge makes them." if Path(path).is_dir() else "It must hold JSON lines with prompt and answer."
        raise DataError(f"llm-judge.against: there are no answers at {file}.", hint)
    if not all(isinstance(one, dict) and isinstance(one.get("answer"), str) for one in answers):
        raise DataError(f"llm-judge.against: not every line of {file} has an answer.", "It must hold JSON lines with prompt and answer.")
    return answers
