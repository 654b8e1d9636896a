"""Results files: every number beside the machine, the code and the command that gave it."""

import datetime
import json
import platform
import subprocess
import sys
from pathlib import Path

import click
import jax

from rabitq_jax._dispatch import on_gpu

RESULTS = Path(__file__).parent / "results"


def commit_here() -> str:
    """The commit of this checkout, "-dirty" with changes; "unknown" outside one."""
    describe = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=RESULTS.parent, capture_output=True, text=True
    )
    return describe.stdout.strip() if describe.returncode == 0 else "unknown"


commit_option = click.option(
    "--commit", default=commit_here, help="Commit to note, where the code is a copy without its history."
)


def program_here() -> list[str]:
    """What was started: a module, as a rule."""
    module = sys.modules["__main__"].__spec__
    return ["-m", module.name.removesuffix(".__main__")] if module else [sys.argv[0]]


def environment(commit: str) -> dict[str, str]:
    """Device, versions, commit, command and date."""
    return {
        "device": jax.devices()[0].device_kind,
        "processor": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "commit": commit,
        "command": " ".join(["python", *program_here(), *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
    }


def write_result(name: str, content: dict, *, commit: str) -> Path:
    """Write benchmarks/results/`name`, a JSON object: the environment, then the content."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / name
    path.write_text(json.dumps({"environment": environment(commit), **content}, indent=1) + "\n")
    return path


def write_row(name: str, row: dict, *, commit: str) -> Path:
    """Put a row, with its environment, into a JSON list, in place of the one of the same case, implementation and p.

    A file describes one state of the code on one device: rows of another device, JAX or commit go. What no GPU has
    measured is kept apart, in results/cpu, which git ignores.
    """
    path = (RESULTS if on_gpu() else RESULTS / "cpu") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    row = environment(commit) | row
    rows = json.loads(path.read_text()) if path.exists() else []
    agrees = lambda other, *keys: all(other.get(key) == row.get(key) for key in keys)  # noqa: E731
    rows = [
        old
        for old in rows
        if agrees(old, "device", "jax", "commit") and not agrees(old, "case", "implementation", "top_p")
    ]
    path.write_text(json.dumps([*rows, row], indent=1) + "\n")
    return path


def write_text(name: str, text: str, *, commit: str) -> Path:
    """Write benchmarks/results/`name`: the command, the environment in a line, and a text."""
    RESULTS.mkdir(exist_ok=True)
    path, here = RESULTS / name, environment(commit)
    about = f"# {here['device']} ({here['processor']}), JAX {here['jax']}, commit {here['commit']}, {here['date']}"
    path.write_text(f"$ {here['command']}\n{about}\n{text}\n", encoding="utf-8")
    return path
