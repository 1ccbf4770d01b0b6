"""How `make docs` builds the site: Sphinx, with the Markdown pages of this folder and the docstrings of the package."""

from __future__ import annotations

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "extensions")]

project = "batchnorm"
author = "The batchnorm developers"
found = re.search(r'__version__ = "(.+)"', (HERE.parent / "src" / "batchnorm" / "__init__.py").read_text())
assert found is not None
release = found[1]
html_title = f"batchnorm {release}"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "docstrings",
    "public_names",
]
exclude_patterns = ["extensions"]

# Markdown. Three levels of headings get anchors, by GitHub's rule, so that a link works there and here.
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

# The reference. Names in single backticks become links where they are names of ours, and code where they are not.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
napoleon_custom_sections = [("Shapes", "params_style")]
toc_object_entries_show_parents = "hide"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80

# What has no page here. Nothing is fetched from the network while the site is built, so other people's names cannot be
# looked up.
nitpicky = True
nitpick_ignore_regex = [
    ("py:obj", r".*"),  # any code in backticks of a docstring; `public_names` has what must be there
    ("py:.*", r"(torch|collections|os|pathlib|rich|lightning|transformers)\..*"),
    ("py:class", r"Tensor|Console|Correction"),  # the same, and an alias, as annotations that stay text write them
    ("py:class", r"(batchnorm\.distributed\.)?Group|batchnorm\.report\.document\.Table"),  # internal
]

# Two classes are called Report, of `check` and of surgery; an annotation that stays text does not say which.
suppress_warnings = ["ref.python"]

html_theme = "furo"
pygments_dark_style = "github-dark"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}
