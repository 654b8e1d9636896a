"""Results files: every number beside the machine, the code and the command that gave it."""

import datetime
import json
import platform
import subprocess
import sys
from pathlib import Path

import jax

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, str]:
    """Device, versions, commit ("-dirty": with changes; "unknown": not a git checkout), command, date."""
    return {
        "device": jax.devices()[0].device_kind,
        "processor": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "commit": _commit(),
        "command": " ".join(["python", "-m", sys.modules["__main__"].__spec__.name, *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
    }


def write_result(name: str, content: dict) -> Path:
    """Write benchmarks/results/`name`, a JSON object: the environment, then the content."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / name
    path.write_text(json.dumps({"environment": environment(), **content}, indent=1) + "\n")
    return path


def _commit() -> str:
    describe = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=RESULTS.parent, capture_output=True, text=True
    )
    return describe.stdout.strip() if describe.returncode == 0 else "unknown"
