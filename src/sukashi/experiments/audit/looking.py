"""What an audit looks at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from sukashi.core.experiment import Trial

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Looking:
    """A subject of an audit, made of its settings and networks, which refuses what means nothing.

    `facts` are kept with the networks' answers, for its summary. `identity` is what its settings come to, `notes` are
    said beside all others, `areas` say for each concept which share of each image's pixels it has.
    """

    facts: Mapping[str, Any] = _NOTHING
    identity: Mapping[str, Any] = _NOTHING
    notes: Sequence[str] = ()
    areas: Mapping[str, Any] = _NOTHING

    def trials(self, answers: Trial) -> list[Trial]:
        """Those of it, beside the trial that keeps what networks answer."""
        raise NotImplementedError
