"""Wall time of a stretch of code, with JAX's compiling apart."""

import time

import jax


class Stopwatch:
    """Context manager that measures the code under it.

    Attributes:
      seconds: wall time without compiling.
      compile_seconds: time that JAX spent tracing, lowering and compiling.
    """

    seconds: float
    compile_seconds: float

    def __enter__(self) -> "Stopwatch":
        self._compiling: list[tuple[float, float]] = []
        jax.monitoring.register_event_duration_secs_listener(self._record)
        self._begin = time.perf_counter()
        return self

    def __exit__(self, *exception) -> None:
        elapsed = time.perf_counter() - self._begin
        jax.monitoring.unregister_event_duration_listener(self._record)
        self.compile_seconds = _covered(self._compiling)
        self.seconds = elapsed - self.compile_seconds

    def _record(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            now = time.perf_counter()
            self._compiling.append((now - duration_secs, now))


def _covered(intervals: list[tuple[float, float]]) -> float:
    """Seconds that the intervals cover. They nest: a function may be traced while another is."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
