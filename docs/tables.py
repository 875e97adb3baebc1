"""Writes the tables of settings and of results' columns, and the glossary, into the pages here: `python docs/tables.py`
after a change.

A table stands between `<!-- settings: KIND -->`, or `<!-- columns: RESULT -->` or that of a file, and `<!-- end -->`,
the words between `<!-- words -->` and that.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from pydantic.fields import FieldInfo

from sukashi.core.experiment import Columns
from sukashi.core.schema import Settings, default_of, option_of
from sukashi.experiments.audit.saliency.values import CURVE_COLUMNS, VALUE_COLUMNS
from sukashi.experiments.audit.summary import AuditResult
from sukashi.experiments.compare.summary import CompareResult
from sukashi.experiments.concepts.summary import ConceptsResult
from sukashi.experiments.prune.summary import PruneResult
from sukashi.experiments.schedule.summary import ScheduleResult
from sukashi.experiments.study.settings import ComparisonFile, ModelTable, ScheduleFile
from sukashi.experiments.study.summary import StudyResult
from sukashi.experiments.train.summary import TrainResult
from sukashi.report.glossary import WORDS
from sukashi.training.settings import Training

KINDS: dict[str, type[Settings]] = {
    kind.__name__: kind for kind in (ComparisonFile, ScheduleFile, ModelTable, Training)
}
RESULTS = (CompareResult, PruneResult, ScheduleResult, TrainResult, AuditResult, ConceptsResult, StudyResult)
TABLES: dict[str, Columns] = {
    **{kind.__name__: kind.columns for kind in RESULTS},
    **{"values.parquet": VALUE_COLUMNS, "curves.parquet": CURVE_COLUMNS},
}
PAGE = re.compile(r"(<!-- (settings|columns): ([\w.]+) -->\n).*?(<!-- end -->)", re.DOTALL)
GLOSSARY = re.compile(r"(<!-- words -->\n).*?(<!-- end -->)", re.DOTALL)


def written(page: str) -> str:
    """A page with its tables as the settings are now, and its words as pages of results explain them."""
    told = PAGE.sub(lambda found: found[1] + _of(found[2], found[3]) + found[4], page)
    return GLOSSARY.sub(lambda found: found[1] + glossary() + found[2], told)


def _of(what: str, name: str) -> str:
    return table(KINDS[name]) if what == "settings" else columns(TABLES[name])


def columns(given: Columns) -> str:
    """A row for each column of a table."""
    types = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    rows = [f"| `{name}` | {types[of]} | {told} |" for name, (of, told) in given.items()]
    return "\n".join(["| column | type | what it holds |", "|---|---|---|", *rows, ""])


def glossary() -> str:
    """A paragraph for each word."""
    words = sorted(WORDS, key=lambda word: word.name.lower())
    return "\n".join(f"**{word.name}**: {word.means}\n" for word in words)


def table(kind: type[Settings]) -> str:
    """A row for each setting, those that must be given first."""
    fields = sorted(kind.model_fields.items(), key=lambda item: not item[1].is_required())
    rows = [f"| `{name}` | {default(field)} | {field.description} |" for name, field in fields]
    return "\n".join(["| setting | default | what it is |", "|---|---|---|", *rows, ""])


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be given"
    told, value = option_of(field).default, default_of(field)
    if told is not None:
        return told
    if value is None:
        return "none"
    if isinstance(value, list) and len(value) > 4:
        return f"{value[0]:g}, {value[1]:g} ... {value[-1]:g}"
    return f"`{json.dumps(value)}`"


if __name__ == "__main__":
    for path in Path(__file__).parent.glob("*.md"):
        path.write_text(written(path.read_text()))
