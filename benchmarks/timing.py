"""Time on the device and by the clock, and what the device can reach.

Kernel time is CUPTI's: the durations of the kernels of one call, summed, without launches and gaps. Before each call a
kernel reads a buffer larger than L2, so that the call finds its inputs in memory. Wall time is a step's share of a
jitted loop of chained steps: it holds the launches, the gaps, the loop's own 5 us a step, and a share of the 0.6 ms
that the host takes to start the loop and to wait for it.

Without a GPU there is nothing to ask CUPTI: kernel time is then the clock's, of single calls.
"""

import dataclasses
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import profiler

from pallas_kernels import _pallas
from rabitq_jax._dispatch import on_gpu

STEPS, REPEATS = 160, 5
CALLS = 10
READ_BLOCK = 4096
FLUSH_BYTES = 256 << 20
# A streaming pass, and a matrix product, that are long enough to reach the device's rate.
STREAM_BYTES, MATMUL_SIZE = 2 << 30, 8192
CPU_STREAM_BYTES, CPU_MATMUL_SIZE = 16 << 20, 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Times:
    """Microseconds: the median of several measurements, and the quartiles below and above it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, microseconds: list[float]) -> "Times":
        low, median, high = statistics.quantiles(microseconds, n=4, method="inclusive")
        return cls(median=median, low=low, high=high)


def timer() -> str:
    """What kernel times are."""
    return "CUPTI, cold L2" if on_gpu() else "clock"


def kernel_times(function: Callable, *args) -> tuple[Times, dict[str, float]]:
    """Time of the kernels of `function(*args)`, and the median microseconds of each by name.

    Args:
      function: jitted; it donates nothing.
    """
    jax.block_until_ready(function(*args))
    if not on_gpu():
        return Times.of([1e6 * _seconds(lambda: function(*args)) for _ in range(CALLS)]), {}
    calls = _profile(lambda: function(*args))
    names = {name: None for call in calls for name in call}
    kernels = {name: statistics.median(call.get(name, 0.0) for call in calls) for name in names}
    return Times.of([sum(call.values()) for call in calls]), kernels


def _profile(call: Callable[[], object]) -> list[dict[str, float]]:
    """Microseconds of each kernel by name, of `CALLS` calls, each on a cold L2."""
    flush, buffer = jax.jit(lambda x: read(x, name="flush_l2")), jnp.zeros(FLUSH_BYTES // 4)
    jax.block_until_ready(flush(buffer))
    # profiler.measure makes its calls one after another, with no place for the flush.
    cupti = profiler.mosaic_gpu_lib._mosaic_gpu_ext
    cupti._cupti_init()
    try:
        for _ in range(CALLS):
            flush(buffer)
            result = call()
        jax.block_until_ready(result)
    finally:
        timings = cupti._cupti_get_timings(True)
    calls: list[dict[str, float]] = []
    for name, milliseconds in timings:
        if "flush_l2" in name:
            calls.append({})
        else:
            calls[-1][name] = calls[-1].get(name, 0.0) + 1000 * milliseconds
    return calls


def read(buffer: jax.Array, *, name: str) -> jax.Array:
    """Read a buffer, float32 [n], once, in a kernel of that name: the largest value of each block, float32."""

    def kernel(buffer_ref, out_ref):
        out_ref[...] = jnp.max(buffer_ref[...])

    blocks = buffer.size // READ_BLOCK
    return _pallas.call(
        kernel,
        name=name,
        grid=(blocks,),
        in_specs=[pl.BlockSpec((READ_BLOCK,), lambda i: (i,))],
        out_specs=pl.BlockSpec((None,), lambda i: (i,)),
        out_shape=jax.ShapeDtypeStruct((blocks,), jnp.float32),
    )(buffer)


# XLA records kernels in CUDA graphs where as many follow each other.
NO_CUDA_GRAPHS = {"xla_gpu_graph_min_graph_size": 1 << 30}


def step_times(
    step: Callable, state, *constants, steps: int | None = None, restart: bool = False,
    compiler_options: dict | None = None,
) -> tuple[Times, object]:  # fmt: skip
    """Wall time of a step in a jitted loop, and the state after the last one.

    Args:
      step: (i, state, *constants) -> state, whose every part hangs on the step before; see `after`.
      state: consumed, its buffers being reused, unless `restart`.
      steps: in one loop; `STEPS` by default.
      restart: each loop begins with a copy of the state, not where the one before has ended.
      compiler_options: of XLA, such as `NO_CUDA_GRAPHS`.
    """
    steps = STEPS if steps is None else steps
    run, first, microseconds = _loop(step, steps, compiler_options), state, []
    # The first loop compiles, and is not counted.
    for _ in range(1 + REPEATS):
        state = jax.block_until_ready(jax.tree.map(jnp.copy, first)) if restart else state
        begin = time.perf_counter()
        state = jax.block_until_ready(run(state, constants))
        microseconds.append(1e6 * (time.perf_counter() - begin) / steps)
    return Times.of(microseconds[1:]), state


def _loop(step: Callable, steps: int, compiler_options: dict | None = None):
    def loop(state, constants):
        return jax.lax.fori_loop(0, steps, lambda i, state: step(i, state, *constants), state)

    return jax.jit(loop, donate_argnums=0, compiler_options=compiler_options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeline:
    """What a device does in a step; microseconds and numbers are a step's share.

    Attributes:
      busy_us: some kernel or copy runs.
      launches: kernels and copies.
      in_graphs: share of these that CUDA graphs launched.
      to_host: copies to the host, each of which the host waits for.
      kernels_us: the times of all kernels of one name, longest first.
    """

    busy_us: float
    launches: float
    in_graphs: float
    to_host: float
    kernels_us: dict[str, float]


def timeline(
    step: Callable, state, *constants, steps: int, compiler_options: dict | None = None
) -> tuple[Timeline, object]:
    """The timeline of a step, from XLA's profiler, and the state after; arguments as of `step_times`, on a GPU."""
    run = _loop(step, steps, compiler_options)
    state = jax.block_until_ready(run(state, constants))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            state = jax.block_until_ready(run(state, constants))
        (profile,) = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(profile)).planes
        lines = [line for plane in planes if "/device:GPU" in plane.name for line in plane.lines]
        events = [
            (event.start_ns, event.end_ns, event.name, "cuda_graph_id" in dict(event.stats))
            for line in lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
    return summarize(events, steps), state


def summarize(events: list[tuple[float, float, str, bool]], steps: int) -> Timeline:
    """The timeline of a step, of the events of `steps` of them: start and end in nanoseconds, name, and whether a CUDA
    graph launched it."""
    busy, until = 0.0, 0.0
    kernels: dict[str, float] = {}
    for start, end, name, _ in sorted(events):
        busy, until = busy + max(0, end - max(start, until)), max(end, until)
        kernels[name] = kernels.get(name, 0) + (end - start) / 1000 / steps
    return Timeline(
        busy_us=busy / 1000 / steps,
        launches=len(events) / steps,
        in_graphs=sum(event[3] for event in events) / len(events),
        to_host=sum(name == "MemcpyD2H" for _, _, name, _ in events) / steps,
        kernels_us=dict(sorted(kernels.items(), key=lambda item: -item[1])),
    )


def after(array: jax.Array, result) -> jax.Array:
    """`array`, known only once all arrays of `result` are: steps through it cannot overlap."""
    # Without the barrier XLA computes nothing but the one element of each.
    leaves = jax.lax.optimization_barrier(jax.tree.leaves(result))
    probe = sum(leaf.ravel()[0].astype(jnp.float32) for leaf in leaves)
    return jnp.where(jnp.isnan(probe), jnp.zeros_like(array), array)


def wall_times(function: Callable, first: jax.Array, *args) -> Times:
    """Wall time of `function(first, *args)` in a chain of calls that goes through its first argument."""
    step = lambda _, first, *args: after(first, function(first, *args))  # noqa: E731
    return step_times(step, jnp.copy(first), *args)[0]


def bandwidth() -> float:
    """Bytes a second of a streaming pass over memory: the faster of a read, and a read with a write."""
    size = STREAM_BYTES if on_gpu() else CPU_STREAM_BYTES
    # Random numbers: a device may move zeros faster.
    buffer = jax.random.normal(jax.random.key(0), (size // 4,))
    # Where kernels are interpreted, XLA's sum reads faster.
    reading = jax.jit(lambda x: read(x, name="stream_read") if on_gpu() else jnp.sum(x))
    reads, _ = kernel_times(reading, buffer)
    copies, _ = kernel_times(jax.jit(lambda x: x + 1), buffer)
    return 1e6 * max(size / reads.median, 2 * size / copies.median)


def matmul_rate() -> float:
    """Floating-point operations a second of a large bfloat16 matrix product."""
    size = MATMUL_SIZE if on_gpu() else CPU_MATMUL_SIZE
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
    times, _ = kernel_times(jax.jit(jnp.matmul), a, b)
    return 1e6 * 2 * size**3 / times.median


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin
