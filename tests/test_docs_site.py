"""The docs as a site: they build without a warning, every page is in it, and every link leads somewhere."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

REPO = Path(__file__).resolve().parent.parent


def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    pages = {file.stem for file in (REPO / "docs").glob("*.md")}
    assert {file.stem for file in tmp_path.glob("*.html")} - {"404"} == pages
    text = (tmp_path / "index.html").read_text("utf-8")
    assert "fonts.googleapis" not in text


def test_a_broken_link_out_of_the_docs_is_an_error():
    spec = importlib.util.spec_from_file_location("docs_site", REPO / "docs" / "site.py")
    site = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site)
    page = SimpleNamespace(file=SimpleNamespace(src_path="x.md"))
    assert site.on_page_markdown("see [the core](../core)", page) == "see the core (`core`)"
    with pytest.raises(FileNotFoundError, match=r"x.md: ../nowhere does not exist"):
        site.on_page_markdown("see [it](../nowhere)", page)
