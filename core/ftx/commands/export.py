"""ftx export: hand a finished run on, in another form that is read back and held to the run."""

from __future__ import annotations

import click

from ftx.commands.common import answering, one_file, output_options


@click.command("export")
@click.argument("run")
@click.option("--to", metavar="NAME", required=True, help="The exporter: ftx plugins lists them.")
@click.option("--output", metavar="DIR", help="Where it will lie (default: RUN/export/NAME).")
@click.option("-o", "--option", "assignments", metavar="exporter.K=V", multiple=True, help="An option of the exporter; repeatable.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Precision (default: the run's own).")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Where it is loaded and checked (default: the run's own).")
@one_file("--eval-data", help="Data whose prompts it is checked with (default: the run's own).")
@click.option("--prompts", metavar="N", type=click.IntRange(min=1), default=50, show_default=True, help="How many prompts it is checked with.")
@click.option("--least", metavar="SHARE", type=click.FloatRange(0, 1), help="Least share of tokens that must agree (default: as the precision allows).")
@click.option("--base-licence", metavar="NAME", help="Licence of the base, for the model card (default: what the base says).")
@click.option("--data-licence", metavar="NAME", help="Licence of the data, for the model card.")
@output_options
def command(
    run: str,
    to: str,
    output: str | None,
    assignments: tuple[str, ...],
    dtype: str | None,
    device: str | None,
    eval_data: str | None,
    prompts: int,
    least: float | None,
    base_licence: str | None,
    data_licence: str | None,
    quiet: bool,
    as_json: bool,
    traceback: bool,
) -> None:
    """Write RUN's tuned model in another form, read it back with another program, and hold it to the run.

    An export that does not agree with the run is an error (exit status 1) and is not put in its place.
    """
    with answering(as_json=as_json, traceback=traceback) as result:
        from ftx.catalogue import Catalogue
        from ftx.console import Console
        from ftx.export import export

        result.content = export(
            run,
            to,
            assignments=assignments,
            output=output,
            given={"dtype": dtype, "device": device, "eval_data": eval_data},
            prompts=prompts,
            least=least,
            licences={"base": base_licence, "data": data_licence},
            catalogue=Catalogue(),
            console=Console(quiet=quiet, json=as_json),
        )
