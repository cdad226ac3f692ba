"""The commands, their arguments and their exit codes."""

from __future__ import annotations

import click

__all__ = ["camshaft"]


@click.group()
@click.version_option(package_name="camshaft")
def camshaft() -> None:
    """Looks at what a training run has left behind."""
