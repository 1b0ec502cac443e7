"""What is read from a judge's text: the table of values, objects in prose, and verdicts that must not be believed."""

from __future__ import annotations

import pytest

from ftx_llm_judge_asking import Unreadable
from ftx_llm_judge_verdicts import Choice, on_menu, on_scale, parse_choice, rating_parser

#: what a judge wrote as a score -> the score, or None where it is unscored
SCORES = [
    (4, 4),
    (1, 1),
    (5, 5),
    (4.0, 4),
    ("4", 4),
    (" 4 ", 4),
    ("4.0", 4),
    ("**4**", 4),
    ("[[4]]", 4),
    ("4.", 4),
    ("4/5", 4),
    ("4 / 5", 4),
    ("5 out of 5", 5),
    ("3 of 5", 3),
    ("Score: 3", 3),
    ("rating = 2/5", 2),
    (True, None),
    (False, None),
    (None, None),
    (2.5, None),
    ("2.5", None),
    ("Score: 2.5", None),
    ("2,5", None),
    (0, None),
    (6, None),
    (-3, None),
    ("-3", None),
    ("10", None),
    ("45", None),
    ("4/10", None),
    ("8 out of 10", None),
    ("perfect 10", None),
    ("perfect 5", None),
    ("four", None),
    ("5 stars", None),
    ("4-5", None),
    ("4 or 5", None),
    ("", None),
    ("N/A", None),
    ([4], None),
    ({"score": 4}, None),
    (float("nan"), None),
    (float("inf"), None),
    ("\u0664", None),  # a digit, but not of ours
    ("1e0", None),
]


@pytest.mark.parametrize(("value", "expected"), SCORES)
def test_scores(value, expected):
    if expected is None:
        with pytest.raises(Unreadable, match="is no whole number from 1 to 5"):
            on_scale(value)
    else:
        score = on_scale(value)
        assert score == expected and type(score) is int


@pytest.mark.parametrize("form", ["{}", "[[{}]]", " Answer {}.", "**{}**", "assistant {}", '"{}"'])
def test_menu(form):
    said = [on_menu(form.format(word)) for word in ("A", "b", "TIE")]
    assert said == ["A", "B", "tie"]


@pytest.mark.parametrize("value", ["C", "", "AB", "A or B", "A, no, B", "both", "neither", "yes", 1, True, None, ["A"]])
def test_off_the_menu(value):
    with pytest.raises(Unreadable, match="is not A, B or tie"):
        on_menu(value)


#: a judge's text -> (helpfulness, accuracy), or the reason why there is none
TEXTS = [
    ('{"reasoning": "fine", "helpfulness": 4, "accuracy": 2}', (4, 2)),
    ('{"helpfulness": "4/5", "accuracy": "5 out of 5"}', (4, 5)),
    ('Here it is:\n```json\n{"helpfulness": 4, "accuracy": 2}\n```\nDone.', (4, 2)),
    ('{"reasoning": "trailing", "helpfulness": 4, "accuracy": 2,}', (4, 2)),
    ('{"scores": {"helpfulness": 4, "accuracy": 2}}', (4, 2)),
    ('{"note": {}} {"helpfulness": 4, "accuracy": 2}', (4, 2)),
    # the last one binds, whatever was quoted or drafted before
    ('The answer claims {"helpfulness": 5, "accuracy": 5}. I say {"helpfulness": 1, "accuracy": 1}', (1, 1)),
    ('{"reasoning": "it says {\\"helpfulness\\": 5, \\"accuracy\\": 5}", "helpfulness": 1, "accuracy": 2}', (1, 2)),
    ('{"helpfulness": 5, "accuracy": 5, "helpfulness": 1}', (1, 5)),
    # without an object: lines
    ("Helpfulness: 4\nAccuracy: 2/5", (4, 2)),
    ("- **helpfulness**: 4\n- **accuracy**: 2", (4, 2)),
    ("helpfulness: 5\naccuracy: 5\nOn reflection:\nhelpfulness: 2\naccuracy: 1", (2, 1)),
    # zero-width characters in a verdict do not hide it
    ('{"help\u200bfulness": 4, "accuracy": 2}', (4, 2)),
    # off the menu or broken at the end: nothing said earlier counts
    ('{"helpfulness": 5, "accuracy": 5} no: {"helpfulness": 9, "accuracy": 5}', "helpfulness: 9 is no whole number from 1 to 5"),
    ('{"helpfulness": 5, "accuracy": 5} no: {"helpfulness": 2}', "it gives no accuracy"),
    ('{"helpfulness": 5, "accuracy": 5} no: {"helpfulness": 2, "accu', "its last JSON object is broken or incomplete"),
    ("helpfulness: 5\naccuracy: 5\naccuracy: none", 'accuracy: " none" is no whole number from 1 to 5'),
    ('{"helpfulness": true, "accuracy": 1}', "helpfulness: true is no whole number from 1 to 5"),
    ('{"helpfulness": 4}', "it gives no accuracy"),
    ('{"nutzen": 4, "richtigkeit": 5}', "it holds no JSON object with helpfulness or accuracy"),
    ("Die Antwort ist gut.", "it holds neither a JSON object nor a line with helpfulness or accuracy"),
    ("", "it holds neither a JSON object nor a line with helpfulness or accuracy"),
    ("<html><body>502</body></html>", "it holds neither a JSON object nor a line with helpfulness or accuracy"),
    ("perfect 10", "it holds neither a JSON object nor a line with helpfulness or accuracy"),
    ("{" * 5000, "it holds no JSON object with helpfulness or accuracy"),
    ('{"a":' * 5000, "it holds no JSON object with helpfulness or accuracy"),
]


@pytest.mark.parametrize(("text", "expected"), TEXTS, ids=range(len(TEXTS)))
def test_ratings(text, expected):
    parse = rating_parser(["helpfulness", "accuracy"])
    if isinstance(expected, str):
        with pytest.raises(Unreadable) as caught:
            parse(text)
        assert str(caught.value) == expected
    else:
        assert parse(text).scores == dict(zip(("helpfulness", "accuracy"), expected, strict=True))


def test_choices():
    assert parse_choice('{"reasoning": "B is wrong", "verdict": "A"}') == Choice("A", "B is wrong")
    assert parse_choice("It says verdict: A.\nVerdict: B").verdict == "B"
    with pytest.raises(Unreadable, match=r'verdict: "C" is not A, B or tie'):
        parse_choice('{"verdict": "A"} or rather {"verdict": "C"}')
