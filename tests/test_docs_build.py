"""The guide builds without a warning, documents every public name, and has no dead link."""

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from sphinx.util.inventory import InventoryFile

import camshaft

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Builds the guide as `make docs` does; returns its folder and the result of the build."""
    folder = tmp_path_factory.mktemp("site")
    options = ["-q", "-W", "--keep-going", "-n", "-b", "html"]
    command = [sys.executable, "-m", "sphinx", *options, ROOT / "docs", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return folder, done


class Anchors(HTMLParser):
    """Collects the ids and the links of a page."""

    def __init__(self, page):
        super().__init__()
        self.ids, self.links = set(), set()
        self.feed(page.read_text())

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id":
                self.ids.add(value)
            elif name in ("href", "src") and value and tag != "link":
                self.links.add(value)


def dead_links(folder):
    """Every (page, link) whose file or anchor does not exist; links to other sites are ignored."""
    pages = {page: Anchors(page) for page in folder.rglob("*.html")}
    for page, found in pages.items():
        for link in found.links:
            target = urlsplit(link)
            if target.scheme or target.netloc:
                continue
            file = (page.parent / unquote(target.path)).resolve() if target.path else page
            anchors = pages[file].ids if file in pages else {""}
            if not file.exists() or unquote(target.fragment) not in anchors | {""}:
                yield page.name, link


def test_the_guide_builds_without_a_warning(site):
    _, done = site
    assert (done.returncode, done.stderr) == (0, "")


def test_the_reference_has_every_public_name(site):
    inventory = InventoryFile.loads((site[0] / "objects.inv").read_bytes(), uri="").data
    entries = {name for kind, names in inventory.items() if kind.startswith("py:") for name in names}
    assert {f"camshaft.{name}" for name in camshaft.__all__} - entries == set()


def test_no_link_inside_the_guide_is_dead(site):
    assert sorted(dead_links(site[0])) == []


def test_a_dead_link_would_be_found(tmp_path):
    (tmp_path / "one.html").write_text('<a id="here" href="two.html">x</a> <a href="#nowhere">x</a> <a href="#here">x</a>')
    assert sorted(link for _, link in dead_links(tmp_path)) == ["#nowhere", "two.html"]
