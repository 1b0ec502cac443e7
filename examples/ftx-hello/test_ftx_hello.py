"""The exam of the adapter `hello`: every test of an adapter comes with the contract."""

from ftx.testing import AdapterContract
from ftx_hello import HelloAdapter


class TestHelloAdapter(AdapterContract):
    plugin = HelloAdapter
