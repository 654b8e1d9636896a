"""Work spread over processes, and processes over GPUs: much of a short evaluation is compiling, which is serial."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

import click

Part, Result = TypeVar("Part"), TypeVar("Result")


def worker_options(command: Callable) -> Callable:
    """Add --processes and --gpus to a command."""
    processes = click.option("--processes", default=1, show_default=True, help="Processes to spread the work over.")
    gpus = click.option("--gpus", default=1, show_default=True, help="GPUs that the processes are dealt out to.")
    return processes(gpus(command))


def spread(
    function: Callable[[Part], Result], parts: Sequence[Part], *, processes: int, gpus: int
) -> Iterator[tuple[int, Result]]:
    """The number of each part and function(part), as they are done; with one process, in this one.

    Args:
      function: of a module, so that another process can import it.
    """
    if processes == 1:
        yield from enumerate(map(function, parts))
        return
    # Several processes share a GPU, this one too: none may take most of its memory at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    context = multiprocessing.get_context("spawn")
    turns = context.Queue()
    for process in range(processes):
        turns.put(process % gpus)
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_take_gpu, initargs=(turns, gpus)) as pool:
        futures = {pool.submit(function, part): i for i, part in enumerate(parts)}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _take_gpu(turns, gpus: int) -> None:
    if gpus > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(turns.get())
