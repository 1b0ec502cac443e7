"""Libraries that nothing uses are not imported, and whoever uses one gets the library itself."""

from __future__ import annotations

import subprocess
import sys

import pytest


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    return done.stdout.strip()


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A package that says when it runs, with a submodule."""
    folder = tmp_path / "late"
    folder.mkdir()
    (folder / "__init__.py").write_text("print('runs')\nfrom late import part\nvalue = 7\n")
    (folder / "part.py").write_text("there = True\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "import ftx_fast_imports, importlib.util, sys; ftx_fast_imports.postpone('late'); "


@pytest.mark.parametrize(
    "use, said",
    [
        ("import late; print('there', importlib.util.find_spec('late') is not None, late.__file__ is not None)", "there True True"),
        ("import late; print(late.value)", "runs\n7"),
        ("import late.part; print(late.part.there)", "runs\nTrue"),
        ("from late import value; print(value)", "runs\n7"),
        ("from late.part import there; print(there)", "runs\nTrue"),
        ("import late as before; import late.part; import late as after; print(before.value is after.value)", "runs\nTrue"),
        ("import late; print(hasattr(late, 'nothing'))", "runs\nFalse"),
    ],
)
def test_it_runs_when_it_is_used(library, use, said):
    assert python(library + use) == said


def test_what_is_not_installed_or_already_there_is_left_alone():
    assert python("import ftx_fast_imports, json, sys; ftx_fast_imports.postpone('json', 'never_heard'); print('never_heard' in sys.modules, json.dumps(1))")


def test_transformers_losses_bring_no_scipy_until_one_is_called():
    pytest.importorskip("scipy", reason="scipy is not installed")
    code = """
import sys
import ftx_fast_imports
ftx_fast_imports.import_losses()
from transformers.loss import loss_for_object_detection as losses
assert 'scipy.optimize' not in sys.modules
print(losses.linear_sum_assignment([[1, 0], [0, 1]])[1].tolist())
import scipy.optimize
print(scipy.optimize.minimize.__name__)
"""
    assert python(code) == "[1, 0]\nminimize"


def test_trl_looks_up_what_is_installed_when_it_asks():
    code = """
import importlib.metadata as metadata
usual = metadata.packages_distributions
import ftx_fast_imports
ftx_fast_imports.import_trl()
from trl import import_utils
assert metadata.packages_distributions is usual
found = import_utils._is_package_available('peft', return_version=True)
print(found == (True, metadata.version('peft')), set(import_utils.PACKAGE_DISTRIBUTION_MAPPING) == set(usual()))
"""
    assert python(code) == "True True"


def test_peft_and_trl_run_no_bitsandbytes():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    code = """
import sys
import ftx_fast_imports
ftx_fast_imports.postpone()
import torch
ftx_fast_imports.import_trl()
from trl import SFTTrainer
from ftx.testing import make_run, tiny_model
from ftx_lora import LoRA
model = LoRA().adapt_model(model=tiny_model(), run=make_run())
assert 'bitsandbytes.nn' not in sys.modules and 'torch._inductor.compile_fx' not in sys.modules
import bitsandbytes
print(bitsandbytes.nn.Linear4bit.__name__)
from peft.import_utils import is_bnb_4bit_available
assert is_bnb_4bit_available()
"""
    assert python(code).endswith("Linear4bit")
