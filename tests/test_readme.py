"""What the README and the guide say is so: their code runs, their links lead somewhere, their cycle is the real one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import camshaft
from camshaft import StepEvents

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
PRINTED = {"README.md": r"noise added [1-9]\d* times\n"}
"""What the code of a page prints."""

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page, language):
    """The blocks of a page in a language, as (line of the page at which it begins, text)."""
    text = (ROOT / page).read_text()
    found = BLOCK.finditer(text)
    return [(text.count("\n", 0, match.start(2)), match[2]) for match in found if match[1] == language]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path):
    script = tmp_path / "page.py"
    lines = []
    for line, code in blocks(page, "python"):
        lines += [""] * (line - len(lines)) + code.splitlines()  # so that an error names the line of the page
    script.write_text("\n".join(lines))
    command = [sys.executable, "-W", "error", "-W", "ignore:`torch.jit:DeprecationWarning", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search(PRINTED.get(page, ""), done.stdout)


def test_the_code_of_the_readme_is_run():
    assert len(blocks("README.md", "python")) >= 3


def links(page):
    return re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", (ROOT / page).read_text())


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_somewhere(page):
    assert [link for link in links(page) if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_the_readme_shows_every_event_in_the_order_in_which_it_fires():
    cycle = next(text for _, text in blocks("README.md", "") if "FORWARD_STARTED" in text)
    named = re.findall(r"^ +([A-Z_]+)\b", cycle, re.MULTILINE)
    assert [name for name in named if name in StepEvents.__members__] == [event.name for event in StepEvents]


def test_the_readme_names_every_handler():
    shipped = set(camshaft.handlers.__all__) - {"Handler", "on"}
    assert {name for name in shipped if f"`{name}`" not in (ROOT / "README.md").read_text()} == set()


def test_the_commands_of_the_readme_are_targets_of_the_makefile():
    named = re.findall(r"(?:^|`)make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"mnist", "test"} <= set(named) <= targets
