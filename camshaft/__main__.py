"""`python -m camshaft` is the command `camshaft`."""

from __future__ import annotations

from camshaft.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
