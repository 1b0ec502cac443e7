"""For mkdocs: links from a page to files of the repository outside docs/ become their paths, and must exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """`[words](../plugins/x)` -> words (`plugins/x`); FileNotFoundError for a path that is not there."""

    def shown(link: re.Match[str]) -> str:
        words, path = link.groups()
        if not (REPO / "docs" / path.partition("#")[0]).exists():
            raise FileNotFoundError(f"{page.file.src_path}: {path} does not exist")
        plain = path.removeprefix("../")
        return f"{words} (`{plain}`)" if words.strip("`") != plain else words

    return re.sub(r"\[([^\]]+)\]\((\.\./[^)]+)\)", shown, markdown)
