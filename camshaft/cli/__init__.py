"""The command line: `camshaft show RUN` and `camshaft verify RUN`."""

from __future__ import annotations

import sys
from importlib.util import find_spec

__all__ = ["main"]

NEEDED = ("click", "rich")
"""The packages of the extra ``cli``."""


def main() -> None:
    """Runs the command line. If its extra is not installed, it says how to install it and exits with 1.

    Raises:
        SystemExit: always, with the command's exit code.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        sys.exit(f"camshaft: the command line needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    from camshaft.cli.commands import camshaft

    camshaft(prog_name="camshaft")
