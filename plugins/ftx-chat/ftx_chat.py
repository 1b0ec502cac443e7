"""The commands `ftx chat` and `ftx generate`: a finished run's models asked, one turn at a time or a file of prompts at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ftx.commands.common import answering, one_file, output_options


def voice_options(command: Any) -> Any:
    """--temperature, --seed, --raw, --dtype, --device: what `chat` and `generate` share."""
    for option in reversed(
        [
            click.option("--temperature", type=click.FloatRange(0, 10), default=0.0, metavar="T", help="0 is greedy (default); above it answers are sampled."),
            click.option("--seed", type=int, metavar="N", help="Seed of sampling (default: the run's)."),
            click.option("--raw", is_flag=True, help="Prompts are text to continue, not a user's turn."),
            click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), help="Precision of the base model (default: the run's)."),
            click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Where it runs (default: the run's)."),
        ]
    ):
        command = option(command)
    return command


@click.command("chat")
@click.argument("run", required=False)
@click.option("--base", "only_base", is_flag=True, help="Load the base alone.")
@click.option("--second", is_flag=True, help="Load the base as a second model where the adapter cannot be turned off.")
@click.option("--system", metavar="TEXT", default="", help="System text.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=512, metavar="N", help="Longest answer (default: 512).")
@click.option("--save", "save", metavar="FILE", help="Where /save appends turns (default: chat.jsonl in RUN).")
@voice_options
@click.option("--quiet", is_flag=True, help="Say nothing but the answers.")
@click.option("--traceback", is_flag=True, help="Show the whole traceback of an error.")
def chat(
    run: str | None,
    only_base: bool,
    second: bool,
    system: str,
    max_new_tokens: int,
    save: str | None,
    temperature: float,
    seed: int | None,
    raw: bool,
    dtype: str | None,
    device: str | None,
    quiet: bool,
    traceback: bool,
) -> None:
    """Talk to RUN's tuned model, to its base, or to both side by side. /help lists what can be typed.

    Without RUN: the newest one in runs/. Ctrl-C stops an answer, Ctrl-D leaves. Reads from a pipe too, a line a turn.
    """
    with answering(traceback=traceback):
        from ftx.catalogue import Catalogue
        from ftx.console import Console
        from ftx_chat_conversation import Chat
        from ftx_chat_voices import Voices, newest_run

        run = run or newest_run()
        console = Console(quiet=quiet, json=True)
        voices = Voices(run, Catalogue(), console, only="base" if only_base else None, second=second, dtype=dtype, device=device)
        talk = Chat(
            voices,
            system=system,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            seed=voices.run.seed if seed is None else seed,
            save=Path(save).expanduser() if save else voices.run.directory / "chat.jsonl",
            raw=raw,
            speaking=("base",) if only_base else ("tuned",),
        )
        console.say(f"{voices.run.model} in {run}. /help lists the commands, Ctrl-D leaves.")
        talk.run()


@click.command("generate")
@click.argument("run")
@one_file("--data", required=True, help="Rows as the run was trained on, or prompts alone (columns prompt or messages).")
@click.option("--output", metavar="FILE", default="answers.jsonl", help="Where the answers go, as JSON lines (default: answers.jsonl).")
@click.option("--base", is_flag=True, help="Ask the base instead of the tuned model.")
@click.option("--formatter", metavar="NAME", help="How rows are read (default: the run's).")
@click.option("-o", "--option", "assignments", metavar="formatter.K=V", multiple=True, help="An option of the formatter; repeatable.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=256, metavar="N", help="Longest answer (default: 256).")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="The first N rows only.")
@voice_options
@output_options
def generate(
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
        from ftx_chat_voices import Voices, answer_file, check_output

        file, phase, console = Path(output).expanduser(), "base" if base else "tuned", Console(quiet=quiet, json=as_json)
        check_output(file, data)
        voices = Voices(run, Catalogue(), console, only="base" if base else None, assignments=assignments, formatter=formatter, dtype=dtype, device=device)
        result.content = answer_file(
            voices, phase, data, file, console, raw=raw, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, limit=limit
        )
        console.say(f"{result.content['answers']} answers of the {phase} model: {file}")
