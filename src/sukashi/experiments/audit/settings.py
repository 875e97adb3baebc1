"""What an audit is asked."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


class Audit(BaseModel):
    """Temporary."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)
    kind: ClassVar[str] = "audit"
    grows: ClassVar[frozenset[str]] = frozenset()

    models: list[str]
    data: str
    subjects: list[str] = ["saliency"]
    attributions: list[str] | None = None
    measures: list[str] | None = None
    population: str = "both"
    options: dict[str, dict[str, Any]] = {}
    seed: int = 0
    reading: dict[str, Any] = {}

    def opening(self) -> Any:
        return self.reading


SETTINGS = Audit
