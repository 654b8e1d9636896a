"""What the benchmarks of an operation have in common: their command line, and a row's times and bytes."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence

import click
import jax

from benchmarks import timing
from benchmarks.methods import expand
from benchmarks.record import commit_option, write_row
from benchmarks.shapes import SUITES, Case
from rabitq_jax import RaBitQConfig
from rabitq_jax._dispatch import on_gpu

DEFAULT = RaBitQConfig()
# measure(case, config, bandwidth in bytes a second) gives the rows of a case, one an implementation.
Measure = Callable[[Case, RaBitQConfig, float], Iterable[dict]]
# The same of methods, given as texts ("quest:page=16,budget=1024"): one row each.
MeasureMethods = Callable[[Case, RaBitQConfig, float, tuple[str, ...]], Iterable[dict]]


def command(
    operation: str,
    measure: Measure,
    about: str,
    *,
    selections: Sequence[str] = (DEFAULT.selection,),
    measure_methods: MeasureMethods | None = None,
) -> click.Command:
    """The command that measures cases and writes results/`operation`.json, row by row.

    Args:
      selections: rules that may be asked for; others than the default write results/`operation`_`rule`.json.
      measure_methods: what --method asks for, which writes results/`operation`_methods.json; None takes no --method.
    """

    @click.command(name=operation, help=about.split("\n")[0])
    @click.option("--suite", "suites", multiple=True, type=click.Choice(list(SUITES)), help="Cases; may be repeated.")
    @click.option("--tokens", multiple=True, type=int, help="Only the cases of this capacity; may be repeated.")
    @click.option("--top-p", default=0.95, show_default=True, help="Share of the attention mass to keep.")
    @click.option("--selection", type=click.Choice(selections), default=DEFAULT.selection, show_default=True)
    @commit_option
    def main(
        suites: tuple[str, ...], tokens: tuple[int, ...], top_p: float, selection: str, commit: str,
        methods: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        announce_device()
        name = operation if selection == DEFAULT.selection else f"{operation}_{selection}"
        run = measure
        if methods and measure_methods is not None:
            name, run = f"{operation}_methods", functools.partial(measure_methods, methods=methods)
        suites = suites or ("context" if on_gpu() else "small",)
        cases = [case for suite in suites for case in SUITES[suite] if not tokens or case.shape.tokens in tokens]
        bandwidth = timing.bandwidth()
        for case in cases:
            for row in run(case, RaBitQConfig(top_p=top_p, selection=selection), bandwidth):
                row = {"case": case.name, "shape": str(case.shape), "top_p": top_p, "selection": selection} | row
                write_row(f"{name}.json", row, commit=commit)
                click.echo(summary(row))

    if measure_methods is not None:
        click.option(
            "--method", "methods", multiple=True, metavar="NAME:ARGUMENTS", callback=_read_methods,
            help="Another method, such as quest:page=16,budget=1024; may be repeated; 'all' is one setting of each. "
            "The cache stays the one planted for RaBitQ under --top-p.",
        )(main)  # fmt: skip
    return main


def _read_methods(_context, _option, texts: tuple[str, ...]) -> tuple[str, ...]:
    try:
        return expand(texts)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def announce_device() -> None:
    """Say what the numbers are worth, where they are worth little."""
    if not on_gpu():
        click.echo(
            "No GPU: small shapes on the CPU, timed by the clock. They show that the benchmark works, and no speed."
        )


def timed(function: Callable, first: jax.Array, *args) -> dict:
    """Kernel and wall times of `function(first, *args)`, jitted; see `timing.wall_times`."""
    kernel, kernels = timing.kernel_times(function, first, *args)
    wall = timing.wall_times(function, first, *args)
    return {
        "timer": timing.timer(),
        "kernel_us": dataclasses.asdict(kernel),
        "wall_us": dataclasses.asdict(wall),
        "kernels_us": kernels,
    }


def weighed(bytes_moved: float, bandwidth: float, microseconds: float) -> dict:
    """Time against the bytes that must be moved, at the bandwidth in bytes a second that was measured beside it."""
    floor = 1e6 * bytes_moved / bandwidth
    return {
        "bytes": bytes_moved,
        "bandwidth_tb_per_s": bandwidth / 1e12,
        "tb_per_s": bytes_moved / microseconds / 1e6,
        "floor_us": floor,
        "share_of_floor": floor / microseconds,
    }


def summary(row: dict) -> str:
    """A row in a line."""
    dense = "  ".join(f"{name} {times['kernel_us']['median']:.1f}" for name, times in row["dense"].items())
    return (
        f"{row['case']} ({row['implementation']}): {row['timer']} {row['kernel_us']['median']:.1f} us, "
        f"{row['share_of_floor']:.0%} of the floor's {row['floor_us']:.1f}; wall {row['wall_us']['median']:.1f}; "
        f"dense {dense}; kept {row['kept']:.2%}, which holds {row['true_mass']:.1%}"
    )
