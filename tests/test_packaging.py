import importlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from benchmarks import report

ROOT = Path(__file__).parent.parent
PACKAGES = ("rabitq_jax", "pallas_kernels", "models")


def test_version_is_the_one_in_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert importlib.metadata.version(project["name"]) == project["version"]


def test_console_entry_resolves():
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="rabitq-jax")
    assert callable(entry.load())


@pytest.mark.parametrize("package", PACKAGES)
def test_package_imports_from_this_tree(package):
    assert Path(importlib.import_module(package).__path__[0]) == ROOT / package


def test_algorithm_does_not_import_models_or_torch():
    code = "import sys, rabitq_jax; print(*{'models', 'transformers', 'torch'} & set(sys.modules))"
    imported = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert imported.split() == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_environment_switches(package):
    readers = [
        path.name for path in (ROOT / package).rglob("*.py") if re.search(r"os\.environ|getenv", path.read_text())
    ]
    assert readers == []


def test_readme_numbers_are_those_of_the_results():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "<!-- /results -->" in readme
    assert report.rewritten(readme) == readme


def test_readme_names_targets_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    # A command opens a line or a code span; "make" inside a sentence is a verb.
    commands = set(re.findall(r"(?:^|`)\s*make ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert commands
    assert commands <= targets


def test_the_retrieval_model_is_part_of_its_package():
    files = {path.name for path in (ROOT / "models" / "retriever").iterdir()}
    assert files == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    listed = subprocess.run(
        ["git", "check-ignore", *(str(ROOT / "models" / "retriever" / name) for name in files)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    # Hatch packs what git does not ignore.
    assert listed.stdout == ""
