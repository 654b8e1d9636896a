"""The shapes that tests and benchmarks share. Small ones come first: they are what a CPU can interpret."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decode-attention problem: B sequences, K kv heads of G query heads, T tokens of capacity, D dimensions."""

    batch: int
    kv_heads: int
    group: int
    tokens: int
    head_dim: int

    def __str__(self):
        return f"B{self.batch}-K{self.kv_heads}-G{self.group}-T{self.tokens}-D{self.head_dim}"


SMALL = (
    Shape(1, 1, 1, 512, 32),
    Shape(2, 2, 4, 1024, 128),
    Shape(1, 2, 3, 512, 80),
    Shape(3, 1, 5, 1536, 20),
)
LARGE = (
    Shape(1, 8, 4, 131072, 128),
    Shape(4, 8, 4, 32768, 128),
    Shape(2, 2, 16, 16384, 64),
    Shape(2, 3, 7, 12288, 256),
    Shape(1, 32, 1, 8192, 80),
)

# Left free in a cache, so that timed steps can append.
ROOM = 192
KEPT = 0.03


@dataclasses.dataclass(frozen=True)
class Case:
    """What a benchmark measures. No two have the same name.

    Attributes:
      lengths: tokens held by each sequence.
      shares: share of its tokens that each sequence is to keep.
      spread: logits fall off smoothly, and do not end at a cliff; see planting.py.
    """

    name: str
    shape: Shape
    lengths: tuple[int, ...]
    shares: tuple[float, ...]
    spread: bool = False


def make_case(
    shape: Shape, *, name: str = "", lengths: tuple[int, ...] = (), shares: tuple[float, ...] = (), spread: bool = False
) -> Case:
    """A case named as its shape, of full sequences that keep `KEPT`, but for what is given; `ROOM` is left in each."""
    full = shape.tokens - ROOM
    lengths = tuple(min(length, full) for length in lengths or (full,) * shape.batch)
    shares = shares or (KEPT,) * shape.batch
    return Case(name=name or str(shape), shape=shape, lengths=lengths, shares=shares, spread=spread)


LLAMA_BATCH = Shape(8, 8, 4, 131072, 128)
UNEVEN = (0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)

# "small" is for a CPU; the others have Llama-3.1-8B's shape, but for what their names say is varied.
SUITES = {
    "small": (
        make_case(Shape(1, 2, 4, 2048, 64), shares=(0.2,)),
        make_case(Shape(2, 1, 3, 2048, 32), name="small ragged", lengths=(1024, 2048), shares=(0.3, 0.2)),
    ),
    "context": tuple(make_case(Shape(1, 8, 4, tokens << 10, 128)) for tokens in (8, 32, 128, 512, 1024)),
    "batch": tuple(make_case(Shape(8, 8, 4, tokens << 10, 128)) for tokens in (8, 32, 128)),
    "ragged": (make_case(LLAMA_BATCH, name="lengths 1K to 128K", lengths=tuple(1024 << i for i in range(8))),),
    "uneven": (
        make_case(LLAMA_BATCH, name="kept 0.1 % to 40 %", shares=UNEVEN),
        make_case(LLAMA_BATCH, name="as many, kept evenly", shares=(sum(UNEVEN) / len(UNEVEN),) * len(UNEVEN)),
    ),
    "spread": tuple(
        make_case(Shape(batch, 8, 4, 131072, 128), name=f"{batch} x 128K, logits spread", spread=True)
        for batch in (1, 8)
    ),
    "groups": tuple(make_case(Shape(1, 8, group, 131072, 128)) for group in (1, 2, 3, 5, 7, 8, 16)),
    "head_dims": tuple(make_case(Shape(1, 8, 4, 131072, head_dim)) for head_dim in (64, 96, 256)),
}
