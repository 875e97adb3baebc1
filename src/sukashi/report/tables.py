"""The tables of a page as CSV and LaTeX, read from the page itself, so that none can say anything else."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser

# What LaTeX reads as something else, and signs that fonts of old engines lack.
_TEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}"},
    **{"–": "--", "×": r"$\times$", "→": r"$\rightarrow$", "−": "$-$", "±": r"$\pm$"},
}

# An interval as pages have it: its bounds are two numbers.
_BOUNDS = re.compile(r"([-+]?[\d.]+) – ([-+]?[\d.]+)")
_NEGATIVE = re.compile(r"(?<![\w.\-])-(?=\d)")


@dataclass
class Cell:
    """What stands in a cell, its small print, and what its title says that this is."""

    text: str = ""
    small: str = ""
    about: str = ""
    columns: int = 1
    rows: int = 1


@dataclass
class Table:
    """A table of a page: a name for files, what it shows, its columns' names, rows as long as these.

    In `rows` a cell that spans several places stands in each of them, and what a line of its own says of those below it
    is a first column.
    """

    name: str
    groups: str
    caption: str = ""
    head: list[list[Cell]] = field(default_factory=list)
    body: list[list[Cell]] = field(default_factory=list)

    @property
    def rows(self) -> list[list[Cell]]:
        found, group = [], Cell()
        for line in _grid(self.body):
            if self.groups and len({id(cell) for cell in line}) == 1:
                group = line[0]
            else:
                found.append([group, *line] if self.groups else line)
        return found

    @property
    def columns(self) -> list[str]:
        """A name for each column, of all headings above it."""
        named = [
            " ".join(dict.fromkeys(filter(None, map(_whole, column)))) for column in zip(*_grid(self.head), strict=True)
        ]
        return [self.groups, *named] if self.groups else named

    def csv(self) -> bytes:
        """A column for what stands large, where anything does, and others for the small print below it, by its title:
        two numbers for the bounds of an interval, empty where there is none.
        """
        names = self.columns or [""] * max((len(row) for row in self.rows), default=0)
        columns = [column for i, name in enumerate(names) for column in _columns(name, [row[i] for row in self.rows])]
        content = io.StringIO()
        written = csv.writer(content, lineterminator="\n")
        if any(names):
            written.writerow([name for name, _ in columns])
        written.writerows(zip(*(said for _, said in columns), strict=True))
        return content.getvalue().encode()

    def tex(self) -> bytes:
        """A `tabular` for the package booktabs, small print in brackets, each row on a line."""
        rows, names = self.rows, self.columns
        width = max(map(len, rows), default=len(names))
        lines = [
            f"% {_tex(_spaced(self.caption))}; needs \\usepackage{{booktabs}}",
            f"\\begin{{tabular}}{{l{'r' * (width - 1)}}}",
        ]
        lines.append("\\toprule")
        if any(names):
            lines += [f"{' & '.join(map(_tex, names))} \\\\", "\\midrule"]
        lines += [f"{' & '.join(_tex(_whole(cell)) for cell in row)} \\\\" for row in rows]
        return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""]).encode()


def tables_of(page: str) -> list[Table]:
    """The tables of a page that have a name, `<table data-name=...>`, in its order."""
    reader = _Reader()
    reader.feed(page)
    return reader.tables


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tables: list[Table] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "table":
            self.tables.append(Table(given["data-name"], given.get("data-groups", "")))
            self.open = []
        if not self.tables:
            return
        table = self.tables[-1]
        if tag == "tr":
            (table.head if "thead" in self.open else table.body).append([])
        if tag in ("th", "td"):
            self._row().append(Cell(columns=int(given.get("colspan", 1)), rows=int(given.get("rowspan", 1))))
        if tag == "small":
            self._row()[-1].about = given.get("title", "")
        if tag in _READ:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            del self.open[self.open.index(tag) :]

    def handle_data(self, data: str) -> None:
        if "caption" in self.open:
            self.tables[-1].caption += data
        if not {"th", "td"} & set(self.open):
            return
        cell = self._row()[-1]
        if "small" in self.open:
            cell.small = _spaced(f"{cell.small} {data}")
        else:
            cell.text = _spaced(f"{cell.text} {data}")

    def _row(self) -> list[Cell]:
        table = self.tables[-1]
        return (table.head if "thead" in self.open else table.body)[-1]


_READ = ("table", "caption", "thead", "tr", "th", "td", "small")


def _grid(lines: Sequence[Sequence[Cell]]) -> Iterator[list[Cell]]:
    """Lines in which a cell stands in every place that it covers."""
    below: dict[int, tuple[int, Cell]] = {}
    for line in lines:
        row: list[Cell] = []
        cells = iter(line)
        while True:
            if len(row) in below:
                left, cell = below.pop(len(row))
                if left > 1:
                    below[len(row)] = (left - 1, cell)
                row.append(cell)
                continue
            cell = next(cells, None)  # type: ignore[assignment]
            if cell is None:
                break
            for _ in range(cell.columns):
                if cell.rows > 1:
                    below[len(row)] = (cell.rows - 1, cell)
                row.append(cell)
        yield row


def _columns(name: str, cells: Sequence[Cell]) -> Iterator[tuple[str, list[str]]]:
    """The columns of a file that one of a table becomes: their names, and what stands in each row."""
    about = next((cell.about or "more" for cell in cells if cell.small), "")
    if not about or any(cell.text for cell in cells):
        yield name, [cell.text for cell in cells]
        name = f"{name}: {about}"
    bounds = [_BOUNDS.fullmatch(cell.small) for cell in cells]
    if any(bounds):
        yield f"{name}, low", [found[1] if found else "" for found in bounds]
        yield f"{name}, high", [found[2] if found else "" for found in bounds]
    elif about:
        yield name, [cell.small for cell in cells]


def _whole(cell: Cell) -> str:
    return f"{cell.text} ({cell.small})" if cell.small and cell.text else cell.text or cell.small


def _spaced(text: str) -> str:
    return " ".join(text.split())


def _tex(text: str) -> str:
    """Text as LaTeX reads it; the sign of a negative number is a minus, and no hyphen."""
    return "".join(_TEX.get(sign, sign) for sign in _NEGATIVE.sub("−", text))
