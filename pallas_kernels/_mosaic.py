"""Single-lane programming in Pallas Mosaic GPU: integers, addresses, PTX instructions and control flow, as MLIR.

Kernels here are written for one lane of a warp, as CUDA would be: values are 32-bit registers, addresses 64-bit numbers
(global memory) or 32-bit ones (shared memory).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, scf

WARPGROUP = 128


def call(body, *, name: str, out_type, blocks: int, shared_words: int):
    """A kernel of `blocks` thread blocks of one warpgroup. `body` gets references: inputs, outputs, shared memory."""

    def kernel(*refs):
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
        def run(_, *refs):
            body(*refs)

        run(*refs)

    kernel.__name__ = name
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=[plgpu.SMEM((shared_words,), jnp.int32)],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )


def i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def i64() -> ir.Type:
    return ir.IntegerType.get_signless(64)


def f32() -> ir.Type:
    return ir.F32Type.get()


def value(x) -> ir.Value:
    """A Python integer as an i32, a Python float as an f32; values pass."""
    if isinstance(x, int):
        return arith.constant(i32(), ir.IntegerAttr.get(i32(), x if x < 2**31 else x - 2**32))
    if isinstance(x, float):
        return arith.constant(f32(), ir.FloatAttr.get(f32(), x))
    return x


def _binary(operation, a, b) -> ir.Value:
    return operation(value(a), value(b))


add = functools.partial(_binary, arith.addi)
subtract = functools.partial(_binary, arith.subi)
multiply = functools.partial(_binary, arith.muli)
divide = functools.partial(_binary, arith.divui)
left = functools.partial(_binary, arith.shli)
right = functools.partial(_binary, arith.shrui)
right_signed = functools.partial(_binary, arith.shrsi)
bit_and = functools.partial(_binary, arith.andi)
bit_or = functools.partial(_binary, arith.ori)
bit_xor = functools.partial(_binary, arith.xori)
minimum_signed = functools.partial(_binary, arith.minsi)
maximum_signed = functools.partial(_binary, arith.maxsi)
both = functools.partial(_binary, arith.andi)
either = functools.partial(_binary, arith.ori)


def less(a, b) -> ir.Value:
    """a < b, both unsigned."""
    return arith.cmpi(arith.CmpIPredicate.ult, value(a), value(b))


def not_less(a, b) -> ir.Value:
    """a >= b, both unsigned."""
    return arith.cmpi(arith.CmpIPredicate.uge, value(a), value(b))


def negate(condition) -> ir.Value:
    return arith.xori(condition, arith.constant(ir.IntegerType.get_signless(1), True))


def select(condition, a, b) -> ir.Value:
    return arith.select(condition, value(a), value(b))


def as_float(x) -> ir.Value:
    """The f32 with an i32's bits."""
    return arith.bitcast(f32(), x)


def as_int(x) -> ir.Value:
    """The i32 with an f32's bits."""
    return arith.bitcast(i32(), x)


def bfloat16_pair(word) -> tuple[ir.Value, ir.Value]:
    """The two bfloat16 of a word, low half first, as f32."""
    return as_float(left(word, 16)), as_float(bit_and(word, 0xFFFF0000))


def thread_index() -> ir.Value:
    return utils.thread_idx()


def block_index() -> ir.Value:
    return arith.index_cast(i32(), gpu.block_id(gpu.Dimension.x))


def thread_index_anew() -> ir.Value:
    """The same number. What is computed of it takes no registers before."""
    return ptx("mov.u32 $0, %tid.x;", [], "r", effects=True)[0]


def block_index_anew() -> ir.Value:
    """The same number. What is computed of it takes no registers before."""
    return ptx("mov.u32 $0, %ctaid.x;", [], "r", effects=True)[0]


def barrier() -> None:
    """Wait for all threads of the block."""
    gpu.barrier()


def warp_barrier() -> None:
    """Wait for all lanes of the warp, which then see what they wrote to shared memory."""
    ptx("bar.warp.sync 0xffffffff;", [], effects=True)


def address(ref, word) -> ir.Value:
    """Global address of a 32-bit word of a reference; `word` is unsigned."""
    base = llvm.ptrtoint(i64(), utils.memref_ptr(ref))
    offset = arith.shli(arith.extui(i64(), value(word)), arith.constant(i64(), ir.IntegerAttr.get(i64(), 2)))
    return arith.addi(base, offset)


def row_address(ref, row, words: int) -> ir.Value:
    """Global address of a row, of so many 32-bit words each; it may be more than 2^32 words away."""
    base = llvm.ptrtoint(i64(), utils.memref_ptr(ref))
    size = arith.constant(i64(), ir.IntegerAttr.get(i64(), 4 * words))
    return arith.addi(base, arith.muli(arith.extui(i64(), value(row)), size))


def advance(at, words) -> ir.Value:
    """A global address so many 32-bit words further on."""
    offset = arith.shli(arith.extui(i64(), value(words)), arith.constant(i64(), ir.IntegerAttr.get(i64(), 2)))
    return arith.addi(at, offset)


def shared_address(ref) -> ir.Value:
    return llvm.ptrtoint(i32(), utils.memref_ptr(ref))


def ptx(text: str, inputs, outputs: str = "", *, effects: bool = False) -> list[Any]:
    """PTX instructions: $0, $1, ... are the outputs, then the inputs.

    Args:
      inputs: values; i32 and f32 become 32-bit registers, i64 64-bit ones, i1 predicates.
      outputs: one letter each: "r" for i32, "f" for f32.
      effects: the instructions do more than compute their outputs.
    """
    letters = {"i1": "b", str(i32()): "r", str(i64()): "l", str(f32()): "f"}
    inputs = [value(x) for x in inputs]
    constraints = ["=" + letter for letter in outputs] + [letters[str(x.type)] for x in inputs]
    types = [i32() if letter == "r" else f32() for letter in outputs]
    if not types:
        result_type = ir.Type.parse("!llvm.void")
    else:
        result_type = types[0] if len(types) == 1 else llvm.StructType.get_literal(types)
    result: Any = llvm.inline_asm(result_type, inputs, text, ",".join(constraints), has_side_effects=effects)
    if len(types) <= 1:
        return [result] if types else []
    return [llvm.extractvalue(type_, result, [i]) for i, type_ in enumerate(types)]


def _operands(first: int, count: int) -> str:
    names = ", ".join(f"${first + i}" for i in range(count))
    return names if count == 1 else "{" + names + "}"


def load(at, *, words: int = 1, offset: int = 0, now: bool = False) -> list[ir.Value]:
    """`words` (1, 2 or 4) neighbouring words from global memory that the kernel does not write; offset in bytes. They
    are asked for where they are used, unless it is to be now."""
    vector = "" if words == 1 else f".v{words}"
    text = f"ld.global.nc{vector}.b32 {_operands(0, words)}, [${words}+{offset}];"
    return ptx(text, [at], "r" * words, effects=now)


def load_written(at, *, words: int = 1) -> list[ir.Value]:
    """The same of what other blocks of the kernel may have written, before a ticket that was taken."""
    vector = "" if words == 1 else f".v{words}"
    return ptx(f"ld.global{vector}.b32 {_operands(0, words)}, [${words}];", [at], "r" * words, effects=True)


def store(at, values, *, offset: int = 0, where=None) -> None:
    """Store words to neighbouring places in global memory, where a condition holds."""
    vector = "" if len(values) == 1 else f".v{len(values)}"
    text = f"st.global{vector}.b32 [$0+{offset}], {_operands(1, len(values))};"
    _where(where, text, [at, *values])


def _where(condition, text: str, inputs) -> None:
    """Instructions with effects, in the threads where a condition holds; None is all of them."""
    if condition is not None:
        text, inputs = f"@${len(inputs)} {text}", [*inputs, condition]
    ptx(text, inputs, effects=True)


def store_ones(at, mask, first) -> None:
    """Store first + i for every bit i of the mask, in neighbouring words from an address on."""
    text = (
        "{ .reg .pred p; .reg .b32 rest, bit, i; .reg .b64 at; mov.b64 at, $0; mov.b32 rest, $1; "
        "setp.eq.s32 p, rest, 0; @p bra DONE; "
        "NEXT: neg.s32 bit, rest; and.b32 bit, bit, rest; bfind.u32 i, bit; add.s32 i, i, $2; st.global.b32 [at], i; "
        "add.s64 at, at, 4; xor.b32 rest, rest, bit; setp.ne.s32 p, rest, 0; @p bra NEXT; "
        "DONE: }"
    )
    ptx(text, [at, mask, first], effects=True)


def publish(at, x) -> None:
    """Let other blocks see x, which is not 0, in a word of global memory that was 0."""
    ptx("st.relaxed.gpu.global.b32 [$0], $1;", [at, x], effects=True)


def wait_published(at) -> ir.Value:
    """What another block published, once it has. Blocks start in order: a block may wait for those before it alone."""
    text = "{ .reg .pred p; AGAIN: ld.relaxed.gpu.global.b32 $0, [$1]; setp.eq.s32 p, $0, 0; @p bra AGAIN; }"
    return ptx(text, [at], "r", effects=True)[0]


def take_ticket(at) -> ir.Value:
    """How many took one at this word of global memory before. What a thread's block wrote before that is seen by the
    block of one that takes a later one."""
    return ptx("atom.acq_rel.gpu.global.add.u32 $0, [$1], 1;", [at], "r", effects=True)[0]


def wait_tickets(at, number) -> None:
    """Wait until so many took one there; what their blocks wrote before that is seen then. A block that has not begun
    may never begin if those that wait for it take its place on the device."""
    text = (
        "{ .reg .pred p; .reg .b32 taken; AGAIN: ld.acquire.gpu.global.b32 taken, [$0]; "
        "setp.lt.u32 p, taken, $1; @p bra AGAIN; }"
    )
    ptx(text, [at, number], effects=True)


def load_shared(at, *, words: int = 1, offset: int = 0) -> list[ir.Value]:
    vector = "" if words == 1 else f".v{words}"
    text = f"ld.shared{vector}.b32 {_operands(0, words)}, [${words}+{offset}];"
    return ptx(text, [at], "r" * words, effects=True)


def store_shared(at, values, *, offset: int = 0) -> None:
    vector = "" if len(values) == 1 else f".v{len(values)}"
    ptx(f"st.shared{vector}.b32 [$0+{offset}], {_operands(1, len(values))};", [at, *values], effects=True)


def load_matrices(at, number: int, *, offset: int = 0) -> list[ir.Value]:
    """ldmatrix: of `number` (2 or 4) matrices of 8 rows of 16 bytes in shared memory, word t of row g to lane 4 g + t.
    Lane 8 i + g has the address of row g of matrix i."""
    text = f"ldmatrix.sync.aligned.m8n8.x{number}.shared.b16 {_operands(0, number)}, [${number}+{offset}];"
    return ptx(text, [at], "r" * number, effects=True)


def copy(at_shared, at, *, words: int, shared_offset: int = 0, offset: int = 0, where=None) -> None:
    """Begin to copy `words` (1, 2 or 4) neighbouring words from global to shared memory; offsets in bytes."""
    _where(where, f"cp.async.ca.shared.global [$0+{shared_offset}], [$1+{offset}], {4 * words};", [at_shared, at])


def end_copies() -> None:
    """The copies begun since the last call are a group."""
    ptx("cp.async.commit_group;", [], effects=True)


def wait_copies(groups: int) -> None:
    """Wait for this thread's own copies, but for its last so many groups."""
    ptx(f"cp.async.wait_group {groups};", [], effects=True)


def shuffle_xor(x, lanes: int) -> ir.Value:
    """The value of the lane whose number differs by `lanes` in binary, exclusive or."""
    return _shuffle("bfly", x, lanes, 0x1F)


def shuffle_up(x, lanes: int) -> ir.Value:
    """The value of the lane that is `lanes` before; the lane's own where there is none."""
    return _shuffle("up", x, lanes, 0)


def shuffle_down(x, lanes: int) -> ir.Value:
    """The value of the lane that is `lanes` behind; the lane's own where there is none."""
    return _shuffle("down", x, lanes, 0x1F)


def shuffle(x, lane) -> ir.Value:
    """The value of one lane."""
    return _shuffle("idx", x, lane, 0x1F)


def _shuffle(mode: str, x, which, clamp: int) -> ir.Value:
    letter = "f" if isinstance(x.type, ir.F32Type) else "r"
    return ptx(f"shfl.sync.{mode}.b32 $0, $1, $2, {clamp}, 0xffffffff;", [x, which], letter, effects=True)[0]


def ballot(condition) -> ir.Value:
    """A bit for each lane of the warp, one where the condition holds."""
    return ptx("vote.sync.ballot.b32 $0, $1, 0xffffffff;", [condition], "r", effects=True)[0]


def add_shared(at, x, *, offset: int) -> None:
    """Add x to a word of shared memory; atomic."""
    ptx(f"red.shared.add.u32 [$0+{offset}], $1;", [at, x], effects=True)


def max_shared(at, x) -> None:
    """Raise an unsigned word of shared memory to x; atomic."""
    ptx("red.shared.max.u32 [$0], $1;", [at, x], effects=True)


def add_global(at, x) -> None:
    """Add x to a word of global memory; atomic."""
    ptx("red.global.add.u32 [$0], $1;", [at, x], effects=True)


def add_global_pair(at, low, high) -> None:
    """Add to two neighbouring words of global memory, of which the first does not overflow; nothing where high is 0."""
    text = "{ .reg .pred p; .reg .b64 x; setp.ne.s32 p, $2, 0; mov.b64 x, {$1, $2}; @p red.global.add.u64 [$0], x; }"
    ptx(text, [at, low, high], effects=True)


def max_global(at, x) -> None:
    """Raise an unsigned word of global memory to x; atomic."""
    ptx("red.global.max.u32 [$0], $1;", [at, x], effects=True)


def binary_product(a, b, c) -> list[ir.Value]:
    """mma.m16n8k128 of bits: c + popcount(a AND b), from a lane's fragments a (2 words), b (1 word), c (4 i32)."""
    text = (
        "mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {$0, $1, $2, $3}, {$4, $5}, {$6}, {$7, $8, $9, $10};"
    )
    return ptx(text, [*a, b, *c], "rrrr")


def matrix_product(dtype: str, a, b, c) -> list[ir.Value]:
    """mma.m16n8k16: c + a b, from a lane's fragments a (4 words), b (2 words), c (4 f32) of bfloat16 or float16."""
    kind = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    text = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    return ptx(text, [*a, *b, *c], "ffff")


def pack_pair(dtype: str, low, high) -> ir.Value:
    """Two f32 rounded to bfloat16 or float16, in a word."""
    kind = {"bfloat16": "bf16x2", "float16": "f16x2"}[dtype]
    return ptx(f"cvt.rn.{kind}.f32 $0, $2, $1;", [low, high], "r")[0]


def low_halves(a, b) -> ir.Value:
    """The lower halves of two words, that of a lowest."""
    return ptx("prmt.b32 $0, $1, $2, 0x5410;", [a, b], "r")[0]


def high_halves(a, b) -> ir.Value:
    """The upper halves of two words, that of a lowest."""
    return ptx("prmt.b32 $0, $1, $2, 0x7632;", [a, b], "r")[0]


def second_byte(x) -> ir.Value:
    """The second lowest byte of a word."""
    return ptx("prmt.b32 $0, $1, $2, 0x4441;", [x, 0], "r")[0]


def pack_second_bytes(words) -> ir.Value:
    """The second lowest bytes of four words, first lowest."""
    low = ptx("prmt.b32 $0, $1, $2, 0x0051;", words[:2], "r")[0]
    high = ptx("prmt.b32 $0, $1, $2, 0x0051;", words[2:], "r")[0]
    return low_halves(low, high)


def larger_halves(a, b) -> ir.Value:
    """The larger of two words' bfloat16, half by half; a NaN loses."""
    return ptx("max.bf16x2 $0, $1, $2;", [a, b], "r")[0]


def majority(a, b, c) -> ir.Value:
    """The bits that at least two of three words have."""
    return ptx("lop3.b32 $0, $1, $2, $3, 0xe8;", [a, b, c], "r")[0]


def count_ones(x) -> ir.Value:
    return ptx("popc.b32 $0, $1;", [x], "r")[0]


add_float = functools.partial(_binary, arith.addf)
subtract_float = functools.partial(_binary, arith.subf)
multiply_float = functools.partial(_binary, arith.mulf)


def less_float(a, b) -> ir.Value:
    """a < b; not with NaN."""
    return arith.cmpf(arith.CmpFPredicate.OLT, value(a), value(b))


def not_less_float(a, b) -> ir.Value:
    """a >= b; not with NaN."""
    return arith.cmpf(arith.CmpFPredicate.OGE, value(a), value(b))


def to_float(x) -> ir.Value:
    """The f32 nearest to an unsigned i32."""
    return ptx("cvt.rn.f32.u32 $0, $1;", [x], "f")[0]


def reciprocal(x) -> ir.Value:
    """1 / x, to 2^-22 of it."""
    return ptx("rcp.approx.ftz.f32 $0, $1;", [x], "f")[0]


def to_integer(x) -> ir.Value:
    """An f32 of at least 0, rounded down; NaN to 0."""
    return ptx("cvt.rzi.u32.f32 $0, $1;", [x], "r")[0]


def floor(x) -> ir.Value:
    """An f32 rounded down, as a signed i32; NaN to 0."""
    return ptx("cvt.rmi.s32.f32 $0, $1;", [x], "r")[0]


def exp2(x) -> ir.Value:
    """2^x, to 2^-22 of it."""
    return ptx("ex2.approx.ftz.f32 $0, $1;", [x], "f")[0]


def log2(x) -> ir.Value:
    """The logarithm, to 2^-22."""
    return ptx("lg2.approx.ftz.f32 $0, $1;", [x], "f")[0]


def square_root(x) -> ir.Value:
    return ptx("sqrt.approx.ftz.f32 $0, $1;", [x], "f")[0]


def fma(a, b, c) -> ir.Value:
    """a b + c in f32, rounded once."""
    return ptx("fma.rn.f32 $0, $1, $2, $3;", [a, b, c], "f")[0]


def minimum(a, b) -> ir.Value:
    """The smaller f32; a NaN loses."""
    return ptx("min.f32 $0, $1, $2;", [a, b], "f")[0]


def maximum(a, b) -> ir.Value:
    """The larger f32; a NaN loses."""
    return ptx("max.f32 $0, $1, $2;", [a, b], "f")[0]


def minimum_or_nan(a, b) -> ir.Value:
    """The smaller f32; NaN if one is."""
    return ptx("min.NaN.f32 $0, $1, $2;", [a, b], "f")[0]


def when(condition, body) -> None:
    """Run `body` where the condition holds."""
    branch = scf.IfOp(condition)
    with ir.InsertionPoint(branch.then_block):
        body()
        scf.yield_([])


def update(condition, carried, body, otherwise: Callable = list) -> list[ir.Value]:
    """body(carried) where the condition holds, and otherwise(carried) elsewhere, by default carried; a list."""
    branch = scf.IfOp(condition, [x.type for x in carried], has_else=True)
    for block, run in ((branch.then_block, body), (branch.else_block, otherwise)):
        assert block is not None
        with ir.InsertionPoint(block):
            scf.yield_(run(carried))
    return list(branch.results)


def loop(count, carried, body) -> list[ir.Value]:
    """carried = body(i, carried) for i in 0 .. count - 1; carried is a list. Where threads differ in count, `body` must
    not wait for other threads."""
    operation = scf.ForOp(value(0), value(count), value(1), list(carried))
    with ir.InsertionPoint(operation.body):
        scf.yield_(list(body(operation.induction_variable, list(operation.inner_iter_args))))
    return list(operation.results)
