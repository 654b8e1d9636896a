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
