"""How Sphinx builds the site: `docs/build` runs it, with the repository as its source folder.

So a link between pages, notebooks and files is the same here and where the repository is shown.
"""

import re
import sys
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

project = "mechvlm"
author = copyright = "the mechvlm authors"
root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "tutorials/*.ipynb",
    "mechvlm/bundled/*/README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
]
exclude_patterns = ["build", ".*", "tests", "scripts", "mechvlm/[!b]*", "**/.ipynb_checkpoints", "mechvlm-study*"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks show their committed outputs, which a lane of the tests holds to the code
nb_merge_streams = True
# MyST knows no place but headings, and pages link to names of the reference too: `docs/build` looks every link up.
suppress_warnings = ["mystnb.mime_priority", "mystnb.unknown_mime_type", "myst.xref_missing"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures stay short: docstrings say what each argument is
autodoc_preserve_defaults = True
add_module_names = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_param = True
napoleon_custom_sections = [("Measures", "params_style"), ("Sources", "notes"), ("Source", "notes")]
default_role = "code"
smartquotes_action = "D"  # dashes alone: quotation marks are code
python_use_unqualified_type_names = True
highlight_language = "text"
pygments_style, pygments_dark_style = "a11y-high-contrast-light", "a11y-high-contrast-dark"

html_theme = "furo"
html_title = "mechvlm"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_search_summary = False  # it fetches pages, which a browser refuses to a page that is a file
html_domain_indices = False


def formula(translator, node: nodes.Node, display: str) -> None:
    """Formulas as MathML, which browsers draw by themselves: no script is loaded."""
    translator.body.append(convert(node.astext(), display=display))
    raise nodes.SkipNode


def as_written(app, what, name, obj, options, lines: list[str]) -> None:
    """Indented blocks of a docstring's text are shown as they stand: code, and formulas.

    Docstrings are plain text, and say so by indentation alone; reStructuredText wants `::`.
    """
    before, out, inside = "", [], False
    for line in lines:
        if line.startswith("    ") and not inside:
            text = before.startswith(" ") or not before or re.fullmatch(r"[A-Z][a-z]+:", before)
            if not text and not before.endswith("::"):
                out += ["", "::", ""]
                inside = True
        elif line and not line.startswith(" "):
            out += [""] if inside and out[-1] else []
            inside = False
        out.append(line)
        before = line if line.strip() else before
    lines[:] = out


def short_types(app, what, name, obj, options, lines: list[str]) -> None:
    """`Float[Tensor, ...]`, as it stands in the source."""
    lines[:] = [re.sub(r"\b(?:jaxtyping|torch)\.(?=[A-Z])", "", line) for line in lines]


def setup(app) -> dict:
    """Register the formulas, and how docstrings are read."""
    app.connect("autodoc-process-docstring", as_written, priority=100)  # before napoleon's
    app.connect("autodoc-process-docstring", short_types, priority=900)  # after it
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(lambda translator, node: formula(translator, node, "inline"), None),
        block_renderers=(lambda translator, node: formula(translator, node, "block"), None),
    )
    return {"parallel_read_safe": True, "parallel_write_safe": True}


html_math_renderer = "mathml"
