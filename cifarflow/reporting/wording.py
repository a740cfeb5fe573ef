"""Numbers and values as a report writes them.

percent(0.783), duration(200.0), short(1.04e-6)  # "78.3 %", "3 min 20 s", "1.04e-06"
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

# Where there is no value.
NONE = "-"


def short(value: float, *, digits: int = 4) -> str:
    """A number of at most a few digits, those after the point if there is one."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits}g}"
    return f"{value:,.{digits}f}".rstrip("0").rstrip(".")


def short_all(values: Sequence[float]) -> list[str]:
    """Numbers as `short` has them, but with as many digits as tell them apart."""
    for digits in range(4, 15):
        found = [short(value, digits=digits) for value in values]
        if len(set(found)) == len(values):
            break
    return found


def percent(share: float, *, digits: int = 1) -> str:
    """A share as 78.3 %; a dash where there is none."""
    return f"{100 * share:.{digits}f} %" if math.isfinite(share) else NONE


def duration(seconds: float) -> str:
    """Seconds as 8.2 s, 3 min 20 s or 2 h 5 min."""
    if not 59.95 <= seconds < 1e9:
        return f"{seconds:,.1f} s" if abs(seconds) < 1e9 else f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {rest} s"


def shown_value(value: object) -> str:
    """A recipe's value, as a flag would have it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={shown_value(entry)}" for key, entry in value.items()) or "none"
    if isinstance(value, str):
        return value
    return "none" if value in (None, [], ()) else json.dumps(value)
