"""The tools behind the Makefile's measurements run for hours, rarely: what they import must be there all
the same.
"""

import importlib.util
from pathlib import Path

import pytest

TOOLS = sorted((Path(__file__).parent.parent / "tools").glob("*.py"))


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_a_tool_finds_all_that_it_imports(path):
    spec = importlib.util.spec_from_file_location(f"tool_{path.stem}", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_each_tool_is_reached_by_a_command():
    commands = (TOOLS[0].parents[1] / "Makefile").read_text(encoding="utf-8")
    assert [path.name for path in TOOLS if path.name not in commands] == []
