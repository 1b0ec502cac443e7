"""The observer `report` sits the exam."""

from ftx.testing import ObserverContract
from ftx_report import Report


class TestReport(ObserverContract):
    plugin = Report
    options = [{}, {"title": "A run"}]
