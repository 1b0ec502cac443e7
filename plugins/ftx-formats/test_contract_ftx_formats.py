"""The formatters sit the exam, on the rows that each names itself."""

from ftx.testing import FormatterContract
from ftx_formats import Alpaca, Completion, Messages, ShareGPT, Text
from ftx_formats_auto import Auto
from ftx_formats_preference import Preference


class TestAlpaca(FormatterContract):
    plugin = Alpaca
    options = [{}, {"style": "instruction"}, {"input_column": None}]


class TestSelfInstruct(FormatterContract):
    """One source row, several rows."""

    plugin = Alpaca
    rows = [{"instruction": "Add.", "instances": [{"input": "1, 2", "output": "3"}, {"input": "2, 2", "output": "4"}]}]
    bad_rows = [{"instruction": "Add.", "instances": []}]


class TestAuto(FormatterContract):
    plugin = Auto


class TestCompletion(FormatterContract):
    plugin = Completion


class TestMessages(FormatterContract):
    plugin = Messages
    options = [{}, {"trim": True}]


class TestPreference(FormatterContract):
    plugin = Preference
    options = [{}, {"style": "chat"}]


class TestLabelled(FormatterContract):
    plugin = Preference
    rows = [{"prompt": "2 + 2 =", "completion": " 4", "label": True}, {"prompt": "2 + 2 =", "completion": " 5", "label": False}]
    bad_rows = [{"prompt": "2 + 2 =", "completion": " 4", "label": "perhaps"}]


class TestShareGPT(FormatterContract):
    plugin = ShareGPT


class TestText(FormatterContract):
    plugin = Text
