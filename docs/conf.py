"""The pages: Sphinx over the Markdown of this folder and the docstrings of the package.

A browser loads nothing from elsewhere: formulas are MathML, which it draws by itself, and the theme
brings its own files. Names of torch's become links by their spelling, so that no index is fetched.
"""

import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import fused_ce  # noqa: E402

project = "fused_ce"
version = release = fused_ce.__version__
copyright = "2026, the fused_ce authors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
nitpicky = True  # a name that leads nowhere is a warning, and a warning is an error

autodoc_typehints = "none"  # the docstrings say them, in torch's way
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_param = False  # a line may have several names, as in torch's docstrings

html_theme = "furo"
html_title = f"fused_ce {version}"
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "mathml"

TORCH = "https://docs.pytorch.org/docs/stable/generated/"


def visit_math(translator: Any, node: nodes.math) -> None:
    translator.body.append(tex2mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def visit_math_block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f"<div class='math'>{tex2mathml(node.astext(), as_block=True)}</div>")
    raise nodes.SkipNode


def link_to_torch(
    app: Sphinx, env: Any, node: nodes.Element, content: nodes.Element
) -> nodes.reference | None:
    """torch has a page for each name that the docstrings speak of, called as the name is."""
    name = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not name.startswith("torch."):
        return None
    return nodes.reference("", "", content, internal=False, refuri=f"{TORCH}{name}.html")


def refuse_what_is_elsewhere(app: Sphinx, exception: Exception | None) -> None:
    """A page may link to others' pages, but what it loads by itself has to be here."""
    loads = re.compile(
        r"""<(?:script|img|iframe|link)\b[^>]*(?:src|href)=["']?(?:https?:)?//[^>]*>"""
    )
    for page in Path(app.outdir).rglob("*.html"):
        for tag in loads.findall(page.read_text(encoding="utf-8")):
            raise ExtensionError(f"{page.name} loads something from elsewhere: {tag}")
    for sheet in Path(app.outdir).rglob("*.css"):
        if re.search(
            r"(?:@import|url\()\s*[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")
        ):
            raise ExtensionError(f"{sheet.name} loads something from elsewhere")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.connect("missing-reference", link_to_torch)
    app.connect("build-finished", refuse_what_is_elsewhere)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
