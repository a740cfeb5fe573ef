"""What stands in a flag or in a sweep as `key=value,...`, read.

parse_options("filters=[8,16],activation=gelu")  # {"filters": [8, 16], "activation": "gelu"}
"""

from __future__ import annotations

import re
from typing import Any

from cifarflow.errors import ConfigError
from cifarflow.untrusted import parse_json


def parse_options(text: str, *, flag: str = "model_options") -> dict[str, Any]:
    """Reads `key=value,...` or a JSON object; a value that is no JSON is a string.

    Args:
      text: what was given.
      flag: for messages.

    Raises:
      ConfigError: if it is neither.
    """
    try:
        if text.lstrip().startswith("{"):
            return dict(parse_json(text.encode()))
        # A comma within a value, as in filters=[8,16], is not followed by another name.
        pairs = [part.partition("=") for part in re.split(r",(?=\s*[\w./|]+\s*=)", text)]
        if all(name.strip() and equals for name, equals, _ in pairs):
            options = {name.strip(): _parse_value(value) for name, _, value in pairs}
            if len(options) == len(pairs):
                return options
    except ValueError:
        pass
    raise ConfigError(
        f"--{flag} must be key=value,..., each key once, or a JSON object, not {text!r}"
    )


def _parse_value(text: str) -> Any:
    try:
        return parse_json(text.encode())
    except ValueError:
        return text
