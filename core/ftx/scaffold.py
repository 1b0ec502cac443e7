"""`ftx plugins new`: a plugin to start from, which installs and passes its exam as it is written."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template

from ftx.catalogue import Catalogue
from ftx.errors import PluginError

TEMPLATES = Path(__file__).parent / "templates"
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
#: What a stage's template needs beside the core.
DEPENDENCIES = {"quantizer": ["bitsandbytes>=0.50"], "trainer": ["accelerate>=1.12"]}


def write_plugin(stage: str, name: str, output: str | Path | None = None) -> tuple[Path, list[str]]:
    """Write the distribution ftx-NAME with one plugin into `output` (./ftx-NAME); its directory and file names.

    Raises PluginError for a name that cannot be or is taken, and for a directory in which something lies.
    """
    if not NAME.fullmatch(name):
        raise PluginError(f"'{name}' cannot be a plugin's name.", "Use small letters and digits, with single hyphens between, such as my-adapter.")
    taken = [entry for entry in Catalogue().entries if (entry.stage, entry.name) == (stage, name)]
    if taken:
        raise PluginError(f"the {stage} '{name}' is installed already ({taken[0].origin}).", "Choose another name.")
    directory = Path(output).expanduser() if output else Path(f"ftx-{name}")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise PluginError(f"{directory} exists and is not an empty directory.", "Give another --output.")
    module = f"ftx_{name.replace('-', '_')}"
    words = {
        "stage": stage,
        "Stage": stage.capitalize(),
        "an": "an" if stage[0] in "aeo" else "a",
        "name": name,
        "module": module,
        "Class": "".join(part.capitalize() for part in [*name.removesuffix(f"-{stage}").split("-"), stage]),
        "dependencies": ", ".join(f'"{needed}"' for needed in ["ftx-core>=0.1,<0.2", *DEPENDENCIES.get(stage, [])]),
    }
    files = {"pyproject.toml": "pyproject.toml", f"{module}.py": f"{stage}.py", f"test_{module}.py": "test.py", "README.md": "README.md"}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for file, template in files.items():
            text = Template((TEMPLATES / f"{template}.txt").read_text("utf-8")).substitute(words)
            (directory / file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise PluginError(f"{directory} cannot be written ({error.strerror}).", "Give another --output.") from error
    return directory, list(files)
