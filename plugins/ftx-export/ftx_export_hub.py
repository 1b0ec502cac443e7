"""The exporter `hub`: pushes an export, with its model card, to a repository of the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ftx import hookimpl, option, plugin
from ftx.errors import RunError, first_line
from ftx.export import Exported
from ftx.parity import Reader, read_with_transformers
from ftx_export import adapter_obstacles, merged, read_adapter, write_adapter, write_merged

if TYPE_CHECKING:
    from ftx import Run

TOKEN = "HF_TOKEN"
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@plugin
class Hub:
    """A repository of the hub, with the model card: pushed only after the export has been read back and agrees with the run.

    The token is taken from HF_TOKEN in the environment and from nowhere else.
    """

    repo: str = option(help="The repository, as OWNER/NAME; it is made if it is not there.")
    what: Literal["merged", "adapter"] = option("merged", "What is pushed: one plain model, or the adapter alone.")
    base_model: str | None = option(None, "What an adapter's configuration names as its base (default: the run's model, if it is no path).")
    private: bool = option(True, "Make a new repository private.")
    branch: str = option("main", "The branch that is pushed to.")
    dry_run: bool = option(False, "Show what would be pushed, and send nothing; works without a network.")

    exam = {"options": [{"repo": "acme/tiny", "dry_run": True}]}

    def __post_init__(self) -> None:
        if not REPOSITORY.fullmatch(self.repo):
            raise ValueError(f"repo must be OWNER/NAME, got {self.repo!r}")

    @hookimpl
    def preflight(self, run: Run) -> list[str]:
        reasons = adapter_obstacles(run, self.base_model) if self.what == "adapter" else []
        if not self.dry_run and not os.environ.get(TOKEN):
            reasons.append(f"pushing needs a token with the right to write in {TOKEN}; without one: -o exporter.dry_run=true.")
        if not self.dry_run and os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
            reasons.append("HF_HUB_OFFLINE is set, so nothing can be pushed: -o exporter.dry_run=true shows what would be.")
        return reasons

    @hookimpl
    def exported_form(self, model: Any, run: Run) -> Any:
        return model if self.what == "adapter" else merged(model, run)

    @hookimpl
    def export_model(self, model: Any, tokenizer: Any, path: Path, run: Run) -> Exported:
        written = write_adapter(model, path, run, self.base_model) if self.what == "adapter" else write_merged(model, tokenizer, path)
        return Exported(written.what, written.load.replace('path = "."  # the directory that this file lies in', f'path = "{self.repo}"'))

    @hookimpl
    def read_exported(self, path: Path, run: Run) -> Reader:
        return read_adapter(path, run) if self.what == "adapter" else read_with_transformers(path, run)

    @hookimpl
    def export_checked(self, path: Path, report: dict[str, Any], run: Run) -> None:
        names = files_to_push(path)
        if self.dry_run:
            state = "private if it is new" if self.private else "public if it is new"
            run.say(f"dry run: nothing is sent. Without dry_run these {len(names)} files would go to {self.repo}, branch {self.branch} ({state}):")
            for name in names:
                run.say(f"  {(path / name).stat().st_size:>13,}  {name}")
            run.say(f"The model card is {path / 'README.md'}.")
            return
        run.say(f"Pushed: {push(path, names, self.repo, self.branch, self.private)}")


def files_to_push(path: Path) -> list[str]:
    """All files of an export, by their names in the repository."""
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())


def push(path: Path, names: list[str], repo: str, branch: str, private: bool) -> str:
    """One commit with these files; its address. RunError where the repository holds other weights, which a reader would mix
    with these, and for whatever the hub answers."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=os.environ[TOKEN])
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if branch != "main":
            api.create_branch(repo, branch=branch, exist_ok=True)
        others = [name for name in api.list_repo_files(repo, revision=branch) if name.endswith(".safetensors") and name not in names]
        if others:
            raise RunError(f"{repo} holds other weights: {', '.join(sorted(others)[:3])}.", f"Push to another branch or repository. The export lies in {path}.")
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path / name)) for name in names]
        done = api.create_commit(repo, operations, commit_message="A model exported by ftx", revision=branch)
    except RunError:
        raise
    except Exception as error:  # the network and the hub have many ways to refuse
        raise RunError(f"{repo} could not be pushed to: {first_line(error)}", f"The export is whole and lies in {path}.") from error
    return str(done.commit_url)
