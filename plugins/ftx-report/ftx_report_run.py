"""The page of one run, and the page that compares several."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftx_report_charts import GIB, Bar, Mark, bars, curves, lines
from ftx_report_items import embedded, item_sets, run_sets
from ftx_report_page import Part, score_table, whole_page, with_interval
from ftx_report_read import Told
from ftx_report_verdict import Verdict, headlines, verdict

#: Ledger entries that are shown for each reason.
PLACES = 3


def run_page(told: Told, *, title: str = "", limit: int = 10_000) -> str:
    """One run: what was trained on what, and what came of it; at most `limit` items of each evaluator."""
    sets = item_sets(told, limit)
    said = verdict(told.scores, told.metrics)
    if not told.finished:
        said = Verdict(f"This run is not finished. {said.sentence}", said.tone)
    charts = curves(told.metrics, evaluation_marks(told))
    preferences = [(name, chart) for name, chart in charts if of_preferences(name)]
    parts = [
        Part(charts=headline_bars(told)),
        Part(heading="Scores", id="scores", rows=score_table([score for score in told.scores if not of_part(score)])),
        Part(heading="By category", id="categories", charts=category_bars(told.scores)),
        Part(heading="Training", id="training", charts=[(name, chart) for name, chart in charts if not of_preferences(name)]),
        Part(heading="Rewards", id="rewards", charts=preferences),
        plan_part(told),
        Part(heading="What judging took", id="usage", rows=usage_rows(told)),
        Part(heading="Items", id="browse", browser=bool(sets)),
        *audit_parts(told),
        Part(heading="Recipe and versions", id="recipe", texts=texts_of(told)),
    ]
    return whole_page(title or f"{told.trained} on {told.model}", parts, lead=lead(told), verdict=said, items=embedded(sets) if sets else "")


def compare_page(runs: Sequence[Told], *, title: str = "", limit: int = 10_000) -> str:
    """Several runs side by side: their facts, scores, curves, answers, and where their recipes differ."""
    sets = run_sets(runs, limit)
    data = {json.dumps([one.get("sha256") for one in files.values()]) for told in runs if (files := _files(told, "eval_data"))}
    warning = ["They were not all evaluated on the same data: their scores do not compare."] if len(data) > 1 else []
    parts = [
        Part(heading="Runs", id="runs", rows=side_by_side(runs, {told.name: facts_of(told) for told in runs}), numbers=False),
        Part(heading="Scores", id="scores", lines=warning, rows=tuned_scores(runs), charts=run_bars(runs)),
        Part(heading="Training", id="training", charts=shared_curves(runs)),
        Part(heading="Items", id="browse", browser=bool(sets)),
        Part(heading="Where the recipes differ", id="recipe", rows=recipe_differences(runs), numbers=False),
    ]
    names = ", ".join(told.name for told in runs)
    return whole_page(title or f"{len(runs)} runs compared", parts, lead=[names], items=embedded(sets) if sets else "")


# ---- what was trained on what --------------------------------------------------------------------------------------


def lead(told: Told) -> list[str]:
    """Two lines under the heading."""
    data = [source(told, "data", "train")]
    if told.recipe.get("eval_data"):
        data.append(f"evaluated on {source(told, 'eval_data', 'eval')}")
    start = told.recipe.get("from")
    trained = f"{told.model} ({'an earlier run, ' if start else ''}{told.manifest.get('dtype', told.recipe.get('dtype', ''))})"
    facts = facts_of(told)
    more = [f"{facts[name]} {name}" for name in ("steps", "tokens trained") if facts.get(name)]
    more += [str(facts[name]) for name in ("trains", "on") if facts.get(name)] + [f"seed {told.recipe.get('seed')}"]
    return [f"{trained}, {told.trained}, trained on {', '.join(data)}", " · ".join(more)]


def source(told: Told, key: str, split: str) -> str:
    """`products-train.jsonl: 500 rows, 42,607 tokens, 26% supervised`."""
    audit = told.audit.get(split) or {}
    facts = [f"{audit['rows']:,} rows"] if "rows" in audit else []
    if split == "train" and "tokens" in audit:
        facts += [f"{audit['tokens']:,} tokens", f"{audit.get('supervised_share', 0):.0%} supervised"]
    name = Path(str(told.recipe.get(key))).name
    return f"{name} ({', '.join(facts)})" if facts else name


def facts_of(told: Told) -> dict[str, Any]:
    """What there is to know of a run in a few words each; None where it is not known."""
    logged = [line for line in told.metrics if "loss" in line]
    last = logged[-1] if logged else {}
    parameters = told.manifest.get("parameters") or {}
    share = parameters["trainable"] / parameters["stored"] if parameters.get("stored") else None
    speeds = sorted(line["tokens_per_second"] for line in logged if line.get("tokens_per_second"))
    return {
        "model": told.model,
        "plugins": told.trained,
        "data": Path(str(told.recipe.get("data"))).name,
        "steps": last.get("step"),
        "tokens trained": f"{last['tokens']:,}" if last.get("tokens") else None,
        "trains": f"{parameters['trainable']:,} parameters ({share:.2%})" if share is not None else None,
        "on": " ".join(str(told.manifest.get(key)) for key in ("dtype", "device") if told.manifest.get(key)) or None,
        "last loss": f"{last['loss']:.4f}" if last else None,
        "tokens/s, median": f"{speeds[len(speeds) // 2]:,.0f}" if speeds else None,
        "peak memory": size(max(line["peak_memory"] for line in logged if "peak_memory" in line)) if any("peak_memory" in line for line in logged) else None,
        "finished": "yes" if told.finished else "no",
    }


def texts_of(told: Told) -> dict[str, str]:
    """The recipe as it stands in the run, and the versions."""
    about = told.manifest
    versions = [f"ftx {about['ftx']}"] if about.get("ftx") else []
    versions += [f"{key}  {one.get('distribution')} {one.get('version')}" for key, one in (about.get("plugins") or {}).items()]
    versions += [f"{name} {version}" for name, version in (about.get("libraries") or {}).items()]
    versions += [f"python {about['python']}"] if about.get("python") else []
    versions += [f"{key} {json.dumps(about[key], ensure_ascii=False)}" for key in ("hardware", "model", "data") if about.get(key)]
    versions += [f"git {about['git_revision']}"] if about.get("git_revision") else []
    repeat = f"ftx run {told.directory.recipe}"
    return {name: text for name, text in {"again": repeat, "recipe.yaml": told.recipe_text, "versions": "\n".join(versions)}.items() if text}


# ---- scores and curves ---------------------------------------------------------------------------------------------


def headline_bars(told: Told) -> list[tuple[str, str]]:
    """Base against tuned with intervals: the first metric of each evaluator."""
    charts = []
    for evaluator, base, tuned in headlines(told.scores):
        both = [(phase, score) for phase, score in (("base", base), ("tuned", tuned)) if score is not None]
        charts.append(
            (f"{evaluator}: {tuned['metric']}", bars([bar(tuned["metric"], phase, score) for phase, score in both], scale(score for _, score in both)))
        )
    return charts


def category_bars(scores: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Metrics of the form `kind:name` (MT-Bench's categories), one chart an evaluator and kind."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for score in scores:
        if of_part(score) and score.get("phase") in ("base", "tuned") and score["value"] is not None:
            found.setdefault((str(score.get("evaluator")), score["metric"].partition(":")[0]), []).append(score)
    return [
        (f"{evaluator}: {kind}", bars([bar(score["metric"].partition(":")[2], score["phase"], score) for score in group], scale(group)))
        for (evaluator, kind), group in found.items()
    ]


def bar(group: str, name: str, score: Mapping[str, Any]) -> Bar:
    return Bar(group=group, name=name, value=score["value"], low=score.get("ci_low"), high=score.get("ci_high"))


def scale(scores: Any) -> tuple[float, float]:
    """0 to 1 for shares, 0 to 10 for ratings, else what there is."""
    values = [value for score in scores for value in (score["value"], score.get("ci_low"), score.get("ci_high")) if value is not None]
    low, high = min([0.0, *values]), max(values)
    return low, next((top for top in (1.0, 5.0, 10.0) if high <= top), high)


def of_part(score: Mapping[str, Any]) -> bool:
    return ":" in score["metric"]


def of_preferences(name: str) -> bool:
    return name.startswith(("rewards", "logps", "kl", "length", "margins"))


def evaluation_marks(told: Told) -> list[Mark]:
    """Where base and tuned were evaluated, and each evaluation in between."""
    steps = [line["step"] for line in told.metrics]
    if not steps:
        return []
    phases = {score.get("phase") for score in told.scores}
    marks = [Mark(line["step"]) for line in told.metrics if any(key.startswith("eval_") for key in line)]
    marks += [Mark(steps[0], "base")] if "base" in phases else []
    return marks + ([Mark(steps[-1], "tuned")] if "tuned" in phases else [])


# ---- predicted and measured ----------------------------------------------------------------------------------------


def plan_part(told: Told) -> Part:
    """plan.json: what was expected beside what came; nothing without one."""
    predicted, measured = (told.plan.get(side) or {} for side in ("predicted", "measured"))
    if not predicted and not measured:
        return Part()
    shown = {
        "peak_memory": ("peak memory of tensors", size),
        "evaluation_memory": ("memory while answering", size),
        "resident_memory": ("resident memory, libraries included", size),
        "seconds": ("time", duration),
        "steps": ("steps", count),
        "tokens": ("tokens", count),
        "supervised_tokens": ("supervised tokens", count),
        "disk": ("disk", size),
    }
    rows = [plan_row(name, predicted.get(key), measured.get(key), form) for key, (name, form) in shown.items() if key in predicted or key in measured]
    kinds = [side.get("by_kind") or {} for side in (predicted, measured)]
    rows += [plan_row(f"memory: {kind}", kinds[0].get(kind), kinds[1].get(kind), size) for kind in dict.fromkeys([*kinds[0], *kinds[1]])]
    memory = [(side, told.plan.get(side, {}).get("peak_memory")) for side in ("predicted", "measured") if told.plan.get(side)]
    drawn = [Bar(group="of tensors, GiB", name=side, value=value / GIB) for side, value in memory if is_number(value)]
    charts = [("peak memory", bars(drawn, (0, max(one.value for one in drawn) or 1)))] if drawn else []
    return Part(heading="Memory and time: predicted and measured", id="plan", rows=rows, charts=charts)


def plan_row(name: str, predicted: Any, measured: Any, form: Any) -> dict[str, str]:
    shares = is_number(predicted) and is_number(measured) and predicted
    return {
        "": name,
        "predicted": form(predicted) if is_number(predicted) else "",
        "measured": form(measured) if is_number(measured) else "",
        "measured / predicted": f"{measured / predicted:.2f}" if shares else "",
    }


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def size(value: float) -> str:
    for unit, bytes_ in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= bytes_:
            return f"{value / bytes_:.2f} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}" if minutes else f"{seconds:.1f} s"


def count(value: float) -> str:
    return f"{value:,.0f}"


# ---- what judging took ---------------------------------------------------------------------------------------------


def usage_rows(told: Told) -> list[dict[str, str]]:
    """One row a judge: its calls, tokens and money (blank where it has no price), of the run and of every `ftx eval` since."""
    judges = [(f"{evaluator}: {judge}", counts) for evaluator, each in (told.manifest.get("usage") or {}).items() for judge, counts in each.items()]
    shown = {"calls": "calls", "cached": "from the cache", "input_tokens": "input tokens", "output_tokens": "output tokens"}
    return [
        {"judge": name, **{title: value_text(counts.get(key)) for key, title in shown.items()}, "USD": value_text(counts.get("cost"))}
        for name, counts in judges
    ]


# ---- the audit -----------------------------------------------------------------------------------------------------


def audit_parts(told: Told) -> list[Part]:
    """The gate's figures for both splits, everything that was found, and the ledger by reason."""
    splits = {name: flat({key: value for key, value in about.items() if key != "findings"}) for name, about in told.audit.items() if is_split(about)}
    rows = [
        {"": key, **{name: value_text(about.get(key)) for name, about in splits.items()}}
        for key in dict.fromkeys(key for about in splits.values() for key in about)
    ]
    found = [{"split": name, **finding} for name, about in told.audit.items() if is_split(about) for finding in about.get("findings") or []]
    findings = [finding_row(finding) for finding in found]
    facts = {key: value_text(value) for key, value in flat({name: about for name, about in told.audit.items() if not is_split(about)}).items()}
    return [
        Part(heading="Audit of the data", id="audit", rows=rows, facts=facts),
        Part(heading="Findings", id="findings", rows=findings, numbers=False),
        Part(heading="Rows not used as they came", id="ledger", rows=ledger_rows(told.ledger), numbers=False),
    ]


def finding_row(finding: Mapping[str, Any]) -> dict[str, str]:
    """One line of what may be long: the first places, and of the details those that are a word or a number."""
    places = [value_text(place) for place in finding.get("places") or []]
    details = {key: value for key, value in flat(finding.get("details") or {}).items() if isinstance(value, str | int | float)}
    return {
        "split": str(finding["split"]),
        "what": value_text(finding.get("what")),
        "rows": value_text(finding.get("rows")),
        "refuses": "yes" if finding.get("refuses") else "",
        "places": ", ".join(places[:PLACES]) + (f" and {len(places) - PLACES} more" if len(places) > PLACES else ""),
        "details": ", ".join(f"{key} {value_text(value)}" for key, value in details.items()),
        "by": value_text(finding.get("by")),
    }


def is_split(about: Any) -> bool:
    return isinstance(about, Mapping) and "rows" in about


def flat(about: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested mappings as one: `length p50`."""
    found: dict[str, Any] = {}
    for key, value in about.items():
        name = f"{before}{key}".replace("_", " ")
        found |= flat(value, f"{name} ") if isinstance(value, Mapping) else {name: value}
    return found


def value_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def ledger_rows(ledger: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for entry in ledger:
        groups.setdefault((str(entry.get("action")), str(entry.get("reason"))), []).append(entry)
    return [
        {
            "action": action,
            "reason": reason,
            "rows": f"{len(entries):,}",
            "the first": ", ".join(f"{Path(str(entry.get('file'))).name}:{entry.get('line')}" for entry in entries[:PLACES]),
        }
        for (action, reason), entries in groups.items()
    ]


# ---- several runs --------------------------------------------------------------------------------------------------


def side_by_side(runs: Sequence[Told], columns: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """One row a fact, one column a run; facts that no run knows are left out."""
    keys = dict.fromkeys(key for facts in columns.values() for key in facts)
    known = [key for key in keys if any(facts.get(key) is not None for facts in columns.values())]
    return [{"": key, **{told.name: value_text(columns[told.name].get(key)) for told in runs}} for key in known]


def tuned_scores(runs: Sequence[Told]) -> list[dict[str, str]]:
    """Every metric of the tuned models; base where it was measured, from the first run that has it."""
    keys = dict.fromkeys((score.get("evaluator", ""), score["metric"]) for told in runs for score in told.scores if score.get("phase") == "tuned")
    return [{"metric": " ".join(filter(None, key)), **{name: scored(among, key, phase) for name, among, phase in _columns(runs)}} for key in keys]


def _columns(runs: Sequence[Told]) -> list[tuple[str, Sequence[Told], str]]:
    """(heading, runs to look in, phase); base once where the runs that measured it agree, else beside each run."""
    base: dict[tuple[str, str], set[Any]] = {}
    for score in (score for told in runs for score in told.scores if score.get("phase") == "base"):
        base.setdefault((score.get("evaluator", ""), score["metric"]), set()).add(score["value"])
    tuned = [(told.name, [told], "tuned") for told in runs]
    if all(len(values) == 1 for values in base.values()):
        return [("base", runs, "base"), *tuned] if base else tuned
    return [column for told in runs for column in ((f"{told.name}: base", [told], "base"), (told.name, [told], "tuned"))]


def scored(runs: Sequence[Told], key: tuple[str, str], phase: str) -> str:
    found = (score for told in runs for score in told.scores if (score.get("evaluator", ""), score["metric"]) == key and score.get("phase") == phase)
    return next((with_interval(score) for score in found), "")


def run_bars(runs: Sequence[Told]) -> list[tuple[str, str]]:
    """The headline metric of each evaluator: a bar a run."""
    heads: dict[tuple[str, str], list[tuple[str, Mapping[str, Any]]]] = {}
    for told in runs:
        for evaluator, _, tuned in headlines(told.scores):
            heads.setdefault((evaluator, tuned["metric"]), []).append((told.name, tuned))
    return [
        (f"{evaluator}: {metric}", bars([bar(shorten(name), "tuned", score) for name, score in group], scale(score for _, score in group)))
        for (evaluator, metric), group in heads.items()
    ]


def shared_curves(runs: Sequence[Told]) -> list[tuple[str, str]]:
    """One chart a figure, one line a run."""
    charts = []
    for figure in ("loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second", "rewards/accuracies", "rewards/margins", "kl"):
        points = {shorten(told.name): [(line["step"], line[figure]) for line in told.metrics if is_number(line.get(figure))] for told in runs}
        drawn = {name: [point for point in line if point[1] == point[1] and abs(point[1]) != float("inf")] for name, line in points.items()}
        drawn = {name: line for name, line in drawn.items() if line}
        if drawn:
            charts.append((figure, lines(drawn)))
    return charts


def shorten(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:11]}…{name[-12:]}"


def recipe_differences(runs: Sequence[Told]) -> list[dict[str, str]]:
    flattened = {told.name: flat(_by_name(told.recipe)) for told in runs}
    keys = dict.fromkeys(key for recipe in flattened.values() for key in recipe)
    differ = [key for key in keys if len({value_text(recipe.get(key)) for recipe in flattened.values()}) > 1]
    return [{"": key, **{told.name: value_text(flattened[told.name].get(key)) for told in runs}} for key in differ]


def _by_name(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Lists of plugins as mappings, so that options are compared one by one."""
    named = {
        key: {one["name"]: one for one in value} for key, value in recipe.items() if isinstance(value, list) and all(isinstance(one, Mapping) for one in value)
    }
    return {**recipe, **named}


def _files(told: Told, key: str) -> dict[str, dict[str, Any]]:
    files: dict[str, dict[str, Any]] = ((told.manifest.get("data") or {}).get(key) or {}).get("files") or {}
    return files
