"""How Sphinx builds these pages: `nox -s docs`, where a warning is an error."""

import ast
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from p2pmoe.version import __version__  # noqa: E402  the path is set above

project = "p2pmoe"
author = "The p2pmoe contributors"
copyright = f"2026, {author}"  # noqa: A001  Sphinx's name for it
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build", "examples"]
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "deflist"]
default_role = "code"  # docstrings write `name` for code
autodoc_typehints = "signature"
autodoc_member_order = "bysource"

html_theme = "furo"
html_title = f"p2pmoe {__version__}"

GUESS = re.compile(
    r"^ *(?P<name>\w+)(?:: [\w\[\], |.]+)? = (?P<value>[^#]+?),?  # (?P<why>.*\bguess\b.*)$"
)


def guesses() -> str:
    """A table of the constants that the source calls a guess, with what it says of each."""
    rows = ["| where | constant | value | what the source says |", "| --- | --- | --- | --- |"]
    for path in sorted((ROOT / "p2pmoe").rglob("*.py")):
        for line in path.read_text().splitlines():
            if found := GUESS.match(line):
                where, (constant, value, why) = path.relative_to(ROOT / "p2pmoe"), found.groups()
                rows.append(f"| `{where}` | `{constant}` | `{value}` | {why} |")
    return "\n".join(rows)


def house_map() -> str:
    """A table of the files with the first line of each, which says what it is."""
    package = ROOT / "p2pmoe"
    files = {path: path.read_text() for path in sorted(package.rglob("*.py"))}
    rows = [
        f"| `{path.relative_to(package)}` | {said.splitlines()[0]} |"
        for path, text in files.items()
        if (said := ast.get_docstring(ast.parse(text)))
    ]
    return "\n".join(["| file | what it is |", "| --- | --- |", *rows])


def fill_in(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the tables where a page asks for them."""
    del app, docname
    source[0] = source[0].replace("<!-- guesses -->", guesses())
    source[0] = source[0].replace("<!-- map -->", house_map())


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", fill_in)
