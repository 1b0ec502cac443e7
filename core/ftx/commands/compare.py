"""ftx compare: tell runs apart."""

from __future__ import annotations

from typing import Any

import click

from ftx.commands.common import answering, output_options


@click.command("compare")
@click.argument("runs", nargs=-1, required=True)
@output_options
def command(runs: tuple[str, ...], quiet: bool, as_json: bool, traceback: bool) -> None:
    """Show what differs between RUNS in recipe, versions, data and scores. The first is what the others are held against.

    Differences of scores are paired: over the items that both runs evaluated, with a 95 % bootstrap interval.
    """
    with answering(as_json=as_json, traceback=traceback) as result:
        from ftx.compare import compare_runs
        from ftx.console import Console

        console = Console(quiet=quiet, json=as_json)
        found = result.content = compare_runs(runs)
        names = [chr(ord("A") + number) if number < 26 else str(number) for number in range(len(runs))]
        for name, run in zip(names, found["runs"], strict=True):
            console.say(f"{name}: {run}")
        for what in ("recipe", "versions", "data"):
            if found[what]:
                console.table([what, *names], [[key, *map(_cell, values)] for key, values in found[what].items()])
            else:
                console.say(f"{what}: no difference")
        for name, equal in list(zip(names, found["equal_weights"], strict=True))[1:]:
            console.say(f"weights: {name} {'equals' if equal else 'differs from'} A")
        console.table(["evaluator", "metric", *names], [[one["evaluator"], one["metric"], *map(_cell, one["values"])] for one in found["scores"]])
        letter = dict(zip(found["runs"], names, strict=True))
        rows = [
            [
                f"{letter[one['run']]} - A",
                f"{one['evaluator']} {one['figure']}",
                f"{one['difference']:+.3f} [{one['ci_low']:+.3f}, {one['ci_high']:+.3f}]",
                f"{one['p_value']:.3g}",
                str(one["n"]),
            ]
            for one in found["pairs"]
        ]
        console.table(["runs", "figure of an item", "difference", "p", "n"], rows)


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
