"""A page from a template and what it shows, with its figures and tables as files beside it."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sukashi.core import files
from sukashi.core.bracketed import folder_of
from sukashi.core.errors import writing
from sukashi.report.figures import DPI, WIDTH, Drawn
from sukashi.report.glossary import explained
from sukashi.report.tables import tables_of
from sukashi.report.words import number, p_value, percent

REPORT = "report.html"
FOLDERS = ("figures", "tables")
CONTENTS = "<!-- contents -->"
SCALE = 120 / DPI  # pixels of a page for one of a figure


@dataclass(frozen=True)
class Page:
    """A page to be written: its template (a path inside the package), figures by name, and what it shows."""

    template: str
    figures: Mapping[str, Drawn]
    shown: Mapping[str, Any]


def write(folder: Path, page: Page, spelled: Callable[[str], str]) -> None:
    """Write a page into a folder; `spelled` says in what it shows how settings are called there.

    Its figures are in the page itself and, as PNG and SVG by name, in the folder's `figures/`; its tables are in
    `tables/` too, as CSV and LaTeX. What is named after a contender has the file that `folder_of` says. Files there
    that were of an earlier page are removed.
    """
    inlined = {name: _inlined(drawn) for name, drawn in page.figures.items()}
    said = environment(spelled).get_template(page.template).render(figures=inlined, **page.shown)
    drawn = {folder_of(name): of for name, of in page.figures.items()}
    tables = {folder_of(of.name): of for of in tables_of(said)}
    beside = {
        **{f"figures/{name}.{form}": getattr(of, form) for name, of in drawn.items() for form in ("png", "svg")},
        **{f"tables/{name}.{form}": getattr(of, form)() for name, of in tables.items() for form in ("csv", "tex")},
    }
    for name in FOLDERS:
        with writing(folder):
            (folder / name).mkdir(parents=True, exist_ok=True)
            for path in (folder / name).iterdir():
                if f"{name}/{path.name}" not in beside and path.suffix in (".png", ".svg", ".csv", ".tex"):
                    path.unlink()
    for name, content in beside.items():
        files.write(folder / name, content)
    files.write(folder / REPORT, explained(_with_contents(said)).encode())


def environment(spelled: Callable[[str], str]) -> Environment:
    """Where templates are found, by their paths inside the package, and what they write by."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda shown: spelled(shown) if type(shown) is str else shown,  # HTML that is made has another type
    )
    made.filters |= {"percent": percent, "number": number, "p_value": p_value, "file": folder_of}
    return made


def _inlined(drawn: Drawn) -> dict[str, Any]:
    """A figure as a template shows it: data, its size on the page, and whether narrow screens scroll it."""
    width, height = (round(SCALE * n) for n in drawn.size)
    source = f"data:image/png;base64,{base64.b64encode(drawn.png).decode()}"
    return {"source": source, "width": width, "height": height, "wide": drawn.size[0] > 1.2 * WIDTH * DPI}


def _with_contents(said: str) -> str:
    """The page with a name for each heading and, where it has its place, a list of them."""
    heads: dict[str, str] = {}

    def named(found: re.Match[str]) -> str:
        text = re.sub("<[^>]*>", "", found[1])
        name = re.sub(r"\W+", "-", html.unescape(text).lower()).strip("-") or "part"
        while name in heads:
            name += "-"
        heads[name] = text
        return f'<h2 id="{name}">{found[1]}</h2>'

    said = re.sub("<h2>(.*?)</h2>", named, said, flags=re.DOTALL)
    return said.replace(CONTENTS, "\n".join(f'<li><a href="#{name}">{text}</a></li>' for name, text in heads.items()))
