"""The evaluator `mt-bench` on files: FastChat's judgments against known answers, what counts of a judgment, and the numbers."""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import math
import random
import sys
from pathlib import Path

import pytest

from ftx.errors import DataError, RunError
from ftx.ledger import Ledger
from ftx.recipe import Recipe
from ftx.run import Run, write_lines
from ftx.testing import ftx
from ftx_llm_judge_asking import Unreadable
from ftx_mt_bench import FILES_ONLY, NEEDS_BASELINE, NEEDS_DATA, NEEDS_MODEL, MTBench
from ftx_mt_bench_files import CATEGORIES, category_of, read_answers, read_bench
from ftx_mt_bench_judgments import GAMES, read_judgments
from ftx_mt_bench_numbers import Match, Rating, changes, clustered_mean, match_scores, rating_scores, table
from ftx_mt_bench_verdicts import fastchat_rating, fastchat_winner, rating, winner

sys.path.insert(0, str(Path(__file__).parent))
import mt_bench_exam as exam

DATA = Path(__file__).parents[3] / "shared" / "data"
REAL = DATA / "mt_bench"
SINGLE, PAIR = REAL / "judgments" / "gpt-4_single.5models.jsonl.gz", REAL / "judgments" / "gpt-4_pair.jsonl.gz"
real = pytest.mark.skipif(not REAL.is_dir(), reason=f"FastChat's files are not at {REAL}")


@pytest.fixture
def run():
    """A run without a model, as `ftx eval` without RUN makes it."""
    said: list[str] = []
    return Run(recipe=Recipe(), ledger=Ledger(), seed=42, say=said.append, notes={"said": said})


def rows_in(file):
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def scores_of(run, *files, **options):
    evaluation = MTBench(judgments=[str(file) for file in files], **options).evaluate_model(None, run)
    return {(score.model, score.metric): score for score in evaluation.scores}


def expected():
    return json.loads((DATA / "expected.json").read_text("utf-8"))["mt_bench (FastChat show_result.py semantics)"]


# --------------------------------------------------------------------------------------------------------------------
# The real judgments
# --------------------------------------------------------------------------------------------------------------------


@real
def test_what_is_read_from_the_texts_is_what_gpt_4s_judges_recorded():
    rows = rows_in(SINGLE)
    assert len(rows) == 800
    assert [rating(row["judgment"]) for row in rows] == [row["score"] for row in rows]
    assert [fastchat_rating(row["judgment"]) for row in rows] == [row["score"] for row in rows]
    pairs = rows_in(PAIR)
    assert len(pairs) == 75
    for row in pairs:
        for game, sides in GAMES.items():
            for read in (winner, fastchat_winner):
                if row[f"{game}_winner"] == "error":
                    with pytest.raises(Unreadable):
                        read(row[f"{game}_judgment"])
                else:
                    assert sides[read(row[f"{game}_judgment"])] == row[f"{game}_winner"]


@real
@pytest.mark.parametrize("strict", [False, True])
def test_means_of_the_single_judgments(run, strict):
    known, scores = expected()["gpt-4_single.5models.jsonl.gz"], scores_of(run, SINGLE, strict=strict)
    for metric in ("turn1", "turn2", "average"):
        for model, value in known[metric].items():
            assert scores[model, metric].value == pytest.approx(value, abs=1e-9)
    for model, categories in known["by_category"].items():
        assert set(categories) == set(CATEGORIES)
        for category, value in categories.items():
            assert scores[model, f"category:{category}"].value == pytest.approx(value, abs=1e-9)
            assert scores[model, f"category:{category}"].n == 20
        assert (scores[model, "average"].n, scores[model, "turn1"].n, scores[model, "average"].unscored) == (known["n"][model], 80, 0)
    assert len(scores) == 5 * (3 + 8)
    assert run.notes["said"] == []


@real
@pytest.mark.parametrize("strict", [False, True])
def test_rates_of_the_pairwise_judgments(run, strict):
    known, scores = expected()["gpt-4_pair.jsonl.gz"], scores_of(run, PAIR, strict=strict)
    for model, values in known["models"].items():
        for metric in ("win_rate", "loss_rate", "win_rate_adjusted"):
            assert scores[model, metric].value == pytest.approx(values[metric], abs=1e-9)
        scored = scores[model, "win_rate"].n
        assert (scored, scores[model, "win_rate"].unscored) == (known["rows"] - known["errors"], known["errors"])
        counts = [round(scores[model, f"{result}_rate"].value * scored) for result in ("win", "loss", "tie")]
        assert counts == [values["win"], values["loss"], values["tie"]]
        assert scores[model, "consistency"].value == pytest.approx(1 - known["inconsistent"] / scored)
    assert "2 of 75 judgments hold no verdict and are unscored" in run.notes["said"][0]


@real
def test_the_baseline_gets_no_scores(run, tmp_path):
    write_lines(tmp_path / "phi-3.jsonl", exam.answers("phi-3", {81: ["a", "b"]}))
    assert {model for model, _ in scores_of(run, PAIR, baseline=str(tmp_path / "phi-3.jsonl"))} == {"phi-3-dpo"}


@real
def test_the_command_prints_a_list_of_scores():
    answer = ftx("eval", "--evaluator", "mt-bench", "-o", f"mt-bench.judgments={SINGLE}", "--json")
    assert answer.exit_code == 0, answer.output
    scores = json.loads(answer.stdout)
    (one,) = [score for score in scores if (score["model"], score["metric"]) == ("llama2_chat_7b", "turn2")]
    assert {name: one[name] for name in ("evaluator", "value", "n", "unscored")} == {"evaluator": "mt-bench", "value": 5.675, "n": 80, "unscored": 0}
    assert one["ci_low"] < 5.675 < one["ci_high"]


@real
def test_two_files_and_a_folder_are_read_together(run):
    assert set(scores_of(run, SINGLE, PAIR)) == set(scores_of(run, REAL / "judgments"))


# --------------------------------------------------------------------------------------------------------------------
# What counts of a judgment
# --------------------------------------------------------------------------------------------------------------------

#: text, our reading (None: unscored), FastChat's (None: -1)
RATINGS = [
    ("Good. Rating: [[8]]", 8, 8),
    ("Rating: [[8.5]]", 8.5, 8.5),
    ("Rating: [[ 7 ]]", 7, None),
    ("Rating: [[10]]", 10, 10),
    ("[[1]]", 1, 1),
    ("Rating: [7]", 7, 7),
    ("The list [3] is fine. Rating: [7]", 7, 3),
    ("It claims [[10]], which is false. Rating: [[2]]", 2, 10),
    ("I gave [[3]] at first, but Rating: [[11]]", None, 3),
    ("Rating: [[3]] or rather [[good]]", None, 3),
    ("Rating: [[rating]]", None, None),
    ("Rating: [[0]]", None, 0),
    ("Rating: [[100]]", None, 100),
    ("Rating: [[-5]]", None, None),
    ("Rating: [[5/10]]", None, None),
    ("Rating: 5", None, None),
    ("a perfect 10", None, None),
    ("$ERROR$", None, None),
    ("", None, None),
    ("Rating: [[true]]", None, None),
    ("Rating: [[٣]]", None, None),
    ("grid[[1, 2], [3, 4]] works. Rating: [[6]]", 6, 6),
]

#: text, our reading, FastChat's
WINNERS = [
    ("Verdict: [[A]]", "A", "A"),
    ("[[B]]", "B", "B"),
    ("[[C]]", "C", "C"),
    ("B says [[A]] of itself, but [[B]]", "B", "A"),
    ("[[C]], no: [[B]]", "B", "B"),
    ("[[A]] ... [[D]]", None, "A"),
    ("[[a]]", None, None),
    ("[A]", None, None),
    ("A is better", None, None),
    ("$ERROR$", None, None),
]


@pytest.mark.parametrize(("readers", "cases"), [((rating, fastchat_rating), RATINGS), ((winner, fastchat_winner), WINNERS)], ids=["ratings", "winners"])
def test_texts(readers, cases):
    for text, *wanted in cases:
        for read, value in zip(readers, wanted, strict=True):
            if value is None:
                with pytest.raises(Unreadable):
                    read(text)
            else:
                assert read(text) == value, text


def test_whole_ratings_are_written_as_fastchat_writes_them():
    assert json.dumps([rating("[[8]]"), rating("[[8.0]]"), rating("[[8.5]]")]) == "[8, 8, 8.5]"


def judgment(score, text=None, question=81, turn=1, model="m", judge="gpt-4", **more):
    text = f"Rating: [[{score}]]" if text is None else text
    return {"question_id": question, "model": model, "judge": [judge, "single-v1"], "judgment": text, "score": score, "turn": turn, **more}


def values_of(tmp_path, rows, **options):
    write_lines(tmp_path / "judgments.jsonl", rows)
    found = read_judgments([str(tmp_path / "judgments.jsonl")], **options)
    return [one.value for one in found.ratings], found


def test_of_duplicates_the_last_counts(tmp_path, run):
    rows = [judgment(3), judgment(9, question=82), judgment(5), judgment(7, turn=2), judgment(1, judge="other"), judgment(2, model="n"), judgment(8)]
    values, found = values_of(tmp_path, rows)
    assert (sorted(values), found.superseded) == ([1, 2, 7, 8, 9], 2)
    assert values_of(tmp_path, rows, strict=True)[0] == [3, 9, 5, 7, 1, 2, 8]
    scores = scores_of(run, tmp_path / "judgments.jsonl")
    assert (scores["m", "average"].value, scores["m", "average"].n) == (25 / 4, 4)
    assert run.notes["said"] == ["mt-bench: 2 judgments are set aside for later ones of the same question, model, turn and judge."]
    assert scores_of(run, tmp_path / "judgments.jsonl", strict=True)["m", "average"].n == 6


def test_a_later_failure_replaces_an_earlier_rating(tmp_path):
    assert values_of(tmp_path, [judgment(3), judgment(-1, "$ERROR$")])[0] == [None]


def test_minus_one_is_unscored_and_counted(tmp_path, run):
    rows = [judgment(4), judgment(-1, "no verdict", question=82), judgment(-1, "Rating: [[9]]", question=91), judgment(6, turn=2)]
    values, found = values_of(tmp_path, rows)
    assert values == [4, None, None, 6]
    assert [one.reason for one in found.ratings] == ["", "no verdict is recorded", "no verdict is recorded", ""]
    scores = scores_of(run, tmp_path / "judgments.jsonl")
    assert [(scores["m", name].value, scores["m", name].n, scores["m", name].unscored) for name in ("average", "turn1")] == [(5, 2, 2), (4, 1, 2)]
    assert ("m", "category:roleplay") not in scores  # nothing in it is rated, and a mean of nothing is no number
    assert scores_of(run, tmp_path / "judgments.jsonl", strict=True)["m", "average"].value == 5


def test_a_record_that_was_read_from_its_text_is_read_again(tmp_path, run):
    forged = judgment(10, "The answer says [[10]] of itself. Rating: [[2]]")
    values, found = values_of(tmp_path, [forged, judgment(5, question=82)])
    assert (values, found.reread) == ([2, 5], 1)
    assert values_of(tmp_path, [forged, judgment(5, question=82)], strict=True)[0] == [10, 5]
    scores_of(run, tmp_path / "judgments.jsonl")
    assert run.notes["said"][-1] == "warning: mt-bench counts 1 judgments otherwise than they are recorded: the last verdict in the text binds."


#: recorded score and text -> what counts, what counts in strict mode
RECORDED = [
    ((6, "Rating: [[9]]"), 6, 6),  # not read from this text: somebody's own
    ((6, "by hand"), 6, 6),
    ((99, "Rating: [[99]]"), None, 99),
    ((0, "by hand"), None, 0),
    ((True, "by hand"), None, None),
    ((math.nan, "by hand"), None, None),
    (("7", "by hand"), None, None),
    ((None, "by hand"), None, None),
]


def test_records(tmp_path):
    for (score, text), ours, strict in RECORDED:
        if score is not math.nan:  # no JSON
            assert values_of(tmp_path, [judgment(score, text)])[0] == [ours], (score, text)
            assert values_of(tmp_path, [judgment(score, text)], strict=True)[0] == [strict], (score, text)


def test_a_pair_needs_both_games(tmp_path, run):
    def pair(question, g1, g2):
        return {"question_id": question, "model_1": "x", "model_2": "y", "g1_winner": g1, "g2_winner": g2, "judge": ["j", "pair-v2"], "turn": 1}

    games = [("model_1", "model_1"), ("model_2", "model_2"), ("model_1", "model_2"), ("tie", "tie"), ("model_1", "tie"), ("error", "model_1"), ("model_1", "?")]
    write_lines(tmp_path / "pairs.jsonl", [pair(81 + at, *winners) for at, winners in enumerate(games)])
    scores = scores_of(run, tmp_path / "pairs.jsonl")
    assert [scores["x", f"{one}_rate"].value for one in ("win", "loss", "tie")] == [0.2, 0.2, 0.6]
    assert (scores["x", "win_rate"].n, scores["x", "win_rate"].unscored, scores["x", "consistency"].value) == (5, 2, 0.6)


def test_categories_come_from_the_ids_or_from_the_questions(tmp_path, run):
    assert [category_of(number) for number in (80, 81, 90, 91, 160, 161, "81", True)] == [
        None,
        "writing",
        "writing",
        "roleplay",
        "humanities",
        None,
        None,
        None,
    ]
    write_lines(tmp_path / "judgments.jsonl", [judgment(4, question=2), judgment(8, question=3)])
    assert set(scores_of(run, tmp_path / "judgments.jsonl")) == {("m", "average"), ("m", "turn1")}
    with_questions = scores_of(run, tmp_path / "judgments.jsonl", data=str(exam.bench(tmp_path / "bench")))
    assert {name: score.value for (_, name), score in with_questions.items()} == {"average": 6, "turn1": 6, "category:math": 4, "category:stem": 8}


def test_faults_of_files_name_file_and_line(tmp_path, run):
    for row in ({"question_id": 81, "turn": 1, "score": 3}, {**judgment(3), "turn": "1"}, {**judgment(3), "question_id": None}):
        write_lines(tmp_path / "bad.jsonl", [judgment(3), row])
        with pytest.raises(DataError, match="bad.jsonl:2: not a judgment: it needs question_id, turn and model"):
            scores_of(run, tmp_path / "bad.jsonl")
    with pytest.raises(DataError, match="nothing.jsonl: no such file"):
        scores_of(run, tmp_path / "nothing.jsonl")
    write_lines(tmp_path / "failed.jsonl", [judgment(-1, "$ERROR$")])
    with pytest.raises(RunError, match=r"none of the 1 judgments in .*failed.jsonl holds a verdict \(no verdict is recorded\)"):
        scores_of(run, tmp_path / "failed.jsonl")


# --------------------------------------------------------------------------------------------------------------------
# Questions and answers
# --------------------------------------------------------------------------------------------------------------------


@real
def test_the_real_bench():
    bench = read_bench(str(REAL))
    assert (len(bench.questions), {len(question.turns) for question in bench.questions}) == (80, {2})
    assert [question.category for question in bench.questions] == [category_of(question.id) for question in bench.questions]
    with_reference = [question for question in bench.questions if bench.references["gpt-4"].get(question.id)]
    assert {question.category for question in with_reference} == {"math", "reasoning", "coding"}
    assert {prompt.name for prompt in bench.prompts.values()} >= {"single-v1", "pair-math-v1-multi-turn"}
    assert [(question.id, question.category) for question in read_bench(str(REAL), 9).questions][:3] == [(81, "writing"), (82, "writing"), (91, "roleplay")]
    assert len({question.category for question in read_bench(str(REAL), 8).questions}) == 8


@real
def test_the_real_answers():
    models = read_answers(str(REAL / "model_answer"))
    assert {model: len(answers) for model, answers in models.items()} == dict.fromkeys(["alpaca-13b", "gpt-4", "llama-13b", "vicuna-13b-v1.3"], 80)


def test_a_copy_of_the_questions_in_the_hubs_form(tmp_path):
    write_lines(tmp_path / "copy.jsonl", [{"prompt_id": 81, "category": "writing", "prompt": ["a?", "b?"], "reference": []}])
    (question,) = read_bench(str(tmp_path / "copy.jsonl")).questions
    assert (question.id, question.category, question.turns, question.reference) == (81, "writing", ("a?", "b?"), ())


def test_faults_of_questions_answers_and_prompts(tmp_path):
    data = exam.bench(tmp_path)
    write_lines(data / "judge_prompts.jsonl", [{"name": "single-v1", "system_prompt": "", "prompt_template": "{question}"}])
    with pytest.raises(DataError, match="judge_prompts.jsonl: it has no prompt called 'single-v1-multi-turn'"):
        read_bench(str(data))
    write_lines(data / "judge_prompts.jsonl", [{"name": "single-v1", "system_prompt": "", "prompt_template": "{quest}"}])
    with pytest.raises(DataError, match="judge_prompts.jsonl: 'single-v1' cannot be filled in"):
        read_bench(str(data))
    write_lines(data / "question.jsonl", [{"question_id": 1, "turns": []}])
    with pytest.raises(DataError, match="question.jsonl:1: not a question: it needs question_id and turns"):
        read_bench(str(data))
    write_lines(tmp_path / "answers.jsonl", [{"question_id": 1, "choices": []}])
    with pytest.raises(DataError, match="answers.jsonl:1: not an answer: it needs question_id and choices"):
        read_answers(str(tmp_path / "answers.jsonl"))


def test_options_and_preflight(tmp_path, run):
    data = str(exam.bench(tmp_path))
    for given, reason in (({"max_questions": 0}, "max_questions must be at least 1"), ({"answers": "a", "judgments": "b"}, "not both")):
        with pytest.raises(ValueError, match=reason):
            MTBench(**given)
    assert MTBench(judgments="x").preflight(run) == []
    assert MTBench().preflight(run) == [NEEDS_MODEL, NEEDS_DATA]
    assert MTBench(data=data, answers="x", mode="pairwise").preflight(run) == [NEEDS_BASELINE]
    (reason,) = MTBench(data=str(tmp_path / "nothing"), answers="x").preflight(run)
    assert "nothing" in reason and "\n" not in reason
    run.model = "smollm2"
    assert MTBench(judgments="x").preflight(run) == [FILES_ONLY]
    (reason,) = MTBench(data=data).preflight(run)
    assert "no judge is named: -o mt-bench.model=MODEL" in reason
    answer = ftx("eval", "--evaluator", "mt-bench")
    assert answer.exit_code == 2 and "mt-bench has no model to ask" in answer.output


# --------------------------------------------------------------------------------------------------------------------
# Numbers
# --------------------------------------------------------------------------------------------------------------------


def ratings(values, model="m", judge="j"):
    """One rating for each (question, turn) -> value; the categories are MT-Bench's."""
    return [
        Rating(model=model, question=question, category=category_of(question), turn=turn, judge=judge, value=value)
        for (question, turn), value in values.items()
    ]


def test_the_average_is_over_all_ratings_and_not_of_the_turns_means():
    scores = {score.metric: score for score in rating_scores(ratings({(81, 1): 10, (82, 1): 8, (83, 1): 6, (81, 2): 2, (82, 2): None}), seed=1)}
    assert (scores["turn1"].value, scores["turn2"].value, scores["average"].value) == (8, 2, 6.5)
    assert (scores["average"].n, scores["average"].unscored, scores["turn2"].ci_low) == (4, 1, None)


def test_the_bootstrap_resamples_questions():
    random.seed(3)
    questions = list(range(40))
    values = [random.gauss(5, 2) for _ in questions]
    value, low, high = clustered_mean(values, questions, seed=1)
    # a second turn equal to the first tells nothing new: the interval must not shrink
    assert clustered_mean(values * 2, questions * 2, seed=1) == pytest.approx((value, low, high))
    alone = clustered_mean(values * 2, range(80), seed=1)
    assert alone[2] - alone[1] < 0.8 * (high - low)
    assert clustered_mean(values, questions, seed=1) == (value, low, high) != clustered_mean(values, questions, seed=2)
    assert clustered_mean([3.0, 5.0], [81, 81], seed=1) == (4.0, None, None)
    assert clustered_mean([0.1] * 30, range(30), seed=1) == pytest.approx((0.1, 0.1, 0.1))


def test_the_bootstrap_agrees_with_scipys():
    from scipy.stats import bootstrap

    values = [float((7 * at) % 11) for at in range(80)]
    theirs = bootstrap((values,), lambda x, axis: x.mean(axis=axis), n_resamples=9999, method="percentile", rng=0).confidence_interval
    _, low, high = clustered_mean(values, range(80), seed=0)
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.06)


def test_changes_are_paired():
    base = ratings({(81, 1): 2, (81, 2): 3, (91, 1): 9, (91, 2): None})
    tuned = ratings({(81, 1): 4, (81, 2): 5, (91, 1): 11, (91, 2): 10})
    scores = {score.metric: score for score in changes(base, tuned, seed=1)}
    assert list(scores) == ["average_change", "turn1_change", "turn2_change", "category:writing_change", "category:roleplay_change"]
    whole = scores["average_change"]
    # the questions differ by much, what they gained does not: unpaired, the interval would be wide
    assert (whole.value, whole.ci_low, whole.ci_high, whole.n, whole.unscored, whole.model) == (2, 2, 2, 3, 1, None)
    assert changes(base, ratings({(81, 1): 4}, judge="another"), seed=1) == []


def test_matches_of_several_models():
    def match(one, other, winner, question):
        return Match(model_1=one, model_2=other, question=question, category="stem", turn=1, judge="j", winners=(winner, winner))

    matches = [match("a", "b", "model_1", 1), match("a", "c", "model_2", 1), match("b", "c", "tie", 2)]
    adjusted = {score.model: (score.value, score.n) for score in match_scores(matches, seed=1) if score.metric == "win_rate_adjusted"}
    assert adjusted == {"a": (0.5, 2), "b": (0.25, 2), "c": (0.75, 2)}
    assert {score.model for score in match_scores(matches, seed=1, baseline="a")} == {"b", "c"}


def test_the_table():
    lines = table(ratings({(91, 1): 9, (91, 2): None, (81, 1): 2, (81, 2): 3, (82, 1): 3.5, (82, 2): 4}))
    assert [line.split() for line in lines] == [
        ["category", "turn", "1", "turn", "2", "both"],
        ["writing", "2.75", "3.50", "3.12"],
        ["roleplay", "9.00", "-", "9.00"],
        ["all", "4.83", "3.50", "4.30"],
    ]
    assert len({len(line) for line in lines}) == 1


def test_the_entry_point():
    (entry,) = importlib.metadata.entry_points(group="ftx.evaluator", name="mt-bench")
    assert entry.load() is MTBench
