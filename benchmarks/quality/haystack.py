"""Real text to hide facts in: the sources of Python's standard library, read from the Python that runs this."""

import functools
import sysconfig
import zlib
from pathlib import Path
from typing import Literal

import numpy as np

Split = Literal["train", "test"]

# One file in so many is held out for tests; which ones hangs on their names alone.
TEST_SHARE = 8
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "lib2to3", "__phello__"}


@functools.cache
def standard_library(split: Split) -> bytes:
    """The printable ASCII lines of the standard library's modules, one file after the other in the order of names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    chosen = [name for name in names if LEFT_OUT.isdisjoint(name.split("/")) and _split_of(name) == split]
    if not chosen:
        raise ValueError(f"the standard library at {root} has no sources to make a haystack of")
    return b"\n".join(_printable((root / name).read_bytes()) for name in chosen)


def excerpt(text: bytes, size: int, rng: np.random.Generator) -> bytes:
    """`size` bytes of a text from a random place, beginning with a whole line; a short text is repeated."""
    start = int(rng.integers(max(len(text) - size, 1)))
    start = text.rfind(b"\n", 0, start) + 1
    piece = text[start : start + size]
    return piece if len(piece) == size else (piece + text * (size // len(text) + 1))[:size]


def _split_of(name: str) -> Split:
    return "test" if zlib.crc32(name.encode()) % TEST_SHARE == 0 else "train"


def _printable(source: bytes) -> bytes:
    lines = source.replace(b"\t", b"    ").replace(b"\r", b"").split(b"\n")
    return b"\n".join(line for line in lines if line.isascii() and line.decode().isprintable())
