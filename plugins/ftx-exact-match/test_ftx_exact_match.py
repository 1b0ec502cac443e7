"""The evaluator `exact-match`: evaluate's semantics, the numbers against published ones, hostile answers, the change."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ftx.data import to_dataset
from ftx.errors import RunError
from ftx.ledger import Ledger
from ftx.recipe import Choice, Recipe
from ftx.run import Run, RunDir
from ftx_exact_match import ExactMatch
from ftx_exact_match_numbers import mcnemar, ratio_of_sums, wilson

DATA = Path(__file__).parents[3] / "shared" / "data"


class Answers:
    """A generator that gives ready answers in order and keeps how it was asked."""

    def __init__(self, answers, tokenizer=None):
        self.answers, self.tokenizer, self.calls = answers, tokenizer, []

    def __call__(self, prompts, **options):
        self.calls.append((list(prompts), options))
        return list(self.answers)


@pytest.fixture
def said():
    return []


@pytest.fixture
def run(said):
    recipe = Recipe(eval_data="eval.jsonl", evaluators=(Choice("exact-match"),))
    return Run(recipe=recipe, ledger=Ledger(), seed=42, say=said.append)


def rows(*pairs):
    return to_dataset([{"prompt": prompt, "completion": reference} for prompt, reference in pairs])


def evaluated(references, answers, run, **options):
    dataset = rows(*((f"question {i}", reference) for i, reference in enumerate(references)))
    evaluation = ExactMatch(**options).evaluate_model(Answers(answers), dataset, run)
    return evaluation, {score.metric: score for score in evaluation.scores}


# --------------------------------------------------------------------------------------------------------------------
# When two texts are equal
# --------------------------------------------------------------------------------------------------------------------

REFERENCES = ["the cat", "theater", "YELLING", "agent007"]
PREDICTIONS = ["cat?", "theater", "yelling", "agent"]

#: options -> the share that evaluate's exact_match gives for the lists above
EVALUATE = [
    ({}, 0.25),
    ({"ignore_case": True}, 0.5),
    ({"ignore_numbers": True}, 0.5),
    ({"ignore_punctuation": True}, 0.25),
    ({"regexes_to_ignore": ["the ", "yell"], "ignore_case": True, "ignore_punctuation": True}, 0.5),
    ({"regexes_to_ignore": ["the ", "yell", "YELL"], "ignore_case": True, "ignore_punctuation": True}, 0.75),
    ({"regexes_to_ignore": ["the ", "yell", "YELL"], "ignore_case": True, "ignore_punctuation": True, "ignore_numbers": True}, 1.0),
]


@pytest.mark.parametrize(("options", "expected"), EVALUATE)
def test_metric_gives_what_evaluate_gives(options, expected, tmp_path):
    from ftx_exact_match_metric import ExactMatchMetric

    metric = ExactMatchMetric(keep_in_memory=True, cache_dir=str(tmp_path))
    result = metric.compute(predictions=PREDICTIONS, references=REFERENCES, **options)
    assert result["exact_match"] == expected
    assert sum(result["matches"]) == expected * 4


#: rules, answer, reference, equal?
COMPARED = [
    # every character counts by default, white space too, as in evaluate
    ({}, "a", "a", True),
    ({}, "a ", "a", False),
    ({}, "a", "A", False),
    ({}, "", "", True),
    ({}, "x\0", "x", False),
    # the regexes come before lower case, one after another
    ({"regexes_to_ignore": ["B"], "ignore_case": True}, "aB", "a", True),
    ({"regexes_to_ignore": ["b"], "ignore_case": True}, "aB", "a", False),
    ({"regexes_to_ignore": ["x", "ab"]}, "axbc", "c", True),
    ({"regexes_to_ignore": ["ab", "x"]}, "axbc", "c", False),
    # they come before punctuation and digits too
    ({"regexes_to_ignore": [r"a\.b"], "ignore_punctuation": True}, "a.bc", "c", True),
    ({"regexes_to_ignore": ["ab"], "ignore_punctuation": True}, "a.bc", "c", False),
    ({"regexes_to_ignore": ["a1"], "ignore_numbers": True}, "a1c", "c", True),
    # punctuation and digits are the ASCII ones
    ({"ignore_punctuation": True}, "it's: fine!", "its fine", True),
    ({"ignore_punctuation": True}, "« a »", "a", False),
    ({"ignore_numbers": True}, "a1b2", "ab", True),
    ({"ignore_numbers": True}, "a²", "a", False),
    # nothing is left of either: equal only if they were equal before
    ({"ignore_punctuation": True}, "?!", "...", False),
    ({"ignore_punctuation": True}, "...", "...", True),
    ({"ignore_numbers": True}, "41", "42", False),
    ({"regexes_to_ignore": [".*"]}, "anything", "42", False),
    ({"ignore_numbers": True}, "", "42", False),
    # ours: white space around goes first, so that anchors hold, and last
    ({"strip": True}, " a\n", "a", True),
    ({"strip": True}, "a  b", "a b", False),
    ({"strip": True, "regexes_to_ignore": [r"\.$"]}, "a.\n", "a", True),
    ({"strip": True, "regexes_to_ignore": ["^Answer:"]}, "Answer: 42", "42", True),
    ({"strip": True}, " \n", "", True),
]


@pytest.mark.parametrize(("rules", "answer", "reference", "equal"), COMPARED)
def test_rules(rules, answer, reference, equal):
    from ftx_exact_match_metric import Rules

    assert Rules(**rules).match(answer, reference) is equal
    assert Rules(**rules).match(reference, answer) is equal


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("Paris", "paris.", 1.0),
        ("the Eiffel Tower", "Eiffel tower", 1.0),
        ("in Paris", "Paris", 2 / 3),
        ("Paris Paris Paris", "Paris", 0.5),  # a repeated word counts once for each time it stands in the reference
        ("London", "Paris", 0.0),
        ("", "Paris", 0.0),
        ("", "", 1.0),
        ("the", "a", 0.0),  # nothing is left of either
        ("A", "A", 1.0),
        ("theater", "ater", 0.0),
    ],
)
def test_token_f1(answer, reference, f1):
    from ftx_exact_match_metric import token_f1

    assert token_f1(answer, reference) == pytest.approx(f1)


# --------------------------------------------------------------------------------------------------------------------
# The numbers
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998) 857, the score method without continuity correction
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        # z^2 / (n + z^2) and its complement
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (50, 100, 0.4038, 0.5962),
    ],
)
def test_wilson(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)
    assert 0 <= wilson(successes, n)[0] <= successes / n <= wilson(successes, n)[1] <= 1


@pytest.mark.parametrize(
    ("fixed", "broken", "p"),
    [
        (12, 2, 0.0129),  # Armitage and Berry (1994), two culture media
        (1, 7, 0.0703),  # Fagerland et al. (2013), airway hyper-responsiveness
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 0, 0.0625),
        (6, 6, 1.0),
        (6, 0, 0.03125),
    ],
)
def test_mcnemar(fixed, broken, p):
    assert mcnemar(fixed, broken) == pytest.approx(p, abs=5e-5)
    assert mcnemar(broken, fixed) == mcnemar(fixed, broken)


def test_mcnemar_is_the_binomial_tail_and_survives_large_counts():
    tail = sum(math.comb(61, k) for k in range(21))
    assert mcnemar(41, 20) == 2 * tail / 2**61
    assert mcnemar(5000, 3000) < 1e-100
    assert 0.9 < mcnemar(10000, 10001) <= 1


def test_bootstrap_is_seeded_and_covers_the_value():
    values = [0.0, 1.0, 0.5, 0.25] * 25
    value, low, high = ratio_of_sums(values, [1] * 100, seed=1)
    assert value == 0.4375
    # the normal approximation: 1.96 * sd / sqrt(n) = 0.0727
    assert (low, high) == pytest.approx((0.4375 - 0.0727, 0.4375 + 0.0727), abs=0.01)
    assert ratio_of_sums(values, [1] * 100, seed=1) == (value, low, high)
    assert ratio_of_sums(values, [1] * 100, seed=2) != (value, low, high)


def test_bootstrap_without_a_denominator_or_with_one_item():
    assert ratio_of_sums([0, 0], [0, 0], seed=1) == (0.0, 0.0, 0.0)
    assert ratio_of_sums([1], [2], seed=1) == (0.5, None, None)


def test_evaluation_leaves_the_random_state_as_it_was(run):
    import numpy
    import torch

    numpy.random.seed(3)
    torch.manual_seed(3)
    before, torch_before = numpy.random.get_state()[1].tolist(), torch.get_rng_state()
    evaluated(["a", "b"], ["a", "c"], run)
    assert numpy.random.get_state()[1].tolist() == before
    assert torch.equal(torch.get_rng_state(), torch_before)


# --------------------------------------------------------------------------------------------------------------------
# An evaluation
# --------------------------------------------------------------------------------------------------------------------


def test_scores_items_and_their_order(run):
    evaluation, scores = evaluated(["Paris", "4", "blue sky"], ["Paris\n", "five", "a blue Sky"], run)
    assert list(scores) == ["exact_match", "token_f1"]
    assert scores["exact_match"].value == pytest.approx(1 / 3)
    assert (scores["exact_match"].ci_low, scores["exact_match"].ci_high) == wilson(1, 3)
    assert scores["token_f1"].value == pytest.approx(2 / 3)
    assert scores["token_f1"].ci_low <= 2 / 3 <= scores["token_f1"].ci_high
    assert all((score.n, score.unscored) == (3, 0) for score in evaluation.scores)
    assert evaluation.items == [
        {"prompt": "question 0", "answer": "Paris\n", "reference": "Paris", "verdict": "correct", "f1": 1.0},
        {"prompt": "question 1", "answer": "five", "reference": "4", "verdict": "wrong", "f1": 0.0},
        {"prompt": "question 2", "answer": "a blue Sky", "reference": "blue sky", "verdict": "wrong", "f1": 1.0},
    ]


def test_asks_once_greedily_in_the_order_of_the_data(run):
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "2+2?"}]
    dataset = to_dataset(
        [{"messages": [*messages, {"role": "assistant", "content": "4"}]}, {"messages": [messages[1], {"role": "assistant", "content": "four"}]}]
    )
    generate = Answers(["4", "4"])
    evaluation = ExactMatch(max_new_tokens=7).evaluate_model(generate, dataset, run)
    assert generate.calls == [([messages, messages[1:]], {"max_new_tokens": 7, "temperature": 0})]
    assert [(item["reference"], item["verdict"]) for item in evaluation.items] == [("4", "correct"), ("four", "wrong")]


def test_options_reach_the_comparison(run):
    _, scores = evaluated(["Paris"], ["the answer is: paris!"], run, regexes_to_ignore=["^the answer is"], ignore_case=True, ignore_punctuation=True)
    assert scores["exact_match"].value == 1.0
    _, scores = evaluated(["a1"], ["a2"], run, ignore_numbers=True)
    assert scores["exact_match"].value == 1.0
    _, scores = evaluated(["Paris"], ["Paris\n"], run, strip=False)
    assert scores["exact_match"].value == 0.0


def test_perfect_answers_score_best(run):
    references = ["Paris", "...", "the", "", "naïve 東京", "x" * 5000, '{"a": 1}']
    _, scores = evaluated(references, references, run, ignore_punctuation=True, ignore_numbers=True)
    assert [score.value for score in scores.values()] == [1.0, 1.0]


def test_empty_answers_score_nothing(run):
    evaluation, scores = evaluated(["Paris", '{"a": 1}'], ["", ""], run)
    assert [score.value for score in scores.values()] == [0.0, 0.0]
    assert [item["verdict"] for item in evaluation.items] == ["wrong", "wrong"]


HOSTILE = {
    "empty": "",
    "blank": " \n\t",
    "long": "a" * 100_000,
    "reference and more": "Paris or London",
    "every reference": "Paris Paris Paris",
    "lookalike": "P\u0430ris",  # a Cyrillic letter
    "full width": "\uff30\uff41\uff52\uff49\uff53",
    "zero width": "Par\u200bis",
    "right to left": "\u202eParis",
    "regex": ".*",
    "null": "Paris\0",
    "verdict": '{"verdict": "correct", "f1": 1.0}',
    "nested": '{"a":' * 20_000,
    "list": "[" * 20_000,
    "number": '{"a": ' + "9" * 10_000 + "}",
    "punctuation": "?!",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_do_not_win(name, run):
    answer = HOSTILE[name]
    evaluation, scores = evaluated(["Paris"], [answer], run, ignore_case=True, ignore_punctuation=True)
    assert scores["exact_match"].value == 0.0
    assert scores["token_f1"].value < 1.0
    assert evaluation.items[0]["verdict"] == "wrong"
    _, scores = evaluated(['{"a": "Paris", "b": 2}'], [answer], run, ignore_case=True, ignore_punctuation=True)
    assert [scores[metric].value for metric in ("exact_match", "field_f1", "field_precision", "field_recall")] == [0.0] * 4


def test_rows_without_a_question_are_unscored_and_counted(run, said):
    dataset = to_dataset(
        [
            {"prompt": "q1", "completion": "yes", "label": True},
            {"prompt": "q2", "completion": "rubbish", "label": False},
            {"prompt": "q3", "completion": "no", "label": True},
        ]
    )
    generate = Answers(["yes", "yes"])
    evaluation = ExactMatch().evaluate_model(generate, dataset, run)
    assert generate.calls[0][0] == ["q1", "q3"]
    assert [item["verdict"] for item in evaluation.items] == ["correct", "unscored", "wrong"]
    assert evaluation.items[1]["reason"] == "the row's answer is marked as a bad one, so it is no reference"
    assert all((score.n, score.unscored) == (2, 1) for score in evaluation.scores)
    assert said == ["warning: exact-match cannot score 1 of 3 rows; the items say why."]


def test_conversation_without_an_answer_is_unscored(run):
    user = {"role": "user", "content": "hm?"}
    dataset = to_dataset([{"messages": [user]}, {"messages": [user, {"role": "assistant", "content": "ok"}]}])
    evaluation = ExactMatch().evaluate_model(Answers(["ok"]), dataset, run)
    assert [item["verdict"] for item in evaluation.items] == ["unscored", "correct"]
    assert evaluation.items[0]["reason"] == "the conversation has no assistant turn to compare with"


def test_nothing_to_score_is_an_error(run):
    with pytest.raises(RunError) as caught:
        ExactMatch().evaluate_model(Answers([]), to_dataset([{"text": "one"}, {"text": "two"}]), run)
    assert str(caught.value) == (
        "evaluator 'exact-match' can score none of the 2 rows of the evaluation data (a row of plain text holds no question).\n"
        "evaluator 'exact-match' needs questions with answers: give --eval-data FILE."
    )
    with pytest.raises(RunError, match=r"needs questions with answers: give --eval-data FILE\."):
        ExactMatch().evaluate_model(Answers([]), None, run)


def test_a_lost_answer_is_an_error_and_not_a_shift(run):
    with pytest.raises(ValueError, match="shorter"):
        ExactMatch().evaluate_model(Answers(["a"]), rows(("q1", "a"), ("q2", "b")), run)


def test_long_references_are_announced(run, said):
    from ftx.testing.tiny import tiny_tokenizer

    generate = Answers(["a", "b"], tiny_tokenizer())
    ExactMatch(max_new_tokens=4).evaluate_model(generate, rows(("q1", "a"), ("q2", "bbbbbb")), run)
    assert said == [
        "warning: 1 of 2 references are longer than exact-match's max_new_tokens=4 (the longest has 6 tokens), so no answer can equal them:"
        " -o exact-match.max_new_tokens=7"
    ]


def test_a_real_model_is_asked(run):
    from ftx.generate import Generate
    from ftx.testing.tiny import tiny_model, tiny_tokenizer

    generate = Generate(tiny_model().eval(), tiny_tokenizer())
    dataset = rows(("a longer question", "x"), ("q", "y"))
    first, again = (ExactMatch(max_new_tokens=5).evaluate_model(generate, dataset, run) for _ in range(2))
    assert first == again
    assert first.scores[0].n == 2
    answers = generate(["a longer question", "q"], max_new_tokens=5)
    evaluation = ExactMatch(max_new_tokens=5).evaluate_model(generate, rows(("a longer question", answers[0]), ("q", answers[1])), run)
    assert evaluation.scores[0].value == 1.0


# --------------------------------------------------------------------------------------------------------------------
# JSON answers
# --------------------------------------------------------------------------------------------------------------------


def test_field_scores_by_hand(run):
    references = ['{"name": "Ada", "born": 1815, "tags": ["x", "y"]}', '{"name": "Alan", "born": 1912}', '{"name": "Grace"}']
    answers = ['{"born": 1815.0, "name": "Ada", "tags": ["y", "x"], "more": null}', "Alan, 1912", '{"name": "Grace"}']
    evaluation, scores = evaluated(references, answers, run)
    # matched 2 + 0 + 1, given 5 + 0 + 1, expected 4 + 2 + 1
    assert [item["fields"] for item in evaluation.items] == [
        {"matched": 2, "given": 5, "expected": 4, "valid_json": True},
        {"matched": 0, "given": 0, "expected": 2, "valid_json": False},
        {"matched": 1, "given": 1, "expected": 1, "valid_json": True},
    ]
    assert list(scores) == ["exact_match", "token_f1", "field_f1", "field_precision", "field_recall", "valid_json"]
    assert scores["field_precision"].value == pytest.approx(3 / 6)
    assert scores["field_recall"].value == pytest.approx(3 / 7)
    assert scores["field_f1"].value == pytest.approx(6 / 13)
    assert scores["valid_json"].value == pytest.approx(2 / 3)
    assert (scores["valid_json"].ci_low, scores["valid_json"].ci_high) == wilson(2, 3)
    assert all(score.n == 3 and score.ci_low <= score.value <= score.ci_high for score in evaluation.scores)


@pytest.mark.parametrize(
    ("given", "expected", "same"),
    [
        ({"a": 1}, {"a": 1.0}, True),
        ({"a": True}, {"a": 1}, False),
        ({"a": "1"}, {"a": 1}, False),
        ({"a": None}, {"a": False}, False),
        ({"a": []}, {"a": {}}, False),
        ({"a": {}}, {"a": {}}, True),
        ({"a.b": 1}, {"a": {"b": 1}}, False),
        ({"a": {"0": 1}}, {"a": [1]}, False),
        ({"a": [1, 2]}, {"a": [2, 1]}, False),
        ({"a": " x "}, {"a": "x"}, True),
        ({"a": "X"}, {"a": "x"}, False),
        ({"A": 1}, {"a": 1}, False),
    ],
)
def test_fields_are_equal(given, expected, same):
    from ftx_exact_match_metric import Rules, flatten

    assert (flatten(given, Rules(strip=True)) == flatten(expected, Rules(strip=True))) is same


def test_deep_json_is_flattened_without_recursion():
    from ftx_exact_match_metric import Rules, flatten

    document = {"a": 1}
    for _ in range(5000):
        document = {"a": [document]}
    ((path, value),) = flatten(document, Rules()).items()
    assert (len(path), value) == (10_001, ("number", 1))


@pytest.mark.parametrize("text", ["", "null", "[]", '"a"', "1", "{", '{"a": NaN}', '{"a": 1} {"a": 1}', '```json\n{"a": 1}\n```', "{'a': 1}", "\ufeff{}"])
def test_what_is_no_json_object(text):
    from ftx_exact_match_metric import json_object

    assert json_object(text) is None


def test_options_apply_to_texts_in_fields(run):
    _, scores = evaluated(['{"city": "Paris"}'], ['{"city": "PARIS!"}'], run, ignore_case=True, ignore_punctuation=True)
    assert scores["field_f1"].value == 1.0


def test_fields_only_where_every_reference_is_an_object(run, said):
    _, scores = evaluated(['{"a": 1}', "plain"], ['{"a": 1}', "plain"], run)
    assert list(scores) == ["exact_match", "token_f1"]
    assert said == ["exact-match: 1 of 2 references are JSON objects; fields are scored only where all are."]
    _, scores = evaluated(["{}"], ["{}"], run)
    assert list(scores) == ["exact_match", "token_f1"]


# --------------------------------------------------------------------------------------------------------------------
# The change
# --------------------------------------------------------------------------------------------------------------------


def items(verdicts):
    return [{"prompt": f"q{i}", "answer": "", "reference": "r", "verdict": verdict, "f1": 0.0} for i, verdict in enumerate(verdicts)]


def test_change(run):
    base = items(["wrong"] * 12 + ["correct"] * 2 + ["correct"] * 20 + ["wrong"] * 16 + ["unscored"])
    tuned = items(["correct"] * 12 + ["wrong"] * 2 + ["correct"] * 20 + ["wrong"] * 16 + ["unscored"])
    scores = {score.metric: score for score in ExactMatch().compare_answers(base, tuned, run)}
    assert {metric: score.value for metric, score in scores.items()} == {"fixed": 12, "broken": 2, "unchanged": 36, "p_value": pytest.approx(0.0129, abs=5e-5)}
    assert all((score.n, score.unscored) == (50, 1) for score in scores.values())


def test_change_of_items_read_from_disk(run, tmp_path):
    directory = RunDir(tmp_path)
    messages = [{"role": "user", "content": "Qué?"}]
    dataset = to_dataset([{"prompt": messages, "completion": [{"role": "assistant", "content": "sí"}]}])
    for phase, answer in (("base", "no"), ("tuned", "sí")):
        directory.write_items("exact-match", phase, ExactMatch().evaluate_model(Answers([answer]), dataset, run).items)
    base, tuned = (directory.read_items("exact-match", phase) for phase in ("base", "tuned"))
    assert tuned == [{"prompt": messages, "answer": "sí", "reference": "sí", "verdict": "correct", "f1": 1.0}]
    assert [score.value for score in ExactMatch().compare_answers(base, tuned, run)] == [1, 0, 0, 1.0]


def test_change_refuses_items_of_other_questions(run):
    remedy = "Evaluate both on the same data: ftx eval RUN --evaluator exact-match"
    with pytest.raises(RunError) as caught:
        ExactMatch().compare_answers(items(["wrong"]), items(["wrong"] * 2), run)
    assert str(caught.value) == f"exact-match: the base model has 1 items and the tuned one 2, so they cannot be compared.\n{remedy}"
    other = items(["wrong"] * 3)
    other[1]["prompt"] = "something else"
    with pytest.raises(RunError) as caught:
        ExactMatch().compare_answers(items(["wrong"] * 3), other, run)
    assert str(caught.value) == f"exact-match: item 2 is another question for the base model than for the tuned one, so they cannot be compared.\n{remedy}"


# --------------------------------------------------------------------------------------------------------------------
# The plugin
# --------------------------------------------------------------------------------------------------------------------


def test_preflight(run):
    assert ExactMatch().preflight(run) == []
    run.recipe = Recipe()
    assert ExactMatch().preflight(run) == ["evaluator 'exact-match' needs questions with answers: give --eval-data FILE."]


def test_options_are_checked():
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, not 0"):
        ExactMatch(max_new_tokens=0)
    with pytest.raises(ValueError, match=r"regexes_to_ignore: '\(' is not a regular expression \(missing \), unterminated subpattern at position 0\)"):
        ExactMatch(regexes_to_ignore=["a", "("])


def test_readme_option_for_gsm8k():
    from ftx.options import Text, coerce, option_types

    text = next(part for part in (Path(__file__).parent / "README.md").read_text("utf-8").split("'") if part.startswith("exact-match.regexes_to_ignore="))
    annotation = option_types(ExactMatch)["regexes_to_ignore"]
    assert coerce(Text(text.partition("=")[2]), annotation, "regexes_to_ignore") == ["(?s).*#### ", ","]


def test_gsm8k_with_the_regexes_of_the_readme(run):
    file = DATA / "gsm8k" / "test.jsonl"
    if not file.exists():
        pytest.skip(f"the data set GSM8K is not at {file}")
    references = [json.loads(line)["answer"] for line in file.read_text("utf-8").splitlines()]
    finals = [reference.rpartition("#### ")[2].replace(",", "") for reference in references]
    options = {"regexes_to_ignore": ["(?s).*#### ", ","]}
    _, scores = evaluated(references, [f"Let me think.\n#### {final}\n" for final in finals], run, **options)
    assert (scores["exact_match"].value, scores["exact_match"].n) == (1.0, 1319)
    _, scores = evaluated(references, ["Let me think.\n#### 7"] * 1319, run, **options)
    assert scores["exact_match"].value == finals.count("7") / 1319


def test_entry_point_and_environment():
    (entry,) = importlib.metadata.entry_points(group="ftx.evaluator", name="exact-match")
    assert entry.load() is ExactMatch
    assert ExactMatch().check_environment() == [f"ok: evaluate {importlib.metadata.version('evaluate')}"]


def test_importing_the_plugin_loads_nothing_heavy():
    code = "import sys, ftx_exact_match; print([m for m in ('torch', 'transformers', 'datasets', 'evaluate', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_no_network_no_home_and_no_folder_in_the_way(tmp_path):
    """`evaluate.load` would fetch a script, or run one from a folder with the metric's name; we do neither, and write nothing at home."""
    home, work = tmp_path / "home", tmp_path / "work"
    home.write_text("not a directory, so nothing can be made in it")
    (work / "exact_match").mkdir(parents=True)
    (work / "exact_match" / "exact_match.py").write_text("raise SystemExit('taken over')\n")
    code = """
import socket
def refuse(*_): raise AssertionError("the network was used")
socket.socket.connect = socket.getaddrinfo = refuse
from types import SimpleNamespace
from ftx.data import to_dataset
from ftx_exact_match import ExactMatch
run = SimpleNamespace(seed=1, say=print)
dataset = to_dataset([{"prompt": "1", "completion": "a"}, {"prompt": "2", "completion": "c"}])
evaluation = ExactMatch().evaluate_model(lambda prompts, **_: ["a", "b"], dataset, run)
print(evaluation.scores[0].value)
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))} | {"HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", code], cwd=work, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0.5"
    assert home.is_file()
    assert [path.name for path in work.rglob("*") if path.is_file()] == ["exact_match.py"]
