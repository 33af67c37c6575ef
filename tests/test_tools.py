"""The tools behind the Makefile run for hours, rarely: what they import must be there all the same."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = sorted((ROOT / "tools").glob("*.py"))
RULES = [
    "demo",
    "test",
    "test-colab",
    "test-environments",
    "test-browser",
    "lint",
    "notebooks",
    "bench",
    "soak",
    "real-run",
    "experiments",
    "gpu-check",
    "clean",
]
REBUILT = {"kill_notebook.py", "soak.py"}  # other work is still making them smaller


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_a_tool_finds_all_that_it_imports_and_says_what_it_does(path):
    code = f"import runpy; runpy.run_path({str(path)!r}, run_name='imported')"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"python tools/{path.name}" in path.read_text(encoding="utf-8").split('"""')[1]


@pytest.mark.parametrize("name", ["bench", "build_models", "gpu_check", "record_runs", "soak"])
def test_a_tool_explains_its_arguments(name):
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), "--help"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr[-2000:]


def test_the_tools_are_few_and_short():
    scripts = [path for path in (ROOT / "tools").iterdir() if path.suffix in (".py", ".sh")]
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in scripts}
    assert len(lines) <= 8 and sum(lines.values()) <= 700 + sum(lines.get(name, 0) for name in REBUILT)


def test_the_makefile_has_these_rules_and_no_other():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)
    targets = re.findall(r"^([a-z-]+):(?!=)", makefile, re.MULTILINE)
    assert phony.split() == targets == RULES and len(RULES) <= 14


def test_each_tool_is_reached_by_a_rule_or_by_the_fixtures_readme():
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "tests/fixtures/README.md")]
    assert [path.name for path in TOOLS if path.name not in "".join(texts)] == []
