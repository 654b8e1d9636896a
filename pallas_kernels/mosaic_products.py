"""Products of a kv head's query heads with rows of numbers, on the tensor core; for Hopper GPUs.

lane 4 g + t, of each eight query heads (there are one or two) and eight rows:
    operands    chunks t, t + 4, ... of 8 numbers of head g, and of row g: rows are read in whole sectors
    products    head g, rows 2 t and 2 t + 1
"""

from typing import Any

from pallas_kernels import _mosaic as m

# Numbers of a load; of one row, the four lanes with one g have four loads at a time.
CHUNK = 8
# Heads or rows.
OCTET = 8


def load_chunks(ref, row, numbers: int, t, *, now: bool = False) -> list[list[Any]]:
    """A lane's chunks of a row of so many numbers, a multiple of 8: four words each, zero past its end."""
    at, chunks, loads = m.row_address(ref, row, numbers // 2), numbers // CHUNK, []
    for first in range(0, chunks, 4):
        chunk = m.add(t, first)
        if first + 4 <= chunks:
            loads.append(m.load(m.advance(at, m.left(chunk, 2)), words=4, now=now))
            continue
        words = m.load(m.advance(at, m.left(m.minimum_signed(chunk, chunks - 1), 2)), words=4, now=now)
        loads.append([m.select(m.less(chunk, chunks), word, 0) for word in words])
    return loads


def products(dtype: str, queries, row) -> list[list[Any]]:
    """Of each eight heads, the products with two rows; `queries` are a lane's chunks of each eight, `row` gives those
    of its row."""
    c = [m.value(0.0)] * 4
    for j, chunk in enumerate(row):
        for i in (0, 2):
            c = eights_product(dtype, [[eight[j][i], eight[j][i + 1]] for eight in queries], chunk[i : i + 2], c)
    return [c[2 * i : 2 * i + 2] for i in range(len(queries))]


def eights_product(dtype: str, words, b, c):
    """mma of the words of each eight rows; of eight rows alone, the other ones are zero, and cost nothing."""
    (a0, a2), (a1, a3) = words if len(words) == 2 else (words[0], (m.value(0), m.value(0)))
    return m.matrix_product(dtype, [a0, a1, a2, a3], b, c)
