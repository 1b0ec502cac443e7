"""From files to audited token ids: read, format, encode, check that no row was lost, audit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftx import audit, cache
from ftx.data import ROW_TYPES, read_dataset, row_type
from ftx.errors import DataError, PluginError
from ftx.files import left_out
from ftx.hooks import Hooks
from ftx.ledger import Entry, Ledger
from ftx.run import Run, read_lines, write_lines

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Split:
    """One split: its rows as formatted, and as token ids and labels."""

    rows: Dataset
    tokens: Dataset


def check_row_types(hooks: Hooks) -> None:
    """Refuse a formatter and a trainer that cannot fit, from what their classes say for certain."""
    formatter, trainer = (next(plugin for key, plugin in hooks.list_name_plugin() if key.startswith(f"{stage}:")) for stage in ("formatter", "trainer"))
    produces, accepts = getattr(formatter, "produces", ()), getattr(trainer, "accepts", ())
    if produces and accepts and not set(produces) & set(accepts):
        names = {key.partition(":")[0]: key.partition(":")[2] for key, _ in hooks.list_name_plugin()}
        raise PluginError(
            f"formatter '{names['formatter']}' gives {' or '.join(produces)} rows, trainer '{names['trainer']}' takes {' or '.join(accepts)}.",
            "Choose another formatter or trainer: ftx plugins",
        )


def prepare(hooks: Hooks, tokenizer: Any, run: Run) -> tuple[dict[str, Split], dict[str, Any]]:
    """Read, format, encode and audit both splits: the splits, and audit.json's content. Raises DataError."""
    splits: dict[str, Split] = {}
    report: dict[str, Any] = {}
    for name, reference in (("train", run.recipe.data), ("eval", run.recipe.eval_data)):
        if reference is None:
            continue
        run.ledger.begin(name)
        made = once(reference, hooks, tokenizer, run)
        rows, tokens = made.rows, made.tokens
        own, figures = audit.audit_tokens(tokens, tokenizer, run)
        findings = [("core", finding) for finding in own]
        encoded = _behind(rows, tokens)
        train_rows = splits["train"].rows if name == "eval" else None
        for author, more in hooks.each("audit_dataset", dataset=tokens, rows=encoded, train_rows=train_rows, split=name, run=run):
            findings += [(author, finding) for finding in more or []]
        kept = audit.gate(tokens, name, findings, run)
        splits[name] = Split(_matching(rows, kept), kept)
        counts = account(name, kept, run)
        report[name] = {**figures, "source_rows": counts, "findings": [audit.described(author, finding, tokens) for author, finding in findings]}
        lengths = "/".join(str(figures["length"][share]) for share in ("p5", "p50", "p95", "max"))
        run.say(
            f"{name}: {len(kept)} rows of {counts['in']} in {reference}, {figures['tokens']} tokens, "
            f"{figures['supervised_share']:.0%} supervised, lengths {lengths} (p5/p50/p95/max)"
        )
    if "eval" in splits:
        same = audit.overlap(splits["train"].rows, splits["eval"].rows)
        report["overlap"] = {"eval_rows_in_train": len(same)}
        if same:
            finding = audit.Finding(
                "rows that stand in the training data",
                same,
                not run.recipe.allow_overlap,
                "Take them out of one of the two, or go on with --allow-overlap.",
                droppable=False,
            )
            audit.gate(splits["eval"].rows, "eval", [("core", finding)], run)
            report["eval"]["findings"].append(audit.described("core", finding, splits["eval"].rows))
    run.ledger.split = "train"  # what is entered from now on, training leaves out
    return splits, report


def once(reference: str, hooks: Hooks, tokenizer: Any, run: Run) -> cache.Prepared:
    """One split, encoded now or taken from an earlier run: the ledger and what is said are the same."""
    key = cache.key_of(reference, hooks, run)
    found = cache.load(key) if key is not None else None
    if found is not None:
        for line in found.said:
            run.say(line)
        _take_over(run.ledger, found.came, found.entries)
        run.notes.update(found.notes)
        return found
    said: list[str] = []
    ledger, say, notes = run.ledger, run.say, dict(run.notes)

    def heard(line: str) -> None:
        said.append(line)
        say(line)

    own = Ledger(skip_bad_rows=ledger.skip_bad_rows)  # of this split alone, whatever another one has in common with it
    run.ledger, run.say = own, heard
    try:
        rows, tokens = encode(reference, hooks, tokenizer, run)
    finally:
        run.ledger, run.say = ledger, say
        _take_over(ledger, own.came.get("", 0), own.entries)
    new = {name: value for name, value in run.notes.items() if name not in notes or notes[name] != value}
    made = cache.Prepared(own.came.get("", 0), rows, tokens, said, new, own.entries)
    if key is not None and run.is_main:
        cache.store(key, made)
    return made


def _take_over(ledger: Ledger, came: int, entries: list[Entry]) -> None:
    ledger.count(came)
    for entry in entries:
        ledger.add(**vars(entry))


def encode(reference: str, hooks: Hooks, tokenizer: Any, run: Run) -> tuple[Dataset, Dataset]:
    """A file's rows as formatted, and as token ids and labels; none lost, none invented. Raises DataError, PluginError."""
    raw = read_dataset(reference, run.ledger)
    if others := left_out(Path(reference).expanduser()):
        run.say(f"{reference}: not read: {', '.join(others[:5])}{f' and {len(others) - 5} more' if len(others) > 5 else ''}")
    rows = _formatted(reference, raw, hooks, run)
    check_rows(raw, rows, "formatter", hooks, run)
    kind = row_type(rows.column_names)
    trainer = next(plugin for key, plugin in hooks.list_name_plugin() if key.startswith("trainer:"))
    accepts = getattr(trainer, "accepts", ())
    if kind is None or (accepts and kind not in accepts):
        columns = ", ".join(name for name in rows.column_names if not name.startswith("_"))
        wanted = " or ".join(accepts or ROW_TYPES)
        raise DataError(
            f"the formatter gave {kind or 'no known'} rows (columns {columns}), the trainer takes {wanted}.",
            "Choose another formatter or trainer: ftx plugins",
        )
    tokens = hooks.call("encode_dataset", dataset=rows, tokenizer=tokenizer, run=run)
    check_rows(rows, tokens, "trainer", hooks, run)
    return rows, tokens


def _formatted(reference: str, raw: Dataset, hooks: Hooks, run: Run) -> Dataset:
    """The formatter's rows; what it says of the columns gets the name of the file, for there are two of them."""
    try:
        rows: Dataset = hooks.call("format_dataset", dataset=raw, run=run)
    except DataError as error:
        if str(Path(reference).expanduser()) in error.problem:
            raise
        raise DataError(f"{reference}: {error.problem}", error.remedy) from error
    return rows


def settle(splits: dict[str, Split], run: Run) -> dict[str, dict[str, int]]:
    """At the end of a run: `account` of each split once more, with what a trainer or an evaluator has entered since, and the
    ledger as it is now on disk."""
    if run.directory is not None and run.is_main and read_lines(run.directory / "ledger.jsonl") != run.ledger.as_rows():
        write_lines(run.directory / "ledger.jsonl", run.ledger.as_rows())
    counts = {}
    for name, split in splits.items():
        run.ledger.split = name
        counts[name] = account(name, split.tokens, run, late=True)
    return counts


def account(split: str, tokens: Dataset, run: Run, *, late: bool = False) -> dict[str, int]:
    """Source rows that came in, that are used, changed or not, and that were dropped. PluginError if the sum is not right.

    `in` = `as_they_came` + `changed` + `dropped`; of the last two every row stands in the ledger. `late`: a row of `tokens` may
    have been dropped since.
    """
    ledger = run.ledger
    came, dropped = ledger.came.get(split, 0), ledger.dropped()
    used, both = came - len(dropped), 0
    if _have_sources(tokens):
        import numpy

        from ftx import columns

        files: list[str] = []
        keys = numpy.unique(columns.sources(tokens, files))
        used = len(keys)
        if dropped:
            both = sum(columns.source(key, files) in dropped for key in keys)
        if late:
            used, both = used - both, 0
    if both or came != used + len(dropped) or len(tokens) < used:
        wrong = f"{both} of them are both" if both else f"{abs(came - used - len(dropped)) or used - len(tokens)} are not accounted for"
        raise PluginError(
            f"{split} data: {came} rows came in, {used} are used and {len(dropped)} are in the ledger as dropped; {wrong}.",
            "A formatter or trainer that leaves rows out must do it through ftx.format_rows, which writes them down.",
        )
    changed = len(ledger.changed())
    return {"in": came, "used": used, "as_they_came": used - changed, "changed": changed, "dropped": len(dropped)}


def read_questions(hooks: Hooks, run: Run) -> Dataset | None:
    """The formatted evaluation data of a run that is read back, less the rows that its ledger dropped."""
    if run.recipe.eval_data is None:
        return None
    assert run.directory is not None
    rows = hooks.call("format_dataset", dataset=read_dataset(run.recipe.eval_data, run.ledger), run=run)
    dropped = {(e["file"], e["line"]) for e in read_lines(run.directory / "ledger.jsonl") if e["action"] == "dropped"}
    if not dropped or not _have_sources(rows):
        return rows
    from ftx import columns

    files: list[str] = []
    came = columns.sources(rows, files)
    numbers = [number for number, key in enumerate(came) if columns.source(key, files) in dropped]
    return columns.without(rows, numbers) if numbers else rows


def check_rows(before: Dataset, after: Dataset, who: str, hooks: Hooks, run: Run) -> None:
    """Nothing is dropped without a ledger entry: every source row is used or in the ledger, and none is invented."""
    if _have_sources(before, after):
        import numpy

        from ftx import columns

        files: list[str] = []
        came, used = (numpy.unique(columns.sources(d, files)) for d in (before, after))
        lost, invented = numpy.setdiff1d(came, used, assume_unique=True), numpy.setdiff1d(used, came, assume_unique=True)
        if len(lost):
            dropped = run.ledger.dropped()
            lost = numpy.array([key for key in lost if columns.source(key, files) not in dropped], dtype=numpy.int64)
        count = len(lost) or len(invented)
        where = "{}:{}".format(*min(columns.source(key, files) for key in (lost if len(lost) else invented))) if count else ""
    else:
        count, where = abs(len(before) - len(after)) if who == "trainer" else max(0, len(before) - len(after)), "unknown lines"
    if count:
        name = next(key.partition(":")[2] for key, _ in hooks.list_name_plugin() if key.startswith(f"{who}:"))
        raise PluginError(
            f"{who} '{name}' lost or invented {count} rows without a ledger entry ({where}).",
            "Rows are dropped through ftx.format_rows, which writes them down.",
        )


def _behind(rows: Dataset, tokens: Dataset) -> Dataset:
    """The formatted rows that were encoded, one for each encoded row, in its order."""
    if len(rows) == len(tokens):
        return rows
    import numpy

    from ftx import columns

    files: list[str] = []
    came, used = columns.sources(rows, files), columns.sources(tokens, files)
    mask = numpy.isin(came, used)
    if mask.sum() != len(tokens) and {"_part"} <= set(rows.column_names) & set(tokens.column_names):
        known = set(zip(used.tolist(), tokens["_part"], strict=True))
        mask = numpy.array([one in known for one in zip(came.tolist(), rows["_part"], strict=True)])
    if mask.sum() != len(tokens):
        raise PluginError("the trainer's rows cannot be told apart: some rows of one source are missing.", "Encode with ftx.format_rows, which keeps `_part`.")
    return columns.kept(rows, mask)


def _matching(rows: Dataset, kept: Dataset) -> Dataset:
    """The formatted rows behind the encoded ones that are kept."""
    if not _have_sources(rows, kept):
        return rows
    import numpy

    from ftx import columns

    files: list[str] = []
    used, came = columns.sources(kept, files), columns.sources(rows, files)
    mask = numpy.isin(came, used)
    return rows if mask.all() else columns.kept(rows, mask)


def _have_sources(*datasets: Dataset) -> bool:
    return all({"_file", "_line"} <= set(one.column_names) for one in datasets)
