"""The exams of the command `data` and of the formatter `argilla`."""

from ftx.testing import CommandContract, FormatterContract
from ftx_data_argilla import Argilla


class TestData(CommandContract):
    name = "data"


class TestArgilla(FormatterContract):
    plugin = Argilla
    options = [{}, {"style": "text"}, {"write": "response", "user_id": "u", "field": "prompt", "question": "answer"}]


class TestFlattened(FormatterContract):
    """Argilla's export through datasets: a column for each part of a question."""

    plugin = Argilla
    rows = [
        {
            "id": "1",
            "status": "completed",
            "text": "2 + 2?",
            "q.responses": ["4", "5", "4"],
            "q.responses.users": ["a", "b", "c"],
            "q.responses.status": ["submitted"] * 3,
        },
        {"id": "2", "status": "pending", "text": "3 + 3?", "q.suggestion": "6", "q.suggestion.score": None, "q.suggestion.agent": "m"},
    ]
    bad_rows = [
        {"id": "3", "status": "completed", "text": "5?", "q.responses": ["4", "5"], "q.responses.users": ["a", "b"], "q.responses.status": ["submitted"] * 2}
    ]
