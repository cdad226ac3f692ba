"""The README and the guide are correct: their code runs, their links work, and their cycle is the real one."""

import doctest
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from camshaft import StepEvents

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
PAGES = [page for page in PAGES if not page.startswith("docs/_build/")]
PRINTED = {"README.md": r"noise added [1-9]\d* times\n"}
"""What the code of a page prints, if no ```output block of the page shows it."""

ALLOWED = (
    "`torch.jit:DeprecationWarning",  # torch uses it itself
    "Synchronization debug mode is a prototype:UserWarning",
    "called a synchronizing CUDA operation:UserWarning",  # a page shows how to get these
)
"""The beginnings of warnings that are no errors, with their categories."""

FENCE = re.compile(r"^(`{3,})([^`\n]*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
"""A block of any kind, including Sphinx's directives."""


def blocks(page, kind):
    """The blocks of a page whose first line matches, as (line number in the page, text)."""
    text = (ROOT / page).read_text()
    found = FENCE.finditer(text)
    return [(text.count("\n", 0, match.start(3)), match[3]) for match in found if re.fullmatch(kind, match[2])]


def run(code, tmp_path, *options):
    """Runs blocks as one script. Errors name the line of the page."""
    lines = []
    for line, block in code:
        lines += [""] * (line - len(lines)) + block.splitlines()
    script = tmp_path / "page.py"
    script.write_text("\n".join(lines))
    return subprocess.run([sys.executable, *options, script], cwd=tmp_path, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path):
    allowed = [option for warning in ALLOWED for option in ("-W", f"ignore:{warning}")]
    done = run(blocks(page, "python"), tmp_path, "-W", "error", *allowed)
    assert done.returncode == 0, done.stderr
    assert re.search(PRINTED.get(page, ""), done.stdout)
    shown = "".join(text for _, text in blocks(page, "output"))
    same = doctest.OutputChecker().check_output(shown, done.stdout, doctest.ELLIPSIS)
    assert not shown or same, f"{page} shows\n{shown}\nand its code prints\n{done.stdout}"


def peers(page):
    """The kinds of blocks on a page that run only if another package is installed."""
    return sorted(set(re.findall(r"^```(python requires=\w+)$", (ROOT / page).read_text(), re.MULTILINE)))


@pytest.mark.parametrize(("page", "kind"), [(page, kind) for page in PAGES for kind in peers(page)])
def test_the_code_for_another_package_runs_if_it_is_installed(page, kind, tmp_path):
    package = kind.partition("=")[2]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    done = run(blocks(page, f"python|{kind}"), tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_code_of_the_readme_is_run():
    assert len(blocks("README.md", "python")) >= 3


def links(page):
    return re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", FENCE.sub("", (ROOT / page).read_text()))


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_have_a_target(page):
    assert [link for link in links(page) if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_the_guide_shows_every_event_in_the_order_in_which_it_fires():
    cycle = next(text for _, text in blocks("docs/guide/cycle.md", "") if "FORWARD_STARTED" in text)
    named = re.findall(r"^ +([A-Z_]+)\b", cycle, re.MULTILINE)
    assert [name for name in named if name in StepEvents.__members__] == [event.name for event in StepEvents]


def texts(picture):
    """The texts of an SVG that was drawn by matplotlib, line by line."""
    return re.findall(r"<!-- (.+?) -->", picture.read_text())


def test_the_picture_of_the_cycle_shows_every_event_in_the_order_in_which_it_fires():
    shown = [text for text in texts(ROOT / "docs/images/cycle.svg") if text in StepEvents.__members__]
    assert shown == [event.name for event in StepEvents]


def test_the_picture_of_the_cycle_equals_the_output_of_its_script(tmp_path):
    subprocess.run([sys.executable, ROOT / "docs/draw_cycle.py", "--out", tmp_path / "cycle.svg"], check=True, timeout=120)
    assert texts(tmp_path / "cycle.svg") == texts(ROOT / "docs/images/cycle.svg")


def test_the_commands_of_the_readme_are_targets_of_the_makefile():
    named = re.findall(r"(?:^|`)make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"mnist", "test", "docs"} <= set(named) <= targets
