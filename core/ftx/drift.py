"""What has changed since a run was started: resuming it would give what no single recipe gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ftx.catalogue import Catalogue
from ftx.errors import RecipeError
from ftx.manifest import manifest_of, sha256
from ftx.memory import settled
from ftx.run import Run, RunDir

#: What of the manifest decides the weights. Hardware may change their last bits: that is said and recorded, not refused.
MATTERS = ("recipe", "ftx", "plugins", "libraries", "python", "model", "data", "files", "seed", "dtype", "device")
NOTED = ("hardware",)


def heed_drift(directory: RunDir, run: Run, catalogue: Catalogue, *, accept: bool) -> bool:
    """Compare a run's manifest with what it would be made of now. RecipeError with the list of what changed, unless it is
    accepted: then `run.notes["drift"]`, and so the manifest, has it. Whether there was any."""
    before = directory.read_json("manifest.json")
    if before is None:
        raise RecipeError(f"{directory} has no manifest.json, so nothing says what the run was made of.", "Start again: ftx run " + str(directory.recipe))
    before = settled(before, directory)
    if before.get("drift"):
        run.notes["drift"] = before["drift"]
    after = {**manifest_of(run, catalogue), "recipe": sha256(directory.recipe)}
    changes, noted = (list(differences(before, after, keys)) for keys in (MATTERS, NOTED))
    if changes and not accept:
        raise RecipeError(
            "\n".join([f"{directory} was made of something else than what is here now:", *(describe(*change) for change in changes)]),
            f"Put it back, start again, or go on all the same, which the manifest records: ftx resume {directory} --accept-drift",
        )
    for change in changes + noted:
        run.say(f"warning: since the run was started, {describe(*change)}")
    if changes or noted:
        entries = [{"what": what, "before": old, "after": new} for what, old, new in changes + noted]
        run.notes["drift"] = [*run.notes.get("drift", []), *entries]
    return bool(changes)


def heed_base(directory: RunDir, found: list[str]) -> None:
    """RecipeError if a run was trained on another model than the one that `found` are the fingerprints of: an adapter works on
    its own base alone, and on another it gives something else without a word."""
    model = directory.read_json("manifest.json", {}).get("model", {})
    trained_on = [model["fingerprint"], *model.get("beneath", [])] if "fingerprint" in model else []
    if found[: len(trained_on)] != trained_on:
        raise RecipeError(
            f"{directory} was trained on another model than {model.get('reference')} is now: its weights, config or tokenizer have changed.",
            f"Put back the one whose fingerprint {directory.manifest} has, or train again: ftx run {directory.recipe} --output NEW",
        )


def differences(before: dict[str, Any], after: dict[str, Any], keys: tuple[str, ...]) -> Iterator[tuple[str, Any, Any]]:
    """(what, before, after) for everything under `keys` of two manifests that is not equal; `what` is a dotted path, None
    stands for what is not there."""
    for key in keys:
        old, new = dict(_flat(before.get(key), key)), dict(_flat(after.get(key), key))
        for what in dict.fromkeys([*old, *new]):
            a, b = old.get(what), new.get(what)
            if what == "python":
                a, b = (".".join(str(version).split(".")[:2]) for version in (a, b))  # a patch release computes the same
            if a != b and not what.startswith("model.re"):  # its bytes count, not under which name they were found
                yield what, old.get(what), new.get(what)


def describe(what: str, before: Any, after: Any) -> str:
    """A difference in words, such as `the library torch was 2.13.0 and is 2.14.0`."""
    head, _, rest = what.partition(".")
    if what == "recipe":
        return "recipe.yaml was edited"
    if what == "model.fingerprint":
        return "the model has other weights, another config or another tokenizer"
    if what == "model.beneath":
        return "the model that the run of --from was trained on has other weights, another config or another tokenizer"
    if head == "data":
        name = rest.partition(".")[2].removeprefix("files.").removesuffix(".sha256").removesuffix(".bytes") or rest
        return f"the data {name} " + ("is new" if before is None else "is gone" if after is None else "has changed")
    if head == "files":
        return f"what stands in the file that the option {rest} names has changed"
    if head == "plugins" and what.endswith(".sha256"):
        return f"the code of the plugin {rest.removesuffix('.sha256')} has changed"
    named = {"plugins": f"the plugin {rest}", "libraries": f"the library {rest}", "hardware": f"the hardware ({rest})"}.get(head, what)
    return f"{named} was {before if before is not None else 'not there'} and is {after if after is not None else 'not there'}"


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield path, value
        return
    for key, one in value.items():
        if not (key == "bytes" and "sha256" in value):  # the digest says it already
            yield from _flat(one, f"{path}.{key}")
