"""The observer `audit` sits the exam."""

from ftx.testing import ObserverContract
from ftx_audit import Audit


class TestAudit(ObserverContract):
    plugin = Audit
    options = [{}, {"near_duplicate": 0.7, "refuse": [], "off": ["size"], "task": "code"}]
