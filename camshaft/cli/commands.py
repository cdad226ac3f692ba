"""The commands, their arguments and their exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from camshaft.checkpoints.text import printable
from camshaft.cli.folders import NoRun, find_folders
from camshaft.cli.integrity import check_folder
from camshaft.cli.pictures import draw_run
from camshaft.cli.run import read_run
from camshaft.cli.tables import print_integrity, print_run

__all__ = ["camshaft"]

RUN = click.argument("run", type=click.Path(path_type=Path))
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="camshaft")
def camshaft() -> None:
    """Shows and checks what a training run has written.

    RUN is a run's folder (TensorBoard's event files, and a folder of checkpoints in it), or the folder of checkpoints itself.
    """


@camshaft.command()
@RUN
@click.option("--plot", is_flag=True, help="Draw metrics and learning rates too, as curves.png in the run's folder.")
@click.option("--plot-to", type=click.Path(path_type=Path), metavar="FILE", help="The same, into this file.")
@JSON
def show(run: Path, plot: bool, plot_to: Path | None, as_json: bool) -> None:
    """Prints a run's checkpoints, metrics and learning rates, and why it stopped."""
    try:
        found = read_run(run)
    except OSError as error:
        raise click.ClickException(printable(f"{run} can't be read: {error}")) from None
    except NoRun as error:
        raise click.BadParameter(printable(str(error)), param_hint="RUN") from None
    picture = plot_to or (run / "curves.png" if plot else None)
    if picture is not None:
        if not found.metrics and not found.learning_rates:
            raise click.ClickException(printable(f"{run} has neither metrics nor learning rates to draw"))
        try:
            draw_run(found, picture)
        except (OSError, ValueError, ModuleNotFoundError) as error:
            raise click.ClickException(printable(f"{picture} can't be drawn: {error}")) from None
    if as_json:
        print_json(found.as_json() | {"picture": None if picture is None else str(picture)})
        return
    print_run(found, new_console())
    if picture is not None:
        click.echo(f"drawn: {picture}")


@camshaft.command()
@RUN
@JSON
def verify(run: Path, as_json: bool) -> None:
    """Checks that every checkpoint is as it was written; exits with 1 if one is not."""
    try:
        folder = find_folders(run).checkpoints
        if folder is None:
            raise NoRun(f"{run} has no folder of checkpoints")
    except NoRun as error:
        raise click.BadParameter(printable(str(error)), param_hint="RUN") from None
    try:
        integrity = check_folder(folder)
    except OSError as error:
        raise click.ClickException(printable(f"{folder} can't be read: {error}")) from None
    if as_json:
        print_json(integrity.as_json())
    else:
        print_integrity(integrity, new_console())
    sys.exit(1 if integrity.bad else 0)


def new_console() -> Console:
    """A console of the terminal's width; for a file or a pipe, wide enough for complete rows."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


def print_json(content: dict[str, Any]) -> None:
    """Prints JSON, and nothing else."""
    click.echo(json.dumps(content, indent=1, allow_nan=False))
