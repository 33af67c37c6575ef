"""Both notebooks as they are committed: clean, explained, one cell of parameters, the package in them."""

import ast
import hashlib
import importlib
import json
import re
import statistics
import sys
from dataclasses import asdict, fields
from pathlib import Path

import nbformat
import pytest

from dpo_helpers.config import RunConfig, Switches, read_form

ROOT = Path(__file__).parent.parent
NAMES = ("colab_dpo_training.ipynb", "dpo_training_experiment.ipynb")


def read_cells(name, kind=None):
    return [cell for cell in nbformat.read(ROOT / name, as_version=4).cells if kind in (None, cell.cell_type)]


def tagged(name, tag):
    (cell,) = (cell for cell in read_cells(name) if tag in cell.metadata.get("tags", []))
    return cell


def own_code(name):
    return [cell for cell in read_cells(name, "code") if "helpers" not in cell.metadata.get("tags", [])]


def parameters(name):
    assignments = ast.parse(tagged(name, "parameters").source).body
    return {node.targets[0].id: ast.literal_eval(node.value) for node in assignments}


@pytest.mark.parametrize("name", NAMES)
def test_the_notebook_is_valid_and_clean(name):
    notebook = nbformat.read(ROOT / name, as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"accelerator", "colab", "kernelspec", "language_info"}
    assert notebook.metadata.accelerator == "GPU" and notebook.metadata.colab.gpuType == "T4"
    assert all(
        cell.outputs == [] and cell.execution_count is None
        for cell in notebook.cells
        if cell.cell_type == "code"
    )
    assert all(set(cell.metadata) <= {"tags", "cellView"} for cell in notebook.cells)


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_short_and_explained(name):
    lengths = [
        len(cell.source.splitlines())
        for cell in own_code(name)
        if "parameters" not in cell.metadata.get("tags", [])
    ]
    assert statistics.median(lengths) <= 6 and max(lengths) <= 15
    assert len(read_cells(name, "markdown")) >= len(lengths)


@pytest.mark.parametrize("name", NAMES)
def test_prose_is_japanese(name):
    assert all(re.search(r"[ぁ-んァ-ヶ]", cell.source) for cell in read_cells(name, "markdown"))


def forms(source):
    """Return {name: choices, or None} of the lines that Colab shows as a field to fill in."""
    found = {}
    for name, form in re.findall(r"^(\w+) = [^#\n]+ #@param (.+)$", source, re.MULTILINE):
        choices = re.match(r"\[.*?\]", form)
        found[name] = tuple(json.loads(choices.group())) if choices else None
    return found


def test_the_parameter_cell_gives_a_beginner_few_forms_with_the_packages_defaults():
    shown = parameters(NAMES[0])
    assert list(shown) == [*forms(tagged(NAMES[0], "parameters").source), "MORE"]
    assert 9 <= len(shown) - 1 <= 10 and shown["MORE"] == {}
    defaults = asdict(RunConfig()) | asdict(Switches())
    assert {name: defaults[name.lower()] for name in shown if name != "MORE"} | {"MORE": {}} == shown


def test_the_choices_in_the_forms_are_the_packages():
    choices = forms(tagged(NAMES[0], "parameters").source)
    assert choices["MODEL_NAME"][0] == RunConfig().model_name and "embedded" in choices["MODEL_NAME"]
    (resume,) = (item for item in fields(Switches) if item.name == "resume")
    assert choices["RESUME"] == resume.metadata["allowed"]


@pytest.mark.parametrize("name", NAMES)
def test_one_cell_holds_every_form_and_nothing_is_set_below_it(name):
    """QUICK_FIX alone stands where it is needed: beside the diagnosis that asks for it."""
    cells = own_code(name)
    others = [cell.source for cell in cells if "parameters" not in cell.metadata.get("tags", [])]
    assert {form for source in others for form in forms(source)} <= {"QUICK_FIX"}
    assert [set_values(source) for source in others if set_values(source) - {"QUICK_FIX"}] == []


def set_values(source):
    """Return the names that a cell gives a number, True or False, alone or in a list or dictionary."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign):
            plain = (ast.Constant, ast.List, ast.Tuple, ast.Dict, ast.UnaryOp, ast.USub, ast.Load)
            inside = list(ast.walk(node.value))
            values = [part.value for part in inside if isinstance(part, ast.Constant)]
            is_value = all(isinstance(part, plain) for part in inside)
            if is_value and any(isinstance(value, (int, float)) for value in values):
                names.add(ast.unparse(node.targets[0]))
    return names


def test_a_number_or_a_switch_in_a_cell_is_seen():
    assert set_values("A = 3\nB = -1e-3\nC = [1, 2]\nD = {'x': 0.5}\nE = True") == set("ABCDE")
    assert set_values('A = "x"\nB = f(3)\nC = A\nD = [f(1)]') == set()


def test_the_notebook_and_what_papermill_puts_behind_its_parameters_make_the_demos_run():
    import yaml

    changed = yaml.safe_load((ROOT / "tests" / "demo_parameters.yaml").read_text())
    assert set(changed) <= set(parameters(NAMES[0]))
    names = {}
    exec(tagged(NAMES[0], "parameters").source, names)
    exec("".join(f"{name} = {value!r}\n" for name, value in changed.items()), names)
    config, switches = read_form(names)
    expected = {name.lower(): value for name, value in changed.items() if name != "MORE"} | changed["MORE"]
    assert config == RunConfig(**expected) and config.model_name == "embedded"
    assert switches == Switches()


def run_helpers_cell(capsys):
    exec(compile(tagged(NAMES[0], "helpers").source, "helpers", "exec"), {})
    return capsys.readouterr().out


@pytest.fixture
def empty_machine(tmp_path, monkeypatch):
    """A working folder and import path on which no dpo_helpers is found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "path", ["", *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
    )
    saved = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "dpo_helpers"}
    importlib.invalidate_caches()
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "dpo_helpers"]:
        del sys.modules[name]
    sys.modules.update(saved)
    importlib.invalidate_caches()


def read_package(folder):
    files = {path.relative_to(folder): path for path in folder.rglob("*")}
    return {name: path.read_bytes() for name, path in files.items() if path.suffix in (".py", ".json")}


def test_the_cell_writes_the_whole_package_and_then_uses_it(empty_machine, capsys):
    assert "を用意しました" in run_helpers_cell(capsys)
    assert read_package(empty_machine / "dpo_helpers") == read_package(ROOT / "dpo_helpers")
    assert "そのまま使います" in run_helpers_cell(capsys)
    module = importlib.import_module("dpo_helpers.config")
    assert module.__file__ == str(empty_machine / "dpo_helpers" / "config.py")
    assert [path.name for path in empty_machine.iterdir()] == ["dpo_helpers"]


def stamp_folder(folder):
    """Note the folder's contents as an untouched copy of some other notebook's, as its cell would have."""
    source = tagged(NAMES[0], "helpers").source
    scope = {"hashlib": hashlib}
    exec(source[source.index("def stamp") : source.index("archive = ")], scope)
    contents = {name.as_posix(): content for name, content in read_package(folder).items()}
    (folder / ".written_by_notebook").write_text(scope["stamp"](contents))


def test_a_copy_of_an_older_notebook_is_replaced_and_kept_beside(empty_machine, capsys):
    run_helpers_cell(capsys)
    (empty_machine / "dpo_helpers" / "config.py").write_text("OLD = True\n")
    stamp_folder(empty_machine / "dpo_helpers")
    assert "新しくします" in run_helpers_cell(capsys)
    assert read_package(empty_machine / "dpo_helpers") == read_package(ROOT / "dpo_helpers")
    (old,) = empty_machine.glob("dpo_helpers_old_*")
    assert (old / "config.py").read_text() == "OLD = True\n"


def test_a_copy_of_the_time_without_rooms_is_replaced_too(empty_machine, capsys):
    folder = empty_machine / "dpo_helpers"
    folder.mkdir()
    for name in ("__init__.py", "config.py", "training.py"):
        (folder / name).write_text("OLD = True\n")
    (folder / ".written_by_notebook").write_text("a hash of another kind")
    assert "新しくします" in run_helpers_cell(capsys)
    assert read_package(folder) == read_package(ROOT / "dpo_helpers")


def test_a_copy_that_was_cut_off_is_written_again(empty_machine, capsys):
    run_helpers_cell(capsys)
    (empty_machine / "dpo_helpers" / "train" / "loop.py").unlink()
    assert "書きかけ" in run_helpers_cell(capsys)
    assert read_package(empty_machine / "dpo_helpers") == read_package(ROOT / "dpo_helpers")


def test_modules_of_the_older_copy_are_forgotten(empty_machine, capsys):
    folder = empty_machine / "dpo_helpers"
    run_helpers_cell(capsys)
    (folder / "config.py").write_text("OLD = True\n")
    stamp_folder(folder)
    importlib.invalidate_caches()
    assert importlib.import_module("dpo_helpers.config").OLD
    run_helpers_cell(capsys)
    assert not hasattr(importlib.import_module("dpo_helpers.config"), "OLD")


def test_the_users_own_changes_are_used_and_told(empty_machine, capsys):
    run_helpers_cell(capsys)
    changed = empty_machine / "dpo_helpers" / "config.py"
    changed.write_text(changed.read_text() + "MINE = True\n")
    assert "あなたの変更を優先" in run_helpers_cell(capsys)
    assert changed.read_text().endswith("MINE = True\n") and not list(empty_machine.glob("dpo_helpers_old_*"))
