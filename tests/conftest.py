import logging

import jax
import pytest

# Without a CUDA build of jaxlib, JAX warns on a machine that has an NVIDIA driver. The CPU tests mean to run on a CPU.
logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)


def pytest_report_header() -> str:
    return f"jax {jax.__version__} on {jax.devices()[0].device_kind}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and jax.default_backend() != "gpu":
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(request):
    """The time of most tests is LLVM's, on a CPU; a GPU compiles as it does for users."""
    is_quick = jax.default_backend() == "cpu" and not request.node.get_closest_marker("optimized")
    jax.config.update("jax_disable_most_optimizations", is_quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder in place of benchmarks/results, and measurements that are short."""
    from benchmarks import record, timing

    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(timing, "STEPS", 2)
    monkeypatch.setattr(timing, "REPEATS", 2)
    monkeypatch.setattr(timing, "CALLS", 2)
    return tmp_path


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Thousands of compiled programs in one process take more memory maps than a process may have, and it crashes."""
    yield
    jax.clear_caches()
