"""Every entry of docs/from-your-loop is in the overview, has both halves, prints the output on the page, and is tested."""

import ast
import re
from pathlib import Path

import pytest
from snippet_pages import FOLDER, entries, pages, result

TESTS = sorted(Path(__file__).parent.glob("test_snippets_*.py"))
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w.]*\d)")


def anchor(title):
    """The anchor of a heading, as GitHub and MyST create it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def overview():
    """The links of the overview, in order."""
    return re.findall(r"\]\(([\w-]+\.md#[^)]+)\)", (FOLDER / "index.md").read_text())


def titles_passed_to(function):
    """The titles that tests pass to one of these functions, found by the constants in the calls."""
    found = set()
    for tree in (ast.parse(path.read_text()) for path in TESTS):
        constants = {
            node.targets[0].id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        }
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            if call.func.id in function and isinstance(call.args[0], ast.Name):
                found.add(constants[call.args[0].id])
    return found


def test_the_overview_links_to_every_entry():
    assert sorted(overview()) == sorted(f"{entry.page}#{anchor(title)}" for title, entry in entries().items())


def test_the_copied_half_of_every_entry_is_tested():
    assert titles_passed_to({"copied", "copied_with_another_library"}) == set(entries())


def test_the_replacement_of_every_entry_is_tested():
    assert titles_passed_to({"instead"}) == set(entries())


def test_the_pages_are_found():
    assert len(pages()) >= 8
    assert len(entries()) >= 40


@pytest.mark.parametrize("which", ["copied", "instead"])
@pytest.mark.parametrize("title", entries())
def test_an_entry_prints_the_output_shown_on_the_page(title, which):
    check_printed(result(title, which)[1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", ["poutyne", "torchtnt"])
def test_another_library_prints_the_output_shown_on_the_page(library):
    pytest.importorskip(library)
    (title,) = (title for title, entry in entries().items() if f"from {library}" in entry.text)
    check_printed(result(title, "copied", ("python", "py"))[1])


def check_printed(outputs):
    """Fails if a block prints other words than the page shows, or numbers that differ by more than rounding."""
    for block, printed in outputs.items():
        assert NUMBER.sub("#", printed) == NUMBER.sub("#", block.printed)
        assert numbers(printed) == pytest.approx(numbers(block.printed), rel=0.05)


def numbers(text):
    return [float(number) for number in NUMBER.findall(text)]


@pytest.mark.parametrize("title", entries())
def test_an_entry_has_both_halves_with_output(title):
    entry = entries()[title]
    assert entry.copied.blocks
    assert any(block.printed for block in entry.copied.blocks)
    assert any(block.printed for block in entry.instead.blocks)
