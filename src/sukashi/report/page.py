"""A page from a template and what it shows."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sukashi.core import files
from sukashi.core.errors import writing
from sukashi.report.words import p_value, percent


def render(template: str, folder: Path, figures: Mapping[str, bytes], **shown: Any) -> Path:
    """The path of `report.html`, written into a folder from a template and what it shows.

    The PNGs of `figures` are in the page itself and, by name, in the folder's `figures/` too.
    """
    if figures:
        with writing(folder):
            (folder / "figures").mkdir(parents=True, exist_ok=True)
    for name, content in figures.items():
        files.write(folder / "figures" / f"{name}.png", content)
    inlined = {name: base64.b64encode(content).decode() for name, content in figures.items()}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "p_value": p_value}
    html = environment.get_template(template).render(figures=inlined, **shown)
    files.write(folder / "report.html", html.encode())
    return folder / "report.html"
