"""The evaluator `exact-match` sits the exam."""

from ftx.testing import EvaluatorContract
from ftx_exact_match import ExactMatch


class TestExactMatch(EvaluatorContract):
    plugin = ExactMatch
    options = [{}, {"ignore_case": True, "ignore_punctuation": True}, {"regexes_to_ignore": ["[.,]"]}]
    headline = "exact_match"


class TestObjects(EvaluatorContract):
    """Answers that are JSON objects."""

    plugin = ExactMatch
    rows = [{"prompt": f"Product {i}?", "completion": f'{{"name": "lamp {i}", "price": {i}}}'} for i in range(4)]
    hostile = ['{"name": ["lamp 0", "lamp 1", "lamp 2", "lamp 3"], "price": [0, 1, 2, 3]}']
    headline = "exact_match"
