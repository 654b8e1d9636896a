"""Tokenizer, chat templates and streamed text."""

import datetime

import pytest
import tokenizers
from tokenizers import decoders, models

from benchmarks.byte_tokenizer import BEGIN, END
from models.chat_template import render_chat
from models.tokenizer import TextStream, Tokenizer
from tests.checkpoints import write_json, write_tokenizer

TEXT = "Zwölf Boxkämpfer: 3 × €5 😀, ok?\n\ttab"
QUESTION = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def tokenizer(tmp_path) -> Tokenizer:
    return Tokenizer.from_folder(write_tokenizer(tmp_path))


def test_texts_begin_with_the_special_token_of_the_checkpoint(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert ids[0] == tokenizer.bos_token_id == 256
    assert ids[1:] == tokenizer.encode(TEXT, add_special_tokens=False)
    assert tokenizer.vocab_size == 258


def test_decode_gives_the_text_back(tokenizer):
    ids = [*tokenizer.encode(TEXT), 257]
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode(ids, skip_special_tokens=False) == BEGIN + TEXT + END
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("value", [True, False])
def test_special_tokens_around_a_text_are_those_of_tokenizer_json_alone(value, tokenizer, tmp_path):
    other = Tokenizer.from_folder(write_tokenizer(tmp_path, add_bos_token=value, add_eos_token=value))
    assert other.encode("a") == tokenizer.encode("a")


def test_long_prompts_are_not_cut_or_padded(tmp_path):
    file = write_tokenizer(tmp_path) / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(file))
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=8)
    backend.save(str(file))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert len(tokenizer.encode("a" * 100)) == 101
    assert len(tokenizer.encode("a")) == 2


def test_eos_ids_are_those_of_all_files_or_else_the_tokenizers_own(tmp_path):
    write_tokenizer(tmp_path)
    assert Tokenizer.from_folder(tmp_path).eos_token_ids == (257,)
    write_json(tmp_path / "config.json", {"eos_token_id": 5})
    assert Tokenizer.from_folder(tmp_path).eos_token_ids == (5,)
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [9, 5]})
    assert Tokenizer.from_folder(tmp_path).eos_token_ids == (9, 5)


def test_special_tokens_map_fills_what_tokenizer_config_leaves_out(tmp_path):
    write_tokenizer(tmp_path, bos_token=None)
    assert Tokenizer.from_folder(tmp_path).bos_token_id is None
    write_json(tmp_path / "special_tokens_map.json", {"bos_token": {"content": BEGIN}, "eos_token": "other"})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.special_tokens == {"bos_token": BEGIN, "eos_token": END}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("tokenizer.json", "{}", "tokenizer.json is not a valid tokenizer"),
        ("tokenizer.json", '{"version": ', "tokenizer.json is not a valid tokenizer"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", '{"bos_token": 3}', "bos_token must be a text, got 3"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template must be"),
        ("tokenizer_config.json", '{"chat_template": ["a"]}', "chat_template must be"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id must be"),
    ],
)
def test_refuses_files_that_are_missing_or_malformed(file, content, message, tmp_path):
    write_tokenizer(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_folder(tmp_path)


NAMED = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]


@pytest.mark.parametrize(
    ("in_config", "in_file", "want"),
    [("yes", None, "yes"), (NAMED, None, "yes"), ("no", "yes", "yes"), (None, "yes", "yes")],
)
def test_chat_template_may_lie_in_several_places(in_config, in_file, want, tmp_path):
    write_tokenizer(tmp_path, chat_template=in_config)
    if in_file is not None:
        (tmp_path / "chat_template.jinja").write_text(in_file)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.has_chat_template
    assert tokenizer.render_chat(QUESTION) == want


@pytest.mark.parametrize("config", [{}, {"chat_template": NAMED[:1]}])
def test_refuses_a_chat_without_a_template(config, tmp_path):
    tokenizer = Tokenizer.from_folder(write_tokenizer(tmp_path, **config))
    assert not tokenizer.has_chat_template
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.apply_chat_template(QUESTION)


def test_the_template_alone_writes_special_tokens(tmp_path):
    tokenizer = Tokenizer.from_folder(
        write_tokenizer(tmp_path, chat_template="{{ bos_token }}{{ messages[0].content }}")
    )
    assert tokenizer.apply_chat_template(QUESTION) == tokenizer.encode("Hi")


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", QUESTION, "roles must alternate"),
        ("{% for %}", QUESTION, "the chat template fails"),
        ("{{ messages[0].name.first }}", QUESTION, "the chat template fails"),
        ("{{ ''.__class__.__mro__ }}", QUESTION, "unsafe"),
        ("{{ messages.append(1) }}", QUESTION, "unsafe"),
        ("x", [], "at least one message"),
    ],
)
def test_refuses_templates_that_fail_or_escape_and_chats_without_messages(template, messages, message):
    with pytest.raises(ValueError, match=message):
        render_chat(template, messages, {}, True)


def test_templates_may_ask_for_the_date():
    assert render_chat("{{ strftime_now('%Y') }}", QUESTION, {}, True) == f"{datetime.datetime.now():%Y}"


def test_stream_gives_whole_characters(tokenizer):
    stream = TextStream(tokenizer)
    pieces = [stream.feed(token) for token in tokenizer.encode(TEXT)]
    assert [piece for piece in pieces if piece] == list(TEXT)
    assert stream.finish() == ""


def test_stream_takes_several_tokens_at_once(tokenizer):
    stream = TextStream(tokenizer)
    ids = tokenizer.encode(TEXT)
    assert stream.feed(*ids[:9]) + stream.feed() + stream.feed(*ids[9:]) == TEXT


def test_stream_shows_a_broken_character_at_the_end_and_only_there(tokenizer):
    stream = TextStream(tokenizer)
    *ids, _ = tokenizer.encode("ab€")
    assert stream.feed(*ids) == "ab"
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_stream_does_not_wait_for_ever(tokenizer):
    stream = TextStream(tokenizer)
    first_of_two_bytes = tokenizer.encode("é", add_special_tokens=False)[0]
    assert stream.feed(*[first_of_two_bytes] * 100)


def test_stream_shows_special_tokens_when_asked(tokenizer):
    assert TextStream(tokenizer, skip_special_tokens=False).feed(256, 257) == BEGIN + END
    assert TextStream(tokenizer).feed(256, 257) == ""


def byte_pieces(text: str) -> list[str]:
    return [f"<0x{byte:02X}>" for byte in text.encode()]


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        (["<s>", "▁Hello", "▁world"], "Hello world"),
        (["▁", "▁Hello", "▁", "a"], " Hello a"),
        (["▁Hello", "<s>", "▁world"], "Hello world"),
        (["▁Hello", *byte_pieces("éü€"), "▁world", *byte_pieces("\n")], "Helloéü€ world\n"),
        ([*byte_pieces("é"), "a", *byte_pieces("😀😀")], "éa😀😀"),
    ],
)
def test_stream_of_a_sentencepiece_tokenizer_keeps_spaces_and_bytes(pieces, text):
    """As in Llama 2: a space begins a word and is dropped at the start, and rare characters are several byte tokens."""
    vocabulary = ["<s>", "▁Hello", "▁world", "▁", "a", *(f"<0x{byte:02X}>" for byte in range(256))]
    ids = {piece: token for token, piece in enumerate(vocabulary)}
    backend = tokenizers.Tokenizer(models.BPE(ids, [], byte_fallback=True))
    backend.add_special_tokens(["<s>"])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = Tokenizer(backend, special_tokens={"bos_token": "<s>"})
    assert tokenizer.decode([ids[piece] for piece in pieces]) == text
    stream = TextStream(tokenizer)
    assert "".join(stream.feed(ids[piece]) for piece in pieces) + stream.finish() == text
