"""The quantizers `nf4`, `fp4` and `int8` sit the exam."""

from ftx.testing import QuantizerContract
from ftx_bnb import FP4, NF4, Int8


class TestNF4(QuantizerContract):
    plugin = NF4
    options = [{}, {"double_quant": False}]


class TestFP4(QuantizerContract):
    plugin = FP4
    options = [{}, {"double_quant": False}]


class TestInt8(QuantizerContract):
    plugin = Int8
    options = [{}, {"threshold": 0.0}]
