"""What a command does to Python's garbage collector until the model is there."""

from __future__ import annotations

import gc

from ftx import startup
from ftx.models import load_model
from ftx.testing.tiny import tiny_model


def test_the_collector_looks_less_often_until_a_model_is_loaded(tmp_path):
    import torch

    tiny_model().save_pretrained(tmp_path)
    startup.over()  # of a command that another test called in this process, and that has loaded no model
    before = gc.get_threshold()
    startup.begin()
    startup.begin()  # a command called from within another
    assert gc.get_threshold() == startup.RARELY != before
    load_model(tmp_path, dtype=torch.float32, device="cpu")
    assert gc.get_threshold() == before
    gc.set_threshold(500, 5, 5)
    load_model(tmp_path, dtype=torch.float32, device="cpu")  # not begun: another program's setting is its own
    assert gc.get_threshold() == (500, 5, 5)
    gc.set_threshold(*before)
