"""Chat templates: Jinja programs of a checkpoint that write a conversation as one text.

They come with downloaded checkpoints, so they run in Jinja's sandbox. The environment is that of transformers.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from models.folder import read_json_if_there


def read_chat_template(folder: Path) -> str | None:
    """The template in chat_template.jinja, or else in tokenizer_config.json: a text, or a list of named ones of which
    the one named "default" is taken. None where there is none.

    Raises:
      ValueError: tokenizer_config.json is malformed.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = read_json_if_there(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: chat_template must be a text, got {template!r}")
    return template


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool,
) -> str:
    """The text of a conversation.

    Args:
      messages: what the template wants, usually each with "role" and "content"; keys whose value is None are left out.
      special_tokens: passed to the template under their names ("bos_token", ...).
      add_generation_prompt: passed to the template.

    Raises:
      ValueError: there are no messages, or the template is malformed or refuses them.
    """
    if not messages:
        raise ValueError("messages must hold at least one message")
    present = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        return _compile(template).render(
            messages=present,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template fails on these messages: {error}") from error


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


class _GenerationBlock(Extension):
    """{% generation %}...{% endgeneration %}: marks the assistant's words for training; written as they are."""

    tags = {"generation"}

    def parse(self, parser):
        lineno = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=lineno)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
