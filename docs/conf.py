"""How the guide is built: `make docs`, into docs/_build/html."""

import camshaft

project = "camshaft"
author = "The camshaft developers"
version = release = camshaft.__version__
copyright = author  # Sphinx's own name for the line at the foot

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
suppress_warnings = ["toc.empty_glob"]  # the contents name pages that are still to come by a pattern

html_theme = "furo"
html_title = f"camshaft {version}"
html_show_sphinx = False

myst_heading_anchors = 3  # links to headings are the same here and on a forge that renders the Markdown itself

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True

copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

# What the types in signatures name and others document; a name of ours that leads nowhere is still an error.
nitpick_ignore_regex = [(r"py:.*", r"(torch|ignite|collections|contextlib|os|pathlib|nn|array)(\..*)?")]
nitpick_ignore = [("py:class", "Engine"), ("py:class", "camshaft.events.F")]
