"""The pages of docs/from-your-loop as the tests read them: entries, half copied code and half the code that replaces it."""

import contextlib
import io
import os
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import sklearn.datasets  # noqa: F401  # when it is first imported it sets variables of the environment

FOLDER = Path(__file__).parents[2] / "docs/from-your-loop"
COPIED, INSTEAD = (re.compile(rf"^\*\*{word}\*\*", re.MULTILINE) for word in ("Copied", "Instead"))
"""The words with which the halves of an entry begin; code before them belongs to both."""

PART = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """Code of a page, and what the page says that it prints."""

    language: str
    line: int
    code: str
    printed: str


class Half(NamedTuple):
    """The code that comes before half an entry, and its own."""

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
    """The code in a part of a page that begins at ``line``, each block with the output that follows it.

    A page runs its ``python`` blocks; a ``py`` block needs another library, and only a test that has it runs it.
    """
    found = []
    for part in PART.finditer(text):
        if part[1] in ("python", "py"):
            found.append(Block(part[1], line + text.count("\n", 0, part.start(2)), part[2], ""))
        elif part[1] == "text":
            found[-1] = found[-1]._replace(printed=found[-1].printed + part[2])
    return tuple(found)


def entries_of(path):
    """The entries of a page: what is under each of its headings of the second level."""
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
    """Runs half an entry as the page would, in a folder of its own: what comes before it, then its blocks.

    Returns:
        The names that it leaves behind, and what each of its blocks has printed, by block.
    """
    names = {"__name__": "__main__"}
    printed = {}
    with tempfile.TemporaryDirectory() as folder, inside(folder):
        for block in half.setup + half.blocks:
            if block.language in languages:
                printed[block] = output_of(block, half.page, names)
    return names, {block: text for block, text in printed.items() if block in half.blocks}


def output_of(block, page, names):
    """Runs a block and returns what it has printed."""
    out = io.StringIO()
    code = "\n" * block.line + block.code  # so that an error names the line of the page
    with contextlib.redirect_stdout(out):
        exec(compile(code, FOLDER / page, "exec"), names)
    return out.getvalue()


@contextlib.contextmanager
def inside(folder):
    """Works in a folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@cache
def result(title, which, languages=("python",)):
    """What :func:`run` gives for one half of the entry with this title, run once in a process."""
    return run(getattr(entries()[title], which), languages)


class Names:
    """The names that a piece of code has left behind, as attributes."""

    def __init__(self, names):
        self.__dict__.update(names)


def copied(title):
    """What the copied half of the entry with this title leaves behind."""
    return Names(result(title, "copied")[0])


def copied_from_a_peer(title):
    """The same for code that needs another library, which must be there."""
    return Names(result(title, "copied", ("python", "py"))[0])


def instead(title):
    """What the half that replaces it leaves behind."""
    return Names(result(title, "instead")[0])


def printed(title, which):
    """What one half of the entry with this title prints."""
    return "".join(result(title, which)[1].values())
