"""Attention over lists on the tensor core, against its definition: in an emulator, and on a Hopper GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.shapes import LARGE, Shape
from pallas_kernels import mosaic_attention, mosaic_parts
from pallas_kernels.mosaic_found import KINDS
from rabitq_jax._dispatch import on_hopper
from rabitq_jax.gathered_attention import gathered_attention
from tests.kernel_cases import lengths
from tests.test_lowering import kernel_text
from tests.test_mosaic_kernels import emulate

pytestmark = pytest.mark.kernel
SHAPES = [
    Shape(2, 2, 4, 512, 128),
    Shape(1, 2, 5, 512, 64),
    Shape(1, 2, 1, 256, 80),
    Shape(1, 2, 12, 256, 96),
    Shape(1, 2, 3, 256, 256),
]
UNEVEN = (0, 512, 0, 0, 3, 64, 65, 200)


def case(shape, dtype, counts, seed=0, places=None):
    """Queries, keys and values, and lists in no order, of which nothing is said behind their ends."""
    rng = np.random.default_rng(seed)
    rows, tokens = (shape.batch, shape.kv_heads), shape.tokens
    arrays = [jnp.asarray(rng.normal(size=(*rows, n, shape.head_dim)), dtype) for n in (shape.group, tokens, tokens)]
    indices = np.stack([rng.permutation(tokens) for _ in range(shape.batch * shape.kv_heads)]).reshape(*rows, tokens)
    counts = np.asarray(counts).reshape(rows)
    indices = np.where(np.arange(tokens) < counts[..., None], indices, 2**30)
    return *arrays, jnp.asarray(indices[..., :places], jnp.int32), jnp.asarray(counts, jnp.int32)


def check(shape, dtype, counts, jit=lambda run: run, places=None):
    arrays = case(shape, dtype, counts, places=places)
    attend = functools.partial(gathered_attention, softmax_scale=shape.head_dim**-0.5)
    got = jit(functools.partial(attend, implementation="mosaic"))(*arrays)
    want = attend(*arrays, implementation="xla")
    assert np.all(np.asarray(got)[np.asarray(arrays[-1]) == 0] == 0)
    # Weights are rounded to the dtype of the values.
    np.testing.assert_allclose(got, want, atol=1e-2 if dtype == jnp.bfloat16 else 2e-3, rtol=0)


@pytest.mark.parametrize("shape,dtype", list(zip(SHAPES, [jnp.bfloat16, jnp.float16] * 3, strict=False)), ids=str)
def test_attention_in_an_emulator(shape, dtype, monkeypatch):
    emulate(monkeypatch)
    rows = shape.batch * shape.kv_heads
    check(shape, dtype, np.random.default_rng(1).integers(1, shape.tokens // 3, rows))


@pytest.mark.parametrize(
    "counts,blocks",
    [(UNEVEN, 1), (UNEVEN, 7), (UNEVEN, 40), ((0,) * 8, 3), ((0, 0, 0, 1, 0, 0, 0, 0), 7), ((512,) * 8, 40)],
)
def test_attention_is_split_evenly_over_uneven_lists_in_an_emulator(counts, blocks, monkeypatch):
    """Blocks that go through many lists, that share one, and that have nothing to do."""
    emulate(monkeypatch)
    monkeypatch.setattr(mosaic_attention, "BLOCKS", blocks)
    check(Shape(4, 2, 3, 512, 16), jnp.bfloat16, counts)


@pytest.mark.parametrize("number,usual", [(0, 8), (1, 8), (70, 20), (150, 40)])
def test_parts_are_added_up_in_an_emulator(number, usual, monkeypatch):
    """A head's outputs and sums, of no parts, of fewer than a usual number, and of so many that it takes rounds."""
    emulate(monkeypatch)
    rng = np.random.default_rng(5)
    heads, head, first, columns, size = 4, 2, 3, 64, 40
    places = first + number + 1
    peaks, totals = rng.normal(size=(places, heads)) * 9, rng.uniform(1, 2, (places, heads))
    outs, sums = rng.normal(size=(places, heads, columns)), rng.normal(size=(places, heads, KINDS))
    wide = mosaic_parts.columns_of(usual)

    def add_up(peaks, totals, outs, sums, out, found, _):
        m = mosaic_parts.m
        lane = m.bit_and(m.thread_index(), 31)
        parts = mosaic_parts.Parts(first=m.value(first), number=m.value(number), heads=heads, head=m.value(head))
        output = mosaic_parts.OutputOfParts(
            parts, peaks, totals, outs, columns=columns, usual=usual, lane=lane, dtype="float32"
        )
        output.store(m.multiply(m.block_index(), wide), out, m.value(0), size)
        for i, x in enumerate(mosaic_parts.SumOfParts(parts, sums, usual=usual, lane=lane).result()):
            m.store(m.address(found, m.value(i)), [m.as_int(x)])

    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    run = mosaic_parts.m.call(
        add_up, name="add_up", out_type=(f32(size), f32(KINDS)), blocks=-(-size // wide), shared_words=1
    )
    out, found = run(*(jnp.asarray(x, jnp.float32) for x in (peaks, totals, outs, sums)))
    mine = np.s_[first : first + number, head]
    weights = np.exp(peaks[mine] - peaks[mine].max(initial=-np.inf))
    total = np.sum(weights * totals[mine])
    want = weights @ outs[mine][:, :size] / total if number else np.zeros(size)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found, sums[mine].sum(axis=0), rtol=1e-4, atol=1e-4)


def test_attention_over_lists_shorter_than_the_cache_in_an_emulator(monkeypatch):
    emulate(monkeypatch)
    check(Shape(2, 1, 2, 256, 32), jnp.bfloat16, [70, 33], places=80)


def test_attention_over_more_lists_than_lanes_in_an_emulator(monkeypatch):
    emulate(monkeypatch)
    check(Shape(35, 1, 2, 64, 8), jnp.bfloat16, np.arange(35) % 5 * 13)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_key_that_is_not_finite_shows_in_an_emulator(bad, monkeypatch):
    emulate(monkeypatch)
    ones = jnp.ones((1, 1, 256, 32), jnp.bfloat16)
    keys = ones.at[0, 0, 100, 3].set(bad)
    lists = jnp.arange(256, dtype=jnp.int32)[None, None]

    def attend(n):
        count = jnp.array([[n]], jnp.int32)
        query = ones[:, :, :2]
        return gathered_attention(query, keys, ones, lists, count, softmax_scale=1.0, implementation="mosaic")

    assert np.all(np.isnan(attend(101))) and np.all(np.isfinite(attend(100)))


@pytest.mark.parametrize(
    "shape,dtype",
    [
        (Shape(1, 1, 4, 256, 64), jnp.float32),
        (Shape(1, 1, 17, 256, 64), jnp.bfloat16),
        (Shape(1, 1, 4, 256, 20), jnp.bfloat16),
        (Shape(1, 1, 9, 256, 136), jnp.bfloat16),
    ],
    ids=str,
)
def test_what_the_kernel_does_not_take_is_refused(shape, dtype):
    with pytest.raises(NotImplementedError, match=f"got {dtype.__name__}, {shape.group} heads of {shape.head_dim}"):
        gathered_attention(*case(shape, dtype, [3]), softmax_scale=1.0, implementation="mosaic")


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="needs JAX 0.11")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_lowers(shape, monkeypatch):
    arrays = jax.eval_shape(lambda: case(shape, jnp.bfloat16, np.ones(shape.batch * shape.kv_heads)))
    attend = functools.partial(gathered_attention, softmax_scale=0.1, implementation="mosaic")
    text = kernel_text(monkeypatch, attend, *arrays)
    assert "gathered_attention" in text and "combine_parts" in text


@pytest.mark.gpu
@pytest.mark.skipif(not on_hopper(), reason="needs a Hopper GPU and JAX 0.11")
class TestOnHopper:
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    @pytest.mark.parametrize("shape", [*SHAPES, *(s for s in LARGE if s.head_dim % 8 == 0)], ids=str)
    def test_attention(self, shape, dtype):
        counts = np.random.default_rng(1).integers(0, shape.tokens // 4, shape.batch * shape.kv_heads)
        counts[:3] = (shape.tokens, 0, 17)[: len(counts[:3])]
        check(shape, dtype, counts, jax.jit)

    def test_the_same_bits_in_every_run(self):
        shape = Shape(8, 8, 4, 32768, 128)
        arrays = case(shape, jnp.bfloat16, lengths(Shape(64, 1, 1, 16384, 128)))
        attend = jax.jit(functools.partial(gathered_attention, softmax_scale=0.1, implementation="mosaic"))
        first = attend(*arrays)
        for _ in range(5):
            np.testing.assert_array_equal(attend(*arrays), first)
