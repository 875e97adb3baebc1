"""What a preflight is."""

from __future__ import annotations

from typing import ClassVar

from sukashi.core.schema import option
from sukashi.experiments.reading import Reading


class Check(Reading):
    """Preflight: sites, what can't be cut and why, class counts, and the estimated cost of each criterion."""

    kind: ClassVar[str] = "check"

    limit: float = option(60.0, ge=0, decides=False, help="Seconds for estimates, once the sites are found.")
