"""Sphinx's configuration: the pages are Markdown (MyST), the reference is made of the docstrings, no network is used.

Equations become MathML, which browsers draw by themselves: a page needs no script from elsewhere.
"""

import re
import sys
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

sys.path.insert(0, str(Path(__file__).parents[1]))

project, author, copyright = "dynmix", "the authors of dynmix", "the authors of dynmix"
version = release = version_of("dynmix")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "dynmix"
html_math_renderer = "mathml"
html_static_path, html_css_files = ["_static"], ["pages.css"]
autodoc_member_order = "bysource"
# What scikit-learn gives every class that has `fit`.
autodoc_default_options = {"exclude-members": "set_fit_request, set_predict_request, set_score_request"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
napoleon_include_init_with_doc = False
napoleon_use_ivar = True
suppress_warnings = ["ref.python"]  # attributes of several classes have one name; none is linked to

SECTION = re.compile(r"\s*(Args|Attributes|Raises|Returns|Yields|Raises .*):.*")
CODE = re.compile(r"(``.*?``|`[^`\n]*`)")


def reads_as_markdown(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turn a docstring, written as Markdown in Google's sections, into what Sphinx reads.

    Single backticks are code, a block that is indented by four is code as it stands, and neither `*`, `|` nor `_` means
    anything elsewhere.
    """
    text, above, code = [], 0, None
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if code is not None and line.strip() and indent < code:
            code = None
        before = next((other for other in reversed(lines[:number]) if other.strip()), "")
        begins = code is None and number and not lines[number - 1].strip() and indent >= above + 4
        if begins and line.strip() and not SECTION.fullmatch(before):
            code = indent
            text += [" " * above + "::", ""]
        if code is None and line.strip():
            above = indent
            parts = CODE.split(line)
            parts[::2] = [re.sub(r"(?<=\w)_(?!\w)|[*|]", r"\\\g<0>", part) for part in parts[::2]]
            for i in range(1, len(parts), 2):  # RST wants an end to the code in `Row`s
                parts[i] = f"``{parts[i].strip('`')}``" + ("\\ " if parts[i + 1][:1].isalnum() else "")
            line = "".join(parts)
        text.append(line)
    if what in ("attribute", "property"):  # else napoleon takes the words before a colon for a type
        text.insert(0, "")
    lines[:] = text


def mathml(self: Any, node: nodes.Node) -> None:
    """Write an equation as MathML."""
    if isinstance(node, nodes.math_block):
        self.body.append(f'<div class="equation">{tex2mathml(node.astext(), as_block=True)}</div>')
    else:
        self.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """Register both."""
    app.connect("autodoc-process-docstring", reads_as_markdown, priority=100)
    app.add_html_math_renderer("mathml", inline_renderers=(mathml, None), block_renderers=(mathml, None))
