"""Arguments of a method as a text, "page=16,budget=1024,selection_layers=2/13", for command lines."""

from typing import Any

from rabitq_jax.config import RaBitQConfig
from rabitq_jax.selectors import Selector, make_selector


def parse_selector(text: str) -> RaBitQConfig | Selector:
    """A method from its name and arguments in one text: "quest:page=16,budget=1024", or "full".

    Raises:
      ValueError: as `make_selector` and `parse_arguments`.
    """
    name, _, arguments = text.partition(":")
    return make_selector(name, **parse_arguments(arguments))


def parse_arguments(text: str) -> dict[str, Any]:
    """Names and values: integers, numbers, true or false, texts, and tuples of them with slashes between ("2/13").

    Raises:
      ValueError: a part is not name=value.
    """
    arguments = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals or not name.strip().isidentifier() or not value:
            raise ValueError(f"selector arguments must be name=value, with commas between, got {part!r}")
        arguments[name.strip()] = _parse_value(value.strip())
    return arguments


def _parse_value(text: str) -> Any:
    if "/" in text and all(part.isdigit() for part in text.split("/") if part):
        return tuple(int(part) for part in text.split("/") if part)
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
