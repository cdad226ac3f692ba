"""Configuration of the guide: `make docs` builds it into docs/_build/html."""

import inspect
import re
import sys
from itertools import compress
from pathlib import Path

import camshaft

project = "camshaft"
author = "The camshaft developers"
version = release = camshaft.__version__
copyright = author  # Sphinx prints it at the foot of each page

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]

highlight_language = "none"  # a block without a language is text, not Python

html_theme = "furo"
html_title = f"camshaft {version}"
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["guide.css"]

myst_heading_anchors = 3  # the same anchors as on GitHub

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True

copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

# Classes in signatures that have no entry: those of other packages and our private ones. Any other unknown name is an error.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|ignite|collections|contextlib|os|pathlib|nn|array)(\..*)?"),
    (r"py:class", r"camshaft(\.[a-z]\w*)+\.\w+"),
]
ours = [vars(module) for name, module in sys.modules.items() if name.startswith("camshaft.")]
classes = {name for names in ours for name, thing in names.items() if isinstance(thing, type)}
nitpick_ignore = [("py:class", name) for name in sorted(classes - set(camshaft.__all__))]


def describe_every_handler(app, page, source):
    """Replaces a marker by an entry for each class in camshaft.handlers, with the members that users call."""
    entries = []
    for name in camshaft.handlers.__all__:
        cls = getattr(camshaft.handlers, name)
        if isinstance(cls, type) and cls is not camshaft.Handler:
            members = ", ".join(members_for_users(cls))
            entries.append(f".. autoclass:: {name}\n" + (f"   :members: {members}\n" if members else ""))
    source[0] = source[0].replace(".. every-handler::", "\n".join(entries))


def members_for_users(cls):
    """The properties of a handler's class and the methods that do not run on an event."""
    for name, member in vars(cls).items():
        if name.startswith("_") or hasattr(camshaft.Handler, name):
            continue
        function = getattr(member, "__wrapped__", getattr(member, "__func__", member))
        takes_engine = inspect.isfunction(function) and "engine" in inspect.signature(function).parameters
        if isinstance(member, property) or (callable(function) and not takes_engine):
            yield name


def link_out_of_the_guide(app, page, source):
    """Links to Markdown files outside the guide become downloads."""
    out = "../" * (page.count("/") + 1)
    source[0] = re.sub(rf"\]\(({re.escape(out)}\w[^)#]*\.md)\)", r"](path:\1)", source[0])


def leave_out_what_is_to_come(app, page, source):
    """Removes pages that do not exist from the contents. A page that is missing from the contents is a warning."""
    if page == "index":
        lines = source[0].splitlines()
        there = [not re.match(r"guide/\w+$", line) or Path(app.srcdir, f"{line}.md").exists() for line in lines]
        source[0] = "\n".join(compress(lines, there))


def take_sentences_for_sentences(app, what, name, thing, options, lines):
    """Napoleon parses `type: text` in the docstring of an attribute. Our docstrings are sentences that may contain a colon."""
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]


def setup(app):
    app.connect("source-read", describe_every_handler)
    app.connect("source-read", link_out_of_the_guide)
    app.connect("source-read", leave_out_what_is_to_come)
    app.connect("autodoc-process-docstring", take_sentences_for_sentences, priority=400)  # runs before Napoleon
