"""ftx generate: answers of a finished run to a file of prompts."""

from __future__ import annotations

from pathlib import Path

import click

from ftx.commands.common import answering, output_options, voice_options


@click.command("generate")
@click.argument("run")
@click.option("--data", metavar="FILE", required=True, help="Rows as the run was trained on, or prompts alone (columns prompt or messages).")
@click.option("--output", metavar="FILE", default="answers.jsonl", help="Where the answers go, as JSON lines (default: answers.jsonl).")
@click.option("--base", is_flag=True, help="Ask the base instead of the tuned model.")
@click.option("--formatter", metavar="NAME", help="How rows are read (default: the run's).")
@click.option("-o", "--option", "assignments", metavar="formatter.K=V", multiple=True, help="An option of the formatter; repeatable.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=256, metavar="N", help="Longest answer (default: 256).")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="The first N rows only.")
@voice_options
@output_options
def command(
    run: str,
    data: str,
    output: str,
    base: bool,
    formatter: str | None,
    assignments: tuple[str, ...],
    max_new_tokens: int,
    limit: int | None,
    temperature: float,
    seed: int | None,
    raw: bool,
    dtype: str | None,
    device: str | None,
    quiet: bool,
    as_json: bool,
    traceback: bool,
) -> None:
    """Write the answers of RUN's tuned model, or of its base, beside the prompts of a file."""
    with answering(as_json=as_json, traceback=traceback) as result:
        from ftx.catalogue import Catalogue
        from ftx.console import Console
        from ftx.voices import Voices, answer_file, check_output

        file, phase, console = Path(output).expanduser(), "base" if base else "tuned", Console(quiet=quiet, json=as_json)
        check_output(file)
        voices = Voices(run, Catalogue(), console, only="base" if base else None, assignments=assignments, formatter=formatter, dtype=dtype, device=device)
        result.content = answer_file(
            voices, phase, data, file, console, raw=raw, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, limit=limit
        )
        console.say(f"{result.content['answers']} answers of the {phase} model: {file}")
