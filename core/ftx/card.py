"""The model card of an export: what it was made of, what it scores, what is not known of it, and how to load it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ftx import models, yamls
from ftx.recipe import read_recipe
from ftx.run import Run, RunDir

if TYPE_CHECKING:
    from ftx.export import Exported

UNKNOWN = "not stated: find out before you pass this on"


def model_card(directory: RunDir, run: Run, exported: Exported, report: dict[str, Any], licences: dict[str, str | None]) -> str:
    """README.md of an export as the hub reads it: YAML in front, Markdown behind. `licences`: of `base` and `data`, where a
    person has said them; the base's is else what its own model card or its installed name says. Nothing in it names a
    directory of this machine."""
    manifest, audit = directory.read_json("manifest.json", {}), directory.read_json("audit.json", {})
    base = licences.get("base") or base_licence(run)
    adapter = run.recipe.adapter.name if run.recipe.adapter else "none"
    about: dict[str, Any] = {
        "base_model": models.hub_id(run.model),
        "license": base.lower() if base and re.fullmatch(r"[A-Za-z0-9.+-]+", base) else "other" if base else None,
        "pipeline_tag": "text-generation",
        "tags": ["ftx", adapter, *([run.recipe.trainer.name] if run.recipe.trainer else [])],
    }
    front = yaml.safe_dump({key: value for key, value in about.items() if value is not None}, sort_keys=False, allow_unicode=True)
    reference = report["base"]["reference"]
    parts = [
        f"---\n{front}---\n",
        f"# {directory.path.name}\n",
        f"`{reference}` fine-tuned with {_written(adapter)} by ftx {manifest.get('ftx', '')}: {exported.what}.\n",
        "## How to load it\n",
        f"{exported.load.strip()}\n",
        *_scores(directory),
        "## Data\n",
        *_data(manifest, audit, directory),
        f"Licence of the data: {licences.get('data') or UNKNOWN}.\n",
        "## Base\n",
        f"`{reference}`, fingerprint `{report['base']['fingerprint'][:16]}`. Licence of the base: {base or UNKNOWN}.\n",
        "## Recipe\n",
        f"```yaml\n{_recipe(directory)}```\n",
        f"Seed {manifest.get('seed')}, {manifest.get('dtype')} on {manifest.get('device')}, " + ", ".join(_versions(manifest)) + ".\n",
        "## Checked\n",
        *_checked(report),
        "## Limits\n",
        *_limits(directory, audit),
    ]
    return "\n".join(parts)


def base_licence(run: Run) -> str | None:
    """The licence that the base's own model card states, or that its installed name comes with."""
    said = models.stated(run.model, "license")
    card = run.model_path / "README.md"
    if said is None and card.is_file():
        front = re.match(r"---\n(.*?)\n---\n", card.read_text("utf-8", errors="replace"), re.DOTALL)
        try:
            said = (yamls.load(front[1]) or {}).get("license") if front else None
        except (yaml.YAMLError, AttributeError):
            said = None
    return str(said) if said else None


def _scores(directory: RunDir) -> list[str]:
    scores = directory.read_json("scores.json", [])
    if not scores:
        return ["## Scores\n", "It was not evaluated.\n"]
    lines = ["## Scores\n", "| evaluator | metric | phase | value | 95 % interval | n |", "|---|---|---|---|---|---|"]
    for score in scores:
        interval = f"[{score['ci_low']:.3f}, {score['ci_high']:.3f}]" if score.get("ci_low") is not None and score.get("ci_high") is not None else "-"
        names = [_written(score[key]) for key in ("evaluator", "metric", "phase")]
        lines.append(f"| {' | '.join([*names, format(score['value'], '.4g'), interval, str(score['n'])])} |")
    return [*lines, "", "`base` is the model that the run started from, `tuned` what training made of it, `change` what a comparison of the two says.\n"]


def _data(manifest: dict[str, Any], audit: dict[str, Any], directory: RunDir) -> list[str]:
    lines = []
    for key, split in (("data", "train"), ("eval_data", "eval")):
        about = manifest.get("data", {}).get(key)
        if about is None:
            continue
        names = [f"`{_written(Path(name).name)}` (sha256 `{file['sha256'][:16]}`)" for name, file in about.get("files", {}).items()]
        figures = audit.get(split, {})
        counts = f": {figures['rows']} rows, {figures['tokens']} tokens, {figures['supervised_share']:.0%} of them supervised" if "rows" in figures else ""
        lines.append(f"- {'trained' if split == 'train' else 'evaluated'} on {', '.join(names) or _written(str(about.get('hub')))}{counts}")
    ledger = directory / "ledger.jsonl"
    unused = sum(1 for line in ledger.read_text("utf-8").splitlines() if line.strip()) if ledger.exists() else 0
    return [*lines, f"- rows dropped, cut or repaired: {unused}", ""]


def _recipe(directory: RunDir) -> str:
    """The run's recipe with the names of files in place of their paths."""
    text: str = yaml.safe_dump(_without_folders(read_recipe(directory.recipe)), sort_keys=False, allow_unicode=True)
    return text


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_folders(one) for one in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _versions(manifest: dict[str, Any]) -> list[str]:
    named = {about["distribution"]: about["version"] for about in manifest.get("plugins", {}).values() if about.get("version")}
    libraries = {name: version for name, version in manifest.get("libraries", {}).items() if name in ("torch", "transformers", "trl", "peft")}
    return [f"{name} {version}" for name, version in {**named, **libraries}.items()]


def _checked(report: dict[str, Any]) -> list[str]:
    parity = report["parity"]
    lines = [
        f"Read back by {parity['reader']} and asked {parity['prompts']} prompts: {parity['token_agreement']:.2%} of {parity['total']} tokens are the run's, "
        f"the largest difference of a logit is {parity['largest_difference']:.2g} (the largest logit is {parity['largest_logit']:.3g})."
    ]
    if report["base_token_agreement"] is not None:
        lines.append(f"The base says the same at {report['base_token_agreement']:.1%} of them.")
    if report["departure"]:
        gone = report["departure"]
        lines.append(
            f"It was compared with another model than the run's, on purpose ({gone['why']}): that one agrees with the run at "
            f"{gone['token_agreement']:.2%} of the tokens, and its logits differ by at most {gone['largest_difference']:.2g}."
        )
    return [" ".join(lines) + "\n", "`export.json` has these figures and the sha256 of every file.\n"]


def _limits(directory: RunDir, audit: dict[str, Any]) -> list[str]:
    scores = directory.read_json("scores.json", [])
    most = max((score["n"] for score in scores), default=0)
    longest = audit.get("train", {}).get("length", {}).get("max")
    scored = f"- The scores come from at most {most} items of one kind of data; they say nothing of other tasks."
    lines = [scored if most else "- Nothing is known of its quality."]
    if longest:
        lines.append(f"- The longest training row has {longest} tokens; what it does with longer ones was not looked at.")
    lines += [
        "- What its base gets wrong, it may get wrong; fine-tuning may have made it worse at what the data does not show.",
        "- It was not examined for harmful answers, bias, or training data that it repeats word for word.",
        "",
    ]
    return lines


def _written(text: str) -> str:
    """Text from data in Markdown: no markup, no second line."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(text.split()))
