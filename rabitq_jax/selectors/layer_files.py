"""Files that say something of every layer of a model, in JSON: {"channels": [[[0, 3, ...], ...], ...]}."""

import json
from pathlib import Path
from typing import Any


def read_layers(argument: str, file: Any, key: str, depth: int) -> tuple:
    """The lists of indices at `key`, `depth` deep, as tuples.

    Raises:
      ValueError: there is no such file, or it holds anything else; the message names the argument.
    """
    try:
        return _tuples(json.loads(Path(file).read_text(encoding="utf-8"))[key], depth)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{argument} must be a JSON file with {key!r} of every layer, got {file!r}: {reason}"
        ) from None


def _tuples(value: Any, depth: int) -> Any:
    if depth == 0:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{value!r} is no index")
        return value
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is no list")
    return tuple(_tuples(item, depth - 1) for item in value)
