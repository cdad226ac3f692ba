"""Reads and runs the pages of docs/from-your-loop. Each entry has a half of copied code and a half that replaces it."""

import contextlib
import io
import os
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import sklearn.datasets  # noqa: F401  # the first import sets environment variables

FOLDER = Path(__file__).parents[2] / "docs/from-your-loop"
COPIED, INSTEAD = (re.compile(rf"^\*\*{word}\*\*", re.MULTILINE) for word in ("Copied", "Instead"))
"""The words that start the halves of an entry. Code before them belongs to both halves."""

PART = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A block of code of a page, and the output that the page shows for it."""

    language: str
    line: int
    code: str
    printed: str


class Half(NamedTuple):
    """One half of an entry: the code before it and its own code."""

    page: str
    setup: tuple[Block, ...]
    blocks: tuple[Block, ...]


class Entry(NamedTuple):
    """One heading of a page."""

    page: str
    title: str
    text: str
    copied: Half
    instead: Half


def blocks_of(text, line):
    """The code in a part of a page that starts at ``line``. Each block has the output that follows it.

    The ``python`` blocks run without other libraries. A ``py`` block needs another library, and runs only if it is installed.
    """
    found = []
    for part in PART.finditer(text):
        if part[1] in ("python", "py"):
            found.append(Block(part[1], line + text.count("\n", 0, part.start(2)), part[2], ""))
        elif part[1] == "text":
            found[-1] = found[-1]._replace(printed=found[-1].printed + part[2])
    return tuple(found)


def entries_of(path):
    """The entries of a page, one for each heading of the second level."""
    text = path.read_text()
    starts = [match.start() for match in re.finditer(r"^## ", text, re.MULTILINE)]
    setup = blocks_of(text[: starts[0]], 0) if starts else ()
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        cuts = [start, *(word.search(text, start, end).start() for word in (COPIED, INSTEAD)), end]
        shared, *halves = [
            blocks_of(text[begin:stop], text.count("\n", 0, begin)) for begin, stop in zip(cuts, cuts[1:], strict=False)
        ]
        title = text[start:end].splitlines()[0].removeprefix("## ")
        yield Entry(path.name, title, text[start:end], *(Half(path.name, setup + shared, half) for half in halves))


def pages():
    """The pages with entries."""
    return [path for path in sorted(FOLDER.glob("*.md")) if path.stem != "index"]


@cache
def entries():
    """Every entry of every page, by its title."""
    found = [entry for path in pages() for entry in entries_of(path)]
    assert len({entry.title for entry in found}) == len(found), "two entries have one title"
    return {entry.title: entry for entry in found}


def run(half, languages=("python",)):
    """Runs one half of an entry in a temporary folder: first the code before it, then its own blocks.

    Returns:
        The names that the code defines, and the output of each of its blocks.
    """
    names = {"__name__": "__main__"}
    printed = {}
    with tempfile.TemporaryDirectory() as folder, working_directory(folder):
        for block in half.setup + half.blocks:
            if block.language in languages:
                printed[block] = output_of(block, half.page, names)
    return names, {block: text for block, text in printed.items() if block in half.blocks}


def output_of(block, page, names):
    """Runs a block and returns its output."""
    out = io.StringIO()
    code = "\n" * block.line + block.code  # so that tracebacks show the line of the page
    with contextlib.redirect_stdout(out):
        exec(compile(code, FOLDER / page, "exec"), names)
    return out.getvalue()


@contextlib.contextmanager
def working_directory(folder):
    """Changes the working directory inside the block."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@cache
def result(title, which, languages=("python",)):
    """The result of :func:`run` for one half of the entry with this title. Each half runs once per process."""
    return run(getattr(entries()[title], which), languages)


class Names:
    """The names that a piece of code defines, as attributes."""

    def __init__(self, names):
        self.__dict__.update(names)


def copied(title):
    """The names that the copied half of an entry defines."""
    return Names(result(title, "copied")[0])


def copied_with_another_library(title):
    """The names that the copied half of an entry defines, if it needs another library. The library must be installed."""
    return Names(result(title, "copied", ("python", "py"))[0])


def instead(title):
    """The names that the replacement in an entry defines."""
    return Names(result(title, "instead")[0])


def printed(title, which):
    """The output of one half of an entry."""
    return "".join(result(title, which)[1].values())
