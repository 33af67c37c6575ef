"""The house: which room may import which, how large a module may grow, and what the helper cell holds."""

import ast
import importlib.util
from functools import cache
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dpo_helpers"
# Lower floors first; what shares a floor does not import each other's rooms.
FLOORS = (
    ("errors",),
    ("files",),
    ("config",),
    ("machine",),
    ("tables",),
    ("background", "folders", "hub"),
    ("places",),
    ("colab",),
    ("setup", "data"),
    ("model",),
    ("judge",),
    ("keep",),
    ("train",),
    ("sweep",),
    ("__main__",),
)
ROOMS = {"setup", "data", "model", "judge", "keep", "train", "sweep"}
# Rooms and modules that other work still rebuilds: free of the size of a module and of the count for now.
EXEMPT = {
    "data.generate",
    "data.own_rows",
    "data.row_checks",
    "data.row_sources",
    "judge.verdict",
    "keep",
    "setup",
    "sweep",
}
LONGEST_MODULE, MOST_MODULES, MOST_LEVELS, MOST_LINES = 310, 46, 16, 10_400
CELL_LINES, PACKED_LINE = 30, 4_000
NOTEBOOKS = ("colab_dpo_training.ipynb", "dpo_training_experiment.ipynb")


def list_modules(package: Path) -> dict[str, Path]:
    """Return {"data.tokens": path} of every module; a room's __init__ is "data", the package's own is ""."""
    modules = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def read_imports(source: str, modules) -> set[str]:
    """Return the package's modules that a source names, wherever it does: in a function, or as a string.

    A string that is a module's full name is what importlib.import_module and the like would be given.
    """
    named = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            known = node.module.removeprefix("dpo_helpers.") in modules or not is_ours(node.module)
            assert known, f"no module {node.module}"
            named |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            named.add(node.value)
    return {name.removeprefix("dpo_helpers.") for name in named if is_ours(name)} & set(modules)


def is_ours(name: str) -> bool:
    return name.startswith("dpo_helpers.")


def read_graph(package: Path) -> dict[str, set[str]]:
    modules = list_modules(package)
    return {
        name: read_imports(path.read_text(encoding="utf-8"), modules) - {name}
        for name, path in modules.items()
    }


def find_wrong_imports(graph: dict[str, set[str]]) -> list[str]:
    """Return "module → module" for each import that goes upwards, or into a neighbouring room."""
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    wrong = []
    for name, imported in graph.items():
        room = name.split(".")[0]
        for other in imported:
            target = other.split(".")[0]
            if room and target != room and floor[target] >= floor[room]:
                wrong.append(f"{name} → {other}")
    return sorted(wrong)


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """Return a chain of imports that leads back to its start, or []."""
    done = set()

    def follow(chain: list[str]) -> list[str]:
        if chain[-1] in chain[:-1]:
            return chain
        if chain[-1] not in done:
            for other in sorted(graph[chain[-1]]):
                if circle := follow([*chain, other]):
                    return circle
            done.add(chain[-1])
        return []

    return next((circle for name in graph if (circle := follow([name]))), [])


def count_levels(graph: dict[str, set[str]]) -> int:
    """Return how many modules the longest chain of imports has."""

    @cache
    def depth(name: str) -> int:
        return 1 + max(map(depth, graph[name]), default=0)

    return max(map(depth, graph))


def count_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def is_exempt(name: str) -> bool:
    return name in EXEMPT or name.split(".")[0] in EXEMPT


def test_every_module_stands_in_a_room_of_the_house():
    names = {name.split(".")[0] for name in list_modules(PACKAGE)} - {""}
    assert names == {room for floor in FLOORS for room in floor}
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == ROOMS
    assert [path for path in PACKAGE.glob("*/*/*.py")] == []


def test_the_rooms_init_files_are_empty():
    assert [path for path in PACKAGE.glob("*/__init__.py") if path.read_text()] == []


def test_no_import_goes_upwards_or_into_a_neighbouring_room():
    assert find_wrong_imports(read_graph(PACKAGE)) == []


def test_no_import_goes_in_a_circle():
    assert find_circle(read_graph(PACKAGE)) == []


def test_a_chain_of_imports_has_few_levels():
    assert count_levels(read_graph(PACKAGE)) <= MOST_LEVELS


@pytest.mark.parametrize(
    "line",
    [
        "from dpo_helpers.train.loop import train_stage",
        "from dpo_helpers.train import loop",
        "import dpo_helpers.train.loop",
        "def f():\n    from dpo_helpers.train import loop",
        'import_module("dpo_helpers.train.loop")',
        "import dpo_helpers.model.load",
    ],
)
def test_an_import_upwards_is_seen_however_it_is_written(line):
    modules = dict.fromkeys(["data.tokens", "train", "train.loop", "model.load"])
    assert find_wrong_imports({"data.tokens": read_imports(line, modules)}) != []


def test_a_module_that_is_gone_is_seen_in_a_function_too():
    with pytest.raises(AssertionError, match=r"dpo_helpers\.train\.gone"):
        read_imports("def f():\n    from dpo_helpers.train.gone import x", {"train.loop": None})


def test_a_circle_and_its_levels_are_seen():
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["a", "b", "c", "b"]
    graph = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert find_circle(graph) == [] and count_levels(graph) == 3


def test_no_module_is_long_and_they_are_few():
    modules = {name: path for name, path in list_modules(PACKAGE).items() if not is_exempt(name)}
    lengths = {name: count_lines(path) for name, path in modules.items()}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_MODULE} == {}
    assert len([lines for lines in lengths.values() if lines]) <= MOST_MODULES


def test_the_package_is_thin():
    assert sum(count_lines(path) for path in list_modules(PACKAGE).values()) <= MOST_LINES


def load_tool(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_helper_cell_is_short_and_holds_the_package(name):
    cells = nbformat.read(ROOT / name, as_version=4).cells
    (cell,) = (cell for cell in cells if "helpers" in cell.metadata.get("tags", []))
    before, packed, after = cell.source.split('"""')
    assert cell.metadata["cellView"] == "form" and before.startswith("#@title ")
    assert len((before + after).splitlines()) <= CELL_LINES
    assert max(map(len, packed.splitlines())) <= PACKED_LINE
    files = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*")}
    expected = {name: path.read_bytes() for name, path in files.items() if path.suffix in (".py", ".json")}
    assert load_tool("embed_helpers").unpack_cell(cell.source) == expected, "run `make notebooks`"


def test_the_same_package_gives_the_same_cell():
    tool = load_tool("embed_helpers")
    assert tool.make_cell_source() == tool.make_cell_source()
