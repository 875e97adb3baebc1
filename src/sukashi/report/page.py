"""A page from a template and what it shows."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sukashi.core import files
from sukashi.core.errors import writing
from sukashi.report.words import p_value, percent

REPORT = "report.html"


@dataclass(frozen=True)
class Page:
    """A page to be written: its template (a path inside the package), PNGs by name, and what it shows."""

    template: str
    figures: Mapping[str, bytes]
    shown: Mapping[str, Any]


def write(folder: Path, page: Page) -> None:
    """Write a page into a folder.

    Its PNGs are in the page itself and, by name, in the folder's `figures/` too.
    """
    if page.figures:
        with writing(folder):
            (folder / "figures").mkdir(parents=True, exist_ok=True)
    for name, content in page.figures.items():
        files.write(folder / "figures" / f"{name}.png", content)
    inlined = {name: base64.b64encode(content).decode() for name, content in page.figures.items()}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "p_value": p_value}
    html = environment.get_template(page.template).render(figures=inlined, **page.shown)
    files.write(folder / REPORT, html.encode())
