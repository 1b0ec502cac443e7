"""The two ways to scores: judgments that exist are scored, and answers are judged first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ftx import Evaluation, Score
from ftx.errors import RunError
from ftx_llm_judge_jury import jury, warn_of_unscored
from ftx_mt_bench_files import Answers, Bench, read_baseline, read_bench
from ftx_mt_bench_items import items_of
from ftx_mt_bench_judging import WITH_REFERENCE, judge_pairs, judge_single
from ftx_mt_bench_judgments import match_of, rating_of, read_judgments
from ftx_mt_bench_numbers import Rating, as_ratings, match_scores, rating_scores, table

if TYPE_CHECKING:
    from ftx import Run
    from ftx_mt_bench import MTBench


def score_judgments(options: MTBench, files: list[str], run: Run) -> Evaluation:
    """The scores of every model in files of judgments. No items: the files are those."""
    categories = {question.id: question.category for question in read_bench(options.data).questions} if options.data else {}
    found = read_judgments(files, options.strict, categories)
    if found.superseded:
        run.say(f"mt-bench: {found.superseded} judgments are set aside for later ones of the same question, model, turn and judge.")
    if found.reread:
        run.say(f"warning: mt-bench counts {found.reread} judgments otherwise than they are recorded: the last verdict in the text binds.")
    unscored = [one.reason for one in found.ratings if one.value is None] + [one.reason for one in found.matches if one.winners is None]
    total = len(found.ratings) + len(found.matches)
    if len(unscored) == total:
        raise RunError(f"mt-bench: none of the {total} judgments in {', '.join(files)} holds a verdict ({unscored[0]}).")
    if unscored:
        run.say(f"warning: {len(unscored)} of {total} judgments hold no verdict and are unscored ({unscored[0]}).")
    baseline, _ = read_baseline(options.baseline)
    return Evaluation([*rating_scores(found.ratings, run.seed), *match_scores(found.matches, run.seed, baseline=baseline)], [])


def judge_answers(options: MTBench, bench: Bench, models: Mapping[str, Answers], run: Run) -> Evaluation:
    """Scores and items of the models whose answers are given; the one model of a run is called "". No scores in a dry run."""
    baseline, its_answers = read_baseline(options.baseline) if options.mode == "pairwise" else (None, {})
    rows: dict[str, list[dict[str, Any]]] = {model: [] for model in models if model != baseline}
    with jury(options, run) as judges:
        for judge in judges:
            _warn_of_references(bench, judge.name, run)
            for model in rows:
                if baseline is None:
                    rows[model] += judge_single(bench, judge, model, models[model], strict=options.strict, seed=run.seed)
                else:
                    rows[model] += judge_pairs(bench, judge, (model, baseline), models[model], its_answers, strict=options.strict, seed=run.seed)
    categories = {question.id: question.category for question in bench.questions}
    ratings = {model: ratings_of(options, rows[model], model, categories) for model in rows}
    items = [item for model in rows for item in items_of(bench, model, models[model], rows[model], ratings[model], pairwise=baseline is not None)]
    if options.dry_run:
        return Evaluation([], items)
    reasons = [rating.reason for each in ratings.values() for rating in each if rating.value is None]
    total = sum(map(len, ratings.values()))
    if len(reasons) == total:
        raise RunError(f"mt-bench: none of the {total} answers could be judged ({reasons[0] if reasons else 'there are none'}).")
    warn_of_unscored(len(reasons), total, reasons, run)
    if list(rows) == [""]:
        for line in table(ratings[""]):
            run.say(line)
    return Evaluation(_scores(options, rows, ratings, baseline, run.seed), items)


def ratings_of(options: MTBench, rows: Iterable[Mapping[str, Any]], model: str, categories: Mapping[Any, str | None]) -> list[Rating]:
    """What counts of the rows made for one model: its ratings, or what its matches are worth to it."""
    if options.mode == "single":
        return [rating_of(row, options.strict, categories) for row in rows]
    return as_ratings([match_of(row, options.strict, categories) for row in rows], model)


def _scores(options: MTBench, rows: Mapping[str, list[dict[str, Any]]], ratings: Mapping[str, list[Rating]], baseline: str | None, seed: int) -> list[Score]:
    if baseline is None:
        return rating_scores([rating for each in ratings.values() for rating in each], seed)
    categories = {rating.question: rating.category for each in ratings.values() for rating in each}
    return match_scores([match_of(row, options.strict, categories) for each in rows.values() for row in each], seed, baseline=baseline)


def _warn_of_references(bench: Bench, judge: str, run: Run) -> None:
    wanted = [question for question in bench.questions if question.category in WITH_REFERENCE]
    missing = sum(not bench.reference(question, judge) for question in wanted)
    if missing:
        run.say(f"warning: {missing} of {len(wanted)} questions on {', '.join(WITH_REFERENCE)} have no reference answer, and are judged without one.")
