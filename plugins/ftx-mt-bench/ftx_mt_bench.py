"""The evaluator `mt-bench`: 80 two-turn questions in eight categories, rated by a judge; and FastChat's files, scored as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from ftx import Evaluation, Score, hookimpl, option, plugin
from ftx.errors import DataError, RunError
from ftx_llm_judge_options import Judging

if TYPE_CHECKING:
    from ftx import Run
    from ftx.generate import Generate
    from ftx_mt_bench_numbers import Rating

NAME = "mt-bench"
NEEDS_DATA = (
    "mt-bench needs its questions: -o mt-bench.data=DIR, a directory with question.jsonl and reference_answer/"
    " (fastchat/llm_judge/data/mt_bench of https://github.com/lm-sys/FastChat; question ids 81-160)"
)
NEEDS_MODEL = "mt-bench has no model to ask: ftx eval RUN --evaluator mt-bench, or name files with -o mt-bench.answers=FILE or -o mt-bench.judgments=FILE"
FILES_ONLY = "mt-bench.answers and mt-bench.judgments are files to score without a run: ftx eval --evaluator mt-bench -o mt-bench.judgments=FILE"
NEEDS_BASELINE = "mode=pairwise compares with a baseline's answers: -o mt-bench.baseline=FILE, as in FastChat's model_answer"


@plugin
class MTBench(Judging):
    """MT-Bench (Zheng et al., 2023): two-turn answers rated by a judge; scores FastChat's files of answers and judgments too."""

    called = NAME

    max_tokens: int = option(2048, "Longest judgment, in tokens.")
    data: str | None = option(None, "Directory with question.jsonl, reference_answer/*.jsonl and, if FastChat's are wished, judge_prompts.jsonl; or a hub id.")
    mode: Literal["single", "pairwise"] = option("single", "Rate each answer from 1 to 10, or compare it with the baseline's in both orders.")
    baseline: str | None = option(None, "File of the baseline's answers, as in FastChat's model_answer, for mode=pairwise.")
    answers: str | None = option(None, "File or directory of existing answers, as in FastChat's model_answer, to judge without a run.")
    judgments: list[str] | str | None = option(None, "Files of existing judgments, as in FastChat's model_judgment (.gz too), to score without a judge.")
    strict: bool = option(False, "FastChat's rules to the letter: first verdict, any number, repeated rows counted, judged texts not defused.")
    max_questions: int | None = option(None, "Ask only so many questions, taken from the categories in turn.")
    max_new_tokens: int = option(1024, "Longest answer, in tokens.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_questions", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.answers and self.judgments:
            raise ValueError("give answers to be judged or judgments to be scored, not both")

    @hookimpl
    def preflight(self, run: Run) -> list[str]:
        if run.model and (self.answers or self.judgments):
            return [FILES_ONLY]
        if self.judgments:
            return []
        needs = {NEEDS_MODEL: run.model or self.answers, NEEDS_DATA: self.data, NEEDS_BASELINE: self.mode == "single" or self.baseline}
        if reasons := [reason for reason, given in needs.items() if not given]:
            return reasons
        try:
            judged = self._read_files() or [run.model]
        except DataError as error:
            return [str(error).replace("\n", " ")]
        return self.preflight_reasons(run, judged)

    def _read_files(self) -> list[str]:
        """The models of the files of answers; DataError for a file of any kind that cannot be read."""
        from ftx_mt_bench_files import read_answers, read_baseline, read_bench

        read_bench(self.data or "")
        read_baseline(self.baseline)
        return list(read_answers(self.answers)) if self.answers else []

    @hookimpl
    def evaluate_model(self, generate: Generate | None, run: Run) -> Evaluation:
        """`average`, `turn1`, `turn2` and `category:NAME`, from 1 to 10; of pairs `win_rate_adjusted` first, in 0..1.

        `n` counts judgments. From files of answers or of judgments: the same for each model in them.
        """
        from ftx_mt_bench_answering import ask_model
        from ftx_mt_bench_files import read_answers, read_bench
        from ftx_mt_bench_scoring import judge_answers, score_judgments

        if self.judgments:
            return score_judgments(self, [self.judgments] if isinstance(self.judgments, str) else self.judgments, run)
        if self.data is None:
            raise RunError(NEEDS_DATA)
        bench = read_bench(self.data, self.max_questions)
        if self.answers is not None:
            return judge_answers(self, bench, read_answers(self.answers), run)
        if generate is None:
            raise RunError(NEEDS_MODEL)
        return judge_answers(self, bench, {"": ask_model(generate, bench, self.max_new_tokens, run.seed)}, run)

    @hookimpl
    def compare_answers(self, base_items: list[dict[str, Any]], tuned_items: list[dict[str, Any]], run: Run) -> list[Score]:
        """`average_change` and so on by turn and category: tuned minus base, with a paired bootstrap over questions.

        Only here are both phases known, so from here FastChat's files of them and report.html are written, to eval/mt-bench/.
        """
        from ftx_mt_bench_items import write_fastchat
        from ftx_mt_bench_numbers import changes
        from ftx_mt_bench_report import write_report

        phases = {"base": base_items, "tuned": tuned_items}
        asked = [[(item["question_id"], item["turn"]) for item in items] for items in phases.values()]
        if asked[0] != asked[1]:
            raise RunError(
                "mt-bench: the base model was asked other questions than the tuned one, so they cannot be compared.",
                "Evaluate both in the same way: ftx eval RUN --evaluator mt-bench",
            )
        if self.dry_run:
            return []
        base, tuned = (self._ratings_of(items) for items in phases.values())
        changed = changes(base, tuned, run.seed, whole="average" if self.mode == "single" else "win_rate_adjusted")
        if run.directory is not None:
            folder = run.directory.items(NAME, "base").parent
            write_fastchat(folder, phases)
            facts = {"model": run.model, "judge": ", ".join(dict.fromkeys(rating.judge for rating in tuned)), "mode": self.mode}
            write_report(folder / "report.html", facts, {"base": base, "tuned": tuned}, changed, run.seed, self.mode == "pairwise")
        return changed

    def _ratings_of(self, items: list[dict[str, Any]]) -> list[Rating]:
        from ftx_mt_bench_scoring import ratings_of

        categories = {item["question_id"]: item["category"] for item in items}
        return ratings_of(self, [row for item in items for row in item["judgments"]], "", categories)
