"""A new virtual environment with pip, in which nothing of ftx is installed yet, and wheels to install there."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

from support import REPO


class Environment:
    """A virtual environment that sees this one's libraries (torch and the rest), but none of our own distributions."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        self.python = folder / "bin" / "python"
        self.home = folder / "home"
        self.home.mkdir()
        # links and not the directory itself: a .pth file there would bring our editable installs along
        libraries = folder / "libraries"
        libraries.mkdir()
        for item in (item for key in ("platlib", "purelib") for item in Path(sysconfig.get_path(key)).iterdir()):
            ours = item.name.lower().startswith(("ftx", "__editable__", "_editable_impl")) or item.suffix == ".pth"
            if not ours and not (libraries / item.name).exists():
                (libraries / item.name).symlink_to(item)
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "libraries.pth").write_text(f"{libraries}\n")

    def pip(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """This environment's pip, working on that one; it asks no index."""
        command = [sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check", "--no-input", "--quiet", *arguments]
        return self._call(command, check=True)

    def ftx(self, *arguments: str | Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """The installed command `ftx`."""
        return self._call([self.python.with_name("ftx"), *arguments], timeout=timeout)

    def _call(self, command: list[str | Path], check: bool = False, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
        env |= {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(self.home), "PIP_NO_INDEX": "1"}
        done = subprocess.run([str(part) for part in command], env=env, cwd=self.home, capture_output=True, text=True, timeout=timeout, check=False)
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done


def built(folder: Path, *projects: str) -> list[Path]:
    """The wheels of projects of this repository, built by pip in one call."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    command += ["--wheel-dir", str(folder), *(str(REPO / project) for project in projects)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    wheels = sorted(folder.glob("*.whl"))
    assert len(wheels) == len(projects)
    return wheels


def wheel(folder: Path, name: str, points: dict[str, str], *, version: str = "1.0", requires: tuple[str, ...] = (), **modules: str) -> Path:
    """Write a wheel by hand. `points`: "adapter:lora" -> "module:Class"; `modules`: name -> source text."""
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    groups: dict[str, list[str]] = {}
    for key, value in points.items():
        stage, _, plugin = key.partition(":")
        groups.setdefault(stage, []).append(f"{plugin} = {value}")
    files = {f"{module}.py": text for module, text in modules.items()} | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: The test {name}.\n"
        + "".join(f"Requires-Dist: {line}\n" for line in requires),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "".join(f"[ftx.{stage}]\n" + "\n".join(lines) + "\n" for stage, lines in groups.items()),
    }
    record = [f"{path},sha256={_digest(text)},{len(text.encode())}" for path, text in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,"]) + "\n"
    file = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return file


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
