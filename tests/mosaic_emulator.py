"""pallas_kernels/_mosaic.py on a CPU: the same functions, for all threads of a block at once, on NumPy arrays.

A value is an array over threads, uint32 or float32. Instructions run in order for all threads, so that a barrier has
nothing to do. Tensor-core and shuffle instructions follow the fragment layouts of the PTX manual ("Matrix Fragments
for mma.m16n8k128"), not those that the kernels say they use.
"""

import contextlib
import functools
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

WARPGROUP = 128
THREADS = np.arange(WARPGROUP, dtype=np.uint32)


class Emulator:
    """To be put in place of the module `_mosaic` in a kernel's module. Kernels are then called outside of jit."""

    WARPGROUP = WARPGROUP

    def call(self, body, *, name, out_type, blocks, shared_words):
        """A function of arrays and references that runs the blocks one after the other, but for waits of one for later
        ones, which run then."""
        del name

        def run(*inputs):
            memories = [_words(x) for x in inputs]
            types = out_type if isinstance(out_type, tuple) else (out_type,)
            # Results hold anything before they are written.
            outs = [np.full(math.prod(x.shape) * x.dtype.itemsize // 4, 0xDEADBEEF, np.uint32) for x in types]
            waiting = iter(range(blocks))

            def run_block():
                self.block = next(waiting)
                self.mask = np.ones(WARPGROUP, bool)
                # Shared memory holds anything when a block begins.
                self.shared = np.full(shared_words, 0xDEADBEEF, np.uint32)
                self.copies, self.groups = [], [[] for _ in range(WARPGROUP // 32)]
                self.under_way = np.zeros(shared_words, int)
                body(*memories, *outs, None)
                left = [copy for warp in self.groups for group in warp for copy in group]
                assert not any(np.any(wanted) for wanted, *_ in self.copies + left), "copies that nothing waited for"

            self.run_block = run_block
            with contextlib.suppress(StopIteration):
                while True:
                    run_block()
            for x, memory in zip(inputs, memories, strict=True):
                if not isinstance(x, jax.Array):
                    x[...] = jnp.asarray(memory.view(x.dtype).reshape(x.shape))
            results = tuple(jnp.asarray(out.view(x.dtype).reshape(x.shape)) for out, x in zip(outs, types, strict=True))
            return results if isinstance(out_type, tuple) else results[0]

        return run

    def value(self, x):
        if isinstance(x, float):
            return np.full(WARPGROUP, x, np.float32)
        if isinstance(x, int | np.integer):
            return np.full(WARPGROUP, int(x) % 2**32, np.uint32)
        return x

    def _integers(operation):  # noqa: N805
        return lambda self, a, b: operation(self.value(a), self.value(b)).astype(np.uint32)

    add = _integers(np.add)
    subtract = _integers(np.subtract)
    multiply = _integers(np.multiply)
    divide = _integers(np.floor_divide)
    left = _integers(np.left_shift)
    right = _integers(np.right_shift)
    right_signed = _integers(lambda a, b: np.right_shift(a.view(np.int32), b.view(np.int32)).view(np.uint32))
    bit_and = _integers(np.bitwise_and)
    bit_or = _integers(np.bitwise_or)
    bit_xor = _integers(np.bitwise_xor)

    minimum_signed = _integers(lambda a, b: np.minimum(a.view(np.int32), b.view(np.int32)).view(np.uint32))
    maximum_signed = _integers(lambda a, b: np.maximum(a.view(np.int32), b.view(np.int32)).view(np.uint32))

    def both(self, a, b):
        return a & b

    def either(self, a, b):
        return a | b

    def less(self, a, b):
        return self.value(a) < self.value(b)

    def not_less(self, a, b):
        return self.value(a) >= self.value(b)

    less_float, not_less_float = less, not_less

    def majority(self, a, b, c):
        return (a & b) | (a & c) | (b & c)

    def count_ones(self, x):
        return np.bitwise_count(x).astype(np.uint32)

    def _floats(operation):  # noqa: N805
        def run(self, a, b):
            with np.errstate(invalid="ignore", over="ignore"):
                return operation(self.value(a), self.value(b)).astype(np.float32)

        return run

    add_float, subtract_float = _floats(np.add), _floats(np.subtract)
    multiply_float = _floats(np.multiply)

    def reciprocal(self, x):
        with np.errstate(divide="ignore"):
            return np.float32(1) / x

    def to_float(self, x):
        return x.astype(np.float32)

    def to_integer(self, x):
        return np.nan_to_num(x, nan=0.0).clip(0, 2.0**32 - 512).astype(np.uint32)

    def floor(self, x):
        return np.floor(np.nan_to_num(x, nan=0.0)).clip(-(2.0**31), 2.0**31 - 128).astype(np.int32).view(np.uint32)

    def exp2(self, x):
        # Numbers below the normal ones are flushed to zero.
        with np.errstate(over="ignore"):
            power = np.exp2(x)
        return np.where(power < np.finfo(np.float32).tiny, np.float32(0), power).astype(np.float32)

    def log2(self, x):
        with np.errstate(divide="ignore"):
            return np.log2(x)

    def square_root(self, x):
        return np.sqrt(x)

    def negate(self, condition):
        return ~condition

    def select(self, condition, a, b):
        return np.where(condition, self.value(a), self.value(b))

    def as_float(self, x):
        return x.view(np.float32)

    def as_int(self, x):
        return x.view(np.uint32)

    def bfloat16_pair(self, word):
        return (word << 16).view(np.float32), (word & np.uint32(0xFFFF0000)).view(np.float32)

    def float16_pair(self, word):
        halves = word.view(np.float16).reshape(-1, 2).astype(np.float32)
        return halves[:, 0], halves[:, 1]

    def thread_index(self):
        return THREADS

    def block_index(self):
        return self.value(self.block)

    def thread_index_anew(self):
        return self.thread_index()

    def block_index_anew(self):
        return self.block_index()

    def barrier(self):
        assert self.mask.all(), "a barrier that not all threads reach"

    def warp_barrier(self):
        pass

    def address(self, memory, word):
        return SimpleNamespace(memory=memory, word=self.value(word).astype(np.int64))

    def row_address(self, memory, row, words):
        return SimpleNamespace(memory=memory, word=self.value(row).astype(np.int64) * words)

    def advance(self, at, words):
        return SimpleNamespace(memory=at.memory, word=at.word + self.value(words))

    def shared_address(self, _):
        return self.value(0)

    def load(self, at, *, words=1, offset=0, now=False):
        del now
        assert offset % 4 == 0
        return [self._gather(at.memory, at.word + offset // 4 + i) for i in range(words)]

    load_written = load

    def _gather(self, memory, word):
        assert np.all((word >= 0) & (word < memory.size) | ~self.mask), "a load outside of memory"
        return memory[np.where(self.mask, word, 0)]

    def store(self, at, values, *, offset=0, where=None):
        wanted = self.mask if where is None else self.mask & where
        for i, x in enumerate(values):
            at.memory[(at.word + offset // 4 + i)[wanted]] = x[wanted]

    def store_ones(self, at, mask, first):
        for thread in np.flatnonzero(self.mask):
            ones = [i for i in range(32) if mask[thread] >> i & 1]
            at.memory[at.word[thread] : at.word[thread] + len(ones)] = first[thread] + np.array(ones, np.uint32)

    def take_ticket(self, at):
        # Threads take theirs in no order; so no kernel lets two of a block take tickets of one word.
        mine = at.word[self.mask]
        assert len(np.unique(mine)) == len(mine)
        (taken,) = self.load(at)
        self.store(at, [taken + np.uint32(1)])
        return taken

    def publish(self, at, x):
        self.store(at, [x])

    def wait_published(self, at):
        (published,) = self.load(at)
        assert np.all((published != 0) | ~self.mask), "a wait for a block that has not run"
        return published

    def wait_tickets(self, at, number):
        state = "block", "mask", "shared", "copies", "groups", "under_way"
        while np.any((self.load(at)[0] < self.value(number)) & self.mask):
            mine = [getattr(self, name) for name in state]
            self.run_block()
            for name, x in zip(state, mine, strict=True):
                setattr(self, name, x)

    def _shared_words(self, at):
        """Words that the active lanes use, to which no copy is under way."""
        words = (at // 4)[self.mask]
        assert not np.any(self.under_way[words]), "a use of what is being copied to"
        return words

    def load_shared(self, at, *, words=1, offset=0):
        self._shared_words(at + offset + 4 * (words - 1))
        places = [np.where(self.mask, (at + offset) // 4 + i, 0) for i in range(words)]
        return [np.where(self.mask, self.shared[place], np.uint32(0)) for place in places]

    def store_shared(self, at, values, *, offset=0):
        for i, x in enumerate(values):
            self.shared[self._shared_words(at + offset + 4 * i)] = x[self.mask]

    def load_matrices(self, at, number, *, offset=0):
        """Lane l has the address of row l % 8 of matrix l / 8, and gets words of row l / 4 of each."""
        assert self.mask.all() or not any(len(set(self.mask[THREADS // 32 == warp])) > 1 for warp in range(4))
        warp, lane = THREADS // 32, THREADS % 32
        rows = [(at[32 * warp + 8 * i + lane // 4] + offset) // 4 for i in range(number)]
        assert all(np.all((row % 4 == 0) | ~self.mask) for row in rows), "a row that is not aligned"
        for row in rows:
            self._shared_words(4 * (row + lane % 4))
        return [self.shared[np.where(self.mask, row + lane % 4, 0)] for row in rows]

    def copy(self, at_shared, at, *, words, shared_offset=0, offset=0, where=None):
        wanted = self.mask if where is None else self.mask & where
        to, source = (at_shared + shared_offset) // 4, at.word + offset // 4
        assert np.all((source >= 0) & (source + words <= at.memory.size) | ~wanted), "a copy from outside of memory"
        assert np.all((to % words == 0) & (source % words == 0) | ~wanted), "a copy that is not aligned"
        self.copies.append((wanted, to, at.memory, source, words))
        for i in range(words):
            np.add.at(self.under_way, to[wanted] + i, 1)

    def end_copies(self):
        for warp, lanes in self._active_warps():
            self.groups[warp].append([(mask & lanes, *rest) for mask, *rest in self.copies])
        self.copies = []

    def wait_copies(self, groups):
        """Copies arrive as late as they may."""
        for warp, _ in self._active_warps():
            while len(self.groups[warp]) > groups:
                for mask, to, memory, source, words in self.groups[warp].pop(0):
                    for i in range(words):
                        self.shared[to[mask] + i] = memory[source[mask] + i]
                        np.subtract.at(self.under_way, to[mask] + i, 1)

    def _active_warps(self):
        for warp in range(WARPGROUP // 32):
            lanes = THREADS // 32 == warp
            assert self.mask[lanes].all() or not self.mask[lanes].any(), "lanes of a warp that part"
            if self.mask[lanes].any():
                yield warp, lanes

    def add_shared(self, at, x, *, offset):
        np.add.at(self.shared, self._shared_words(at + offset), x[self.mask])

    def max_shared(self, at, x):
        np.maximum.at(self.shared, (at // 4)[self.mask], x[self.mask])

    def add_global(self, at, x):
        np.add.at(at.memory, at.word[self.mask], x[self.mask])

    def add_global_pair(self, at, low, high):
        wanted = self.mask & (high != 0)
        assert np.all(at.word[wanted] % 2 == 0)
        np.add.at(at.memory, at.word[wanted], low[wanted])
        np.add.at(at.memory, at.word[wanted] + 1, high[wanted])

    def max_global(self, at, x):
        np.maximum.at(at.memory, at.word[self.mask], x[self.mask])

    def shuffle_xor(self, x, lanes):
        return x[THREADS ^ lanes]

    def shuffle_up(self, x, lanes):
        return np.where(THREADS % 32 < lanes, x, x[THREADS - np.where(THREADS % 32 < lanes, 0, lanes)])

    def shuffle_down(self, x, lanes):
        there = THREADS % 32 + lanes < 32
        return np.where(there, x[np.where(there, THREADS + lanes, THREADS)], x)

    def shuffle(self, x, lane):
        return x[THREADS // 32 * 32 + self.value(lane) % 32]

    def ballot(self, condition):
        bits = np.where(condition & self.mask, np.uint32(1) << THREADS % 32, np.uint32(0))
        return np.repeat(bits.reshape(-1, 32).sum(-1, dtype=np.uint32), 32)

    def maximum(self, a, b):
        return np.fmax(self.value(a), self.value(b))

    def minimum_or_nan(self, a, b):
        return np.minimum(self.value(a), self.value(b))

    def minimum(self, a, b):
        return np.fmin(self.value(a), self.value(b))

    def fma(self, a, b, c):
        return _fma(self.value(a), self.value(b), self.value(c))

    def binary_product(self, a, b, c):
        """Lane 4 g + t holds word t of rows g, g + 8 and of column g, and columns 2 t, 2 t + 1 of the result's rows."""
        a, c = [self.value(x) for x in a], [self.value(x) for x in c]
        out = [x.copy() for x in c]
        for warp in range(WARPGROUP // 32):
            lanes = slice(32 * warp, 32 * warp + 32)
            rows = np.concatenate([x[lanes].reshape(8, 4) for x in a])
            columns = b[lanes].reshape(8, 4)
            product = np.bitwise_count(rows[:, None] & columns[None]).sum(-1).astype(np.uint32)  # [16, 8]
            for i in range(4):
                half = product[8 * (i // 2) : 8 * (i // 2) + 8]  # [8 rows, 8 columns]
                out[i][lanes] += half.reshape(8, 4, 2)[:, :, i % 2].reshape(32)
        return out

    def matrix_product(self, dtype, a, b, c):
        """Lane 4 g + t holds columns 2 t, 2 t + 1 and 8 more of rows g, g + 8 of a, the same rows of column g of b, and
        columns 2 t, 2 t + 1 of rows g, g + 8 of the result."""
        unpack = self.bfloat16_pair if dtype == "bfloat16" else self.float16_pair
        a, b, c = ([self.value(x) for x in operand] for operand in (a, b, c))
        out = [x.copy() for x in c]
        for warp in range(WARPGROUP // 32):
            lanes = slice(32 * warp, 32 * warp + 32)
            # [g, 2 t + half] of a word, row by row.
            halves = lambda word: np.stack(unpack(word[lanes]), axis=-1).reshape(8, 8)  # noqa: B023, E731
            left = np.block([[halves(a[0]), halves(a[2])], [halves(a[1]), halves(a[3])]])
            right = np.concatenate([halves(b[0]), halves(b[1])], axis=1)
            with np.errstate(invalid="ignore", over="ignore"):
                product = left.astype(np.float64) @ right.T.astype(np.float64)
                for i in range(4):
                    half = product[8 * (i // 2) : 8 * (i // 2) + 8]
                    out[i][lanes] += half.reshape(8, 4, 2)[:, :, i % 2].reshape(32).astype(np.float32)
        return out

    def pack_pair(self, dtype, low, high):
        kind = jnp.bfloat16 if dtype == "bfloat16" else np.float16
        low, high = (self.value(x).astype(kind).view(np.uint16).astype(np.uint32) for x in (low, high))
        return low | high << np.uint32(16)

    def low_halves(self, a, b):
        return (a & np.uint32(0xFFFF)) | b << np.uint32(16)

    def high_halves(self, a, b):
        return a >> np.uint32(16) | (b & np.uint32(0xFFFF0000))

    def second_byte(self, x):
        return x >> np.uint32(8) & np.uint32(255)

    def pack_second_bytes(self, words):
        return sum((self.second_byte(word) << np.uint32(8 * i) for i, word in enumerate(words)), np.uint32(0))

    def larger_halves(self, a, b):
        return self.pack_pair("bfloat16", *map(np.fmax, self.bfloat16_pair(self.value(a)), self.bfloat16_pair(b)))

    def when(self, condition, body):
        outer, self.mask = self.mask, self.mask & condition
        if self.mask.any():
            body()
        self.mask = outer

    def update(self, condition, carried, body, otherwise=list):
        result = list(carried)

        def put(condition, body):
            result[:] = [np.where(condition, new, old) for new, old in zip(body(carried), result, strict=True)]

        for holds, run in ((condition, body), (~condition, otherwise)):
            self.when(holds, functools.partial(put, holds, run))
        return result

    def loop(self, count, carried, body):
        outer, count = self.mask, self.value(count)
        for i in range(int(np.max(count[outer], initial=0))):
            # Threads whose count is lower have left.
            self.mask = outer & (count > i)
            new = body(self.value(i), carried)
            carried = [np.where(self.mask, x, old) for x, old in zip(new, carried, strict=True)]
        self.mask = outer
        return carried

    def ptx(self, text, inputs, outputs):
        """Float instructions on registers: $0 is the output, $1 ... the inputs."""
        assert outputs == "f"
        registers = {f"${i + 1}": self.value(x) for i, x in enumerate(inputs)}

        def read(name):
            if name.startswith("0f"):
                return self.value(float(np.uint32(int(name[2:], 16)).view(np.float32)))
            return registers[name]

        for name, target, *operands in (re.findall(r"[^\s,]+", line) for line in text.strip("{} ").split(";") if line):
            if name == ".reg" or name == "":
                continue
            registers[target] = _FLOAT_INSTRUCTIONS[name](*(read(x) for x in operands))
        return [registers["$0"]]


def _words(x) -> np.ndarray:
    """The memory of an array or a reference, as words that can be written."""
    array = np.asarray(x if isinstance(x, jax.Array) else x[...])
    return np.frombuffer(bytearray(array.tobytes()), np.uint32)


def _fma(a, b, c):
    # A product of two float32 is exact in float64; the sum is rounded twice, which is close enough for a bin.
    # Infinity times zero is NaN without a warning, and too large a number infinity, as on the GPU.
    with np.errstate(over="ignore", invalid="ignore"):
        return (a.astype(np.float64) * b + c).astype(np.float32)


_FLOAT_INSTRUCTIONS = {
    "sub.rn.f32": lambda a, b: a - b,
    "mul.rn.f32": lambda a, b: a * b,
    "fma.rn.f32": _fma,
    "fma.rn.sat.f32": lambda a, b, c: np.nan_to_num(np.clip(_fma(a, b, c), 0, 1), nan=0.0).astype(np.float32),
}
