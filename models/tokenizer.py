"""Tokenizer: text to token ids and back, and chats to token ids, from a checkpoint's tokenizer.json."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from models.chat_template import read_chat_template, render_chat
from models.folder import read_eos_token_ids, read_json_if_there

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """A Hugging Face tokenizer.

    Attributes:
      special_tokens: the text of each special token that has a role ("bos_token", "eos_token", ...).
      eos_token_ids: every token that ends a text: those of generation_config.json and config.json, or else the
        tokenizer's own.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        eos_token_ids: Sequence[int] = (),
        chat_template: str | None = None,
    ):
        # tokenizer.json may ask to cut or pad texts to a length; prompts are never changed silently.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._chat_template = chat_template
        self.special_tokens = dict(special_tokens)
        self.eos_token_ids = tuple(eos_token_ids)
        if not self.eos_token_ids and (eos := self._special_token_id("eos_token")) is not None:
            self.eos_token_ids = (eos,)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read tokenizer.json, and tokenizer_config.json, generation_config.json, config.json and chat_template.jinja,
        each of which may be absent.

        Raises:
          ValueError: there is no tokenizer.json, or a file is malformed; the message names it.
        """
        folder = Path(folder)
        config = read_json_if_there(folder / "tokenizer_config.json")
        special_tokens = {
            **_read_special_tokens(read_json_if_there(folder / "special_tokens_map.json")),
            **_read_special_tokens(config),
        }
        return cls(
            _read_backend(folder / "tokenizer.json"),
            special_tokens=special_tokens,
            eos_token_ids=read_eos_token_ids(folder),
            chat_template=read_chat_template(folder),
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_token_id(self) -> int | None:
        return self._special_token_id("bos_token")

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; by default with the special tokens that tokenizer.json puts around a text.

        As in transformers, it has the last word: add_bos_token and add_eos_token of tokenizer_config.json are not read.
        """
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids, exactly: spaces before punctuation are kept."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The text of a chat by the checkpoint's template.

        Args:
          messages: each with a "role" and a "content", as the template wants them.
          add_generation_prompt: end with what opens the assistant's next message.

        Raises:
          ValueError: the checkpoint has no chat template, there are no messages, or the template refuses them.
        """
        if self._chat_template is None:
            raise ValueError("this checkpoint has no chat template, in tokenizer_config.json or chat_template.jinja")
        return render_chat(self._chat_template, messages, self.special_tokens, add_generation_prompt)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a chat; see `render_chat`. The template writes the special tokens, none is added."""
        rendered = self.render_chat(messages, add_generation_prompt=add_generation_prompt)
        return self.encode(rendered, add_special_tokens=False)

    def _special_token_id(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self._backend.token_to_id(token)


class TextStream:
    """Turns token ids, as they are generated, into pieces of text that can be printed at once.

    A character may be spread over several tokens, and a token's text may depend on the one before it. So each piece is
    the difference of two decoded texts that begin at the same token, and it waits until its last character is whole.

        stream = TextStream(tokenizer)
        for token in generated: print(stream.feed(token), end="")
        print(stream.finish())
    """

    # No character needs as many tokens: text that still ends in a broken one is broken for good.
    MAX_WAITING = 16

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._context: list[int] = []
        self._waiting: list[int] = []

    def feed(self, *ids: int) -> str:
        """The text that the tokens complete, perhaps none."""
        return "".join(self._feed_one(token) for token in ids)

    def finish(self) -> str:
        """The text of tokens that still wait; a character that they break off is shown as U+FFFD."""
        return self._take()

    def _feed_one(self, token: int) -> str:
        self._waiting.append(int(token))
        broken = self._decode(self._context + self._waiting).endswith(REPLACEMENT)
        return "" if broken and len(self._waiting) < self.MAX_WAITING else self._take()

    def _take(self) -> str:
        shown = len(self._decode(self._context))
        piece = self._decode(self._context + self._waiting)[shown:]
        # Tokens without text of their own (skipped, or a leading space) must not become the beginning of a text.
        self._context = self._waiting if piece else self._context + self._waiting
        self._waiting = []
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)


def _read_backend(file: Path) -> tokenizers.Tokenizer:
    if not file.is_file():
        raise ValueError(f"{file.parent} has no tokenizer.json (other tokenizer formats are not supported)")
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{file} is not a valid tokenizer: {error}") from error


def _read_special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Role -> text, from entries that are a text or an object with one in "content"."""
    special_tokens = {}
    for role in SPECIAL_TOKENS:
        token = config.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and not isinstance(token, str):
            raise ValueError(f"tokenizer_config.json: {role} must be a text, got {config[role]!r}")
        if token is not None:
            special_tokens[role] = token
    return special_tokens
