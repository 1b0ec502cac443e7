"""ftx chat: talk to a finished run."""

from __future__ import annotations

from pathlib import Path

import click

from ftx.commands.common import answering, voice_options


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
def command(
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
        from ftx.chat import Chat
        from ftx.console import Console
        from ftx.voices import Voices, newest_run

        run = run or newest_run()
        console = Console(quiet=quiet, json=True)
        voices = Voices(run, Catalogue(), console, only="base" if only_base else None, second=second, dtype=dtype, device=device)
        file = Path(save).expanduser() if save else voices.run.directory / "chat.jsonl"  # type: ignore[operator]
        chat = Chat(
            voices,
            system=system,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            seed=voices.run.seed if seed is None else seed,
            save=file,
            raw=raw,
            speaking=("base",) if only_base else ("tuned",),
        )
        console.say(f"{voices.run.model} in {run}. /help lists the commands, Ctrl-D leaves.")
        chat.run()
