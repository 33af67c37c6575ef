import ast
import importlib
import json
import re
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import nbformat
import pytest

from dpo_helpers.config import RunConfig

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


def test_notebooks_and_package_are_in_step():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "embed_helpers.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, f"run `make notebooks`: {done.stdout}"


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


def test_one_cell_holds_every_knob_with_the_packages_default():
    assert parameters(NAMES[0]) == {name.upper(): value for name, value in asdict(RunConfig()).items()}
    for line in tagged(NAMES[0], "parameters").source.splitlines()[1:]:
        assert re.fullmatch(
            r'[A-Z_]+ = \S+ #@param (\{type:"(integer|number|string)"\}|\[.*\]( \{allow-input: true\})?)',
            line,
        ), line


def test_the_choices_in_the_forms_are_the_packages():

    from dpo_helpers.config import LOSS_TYPES, REPORT_TARGETS, TRAINERS

    source, models = tagged(NAMES[0], "parameters").source, (*(entry.name for entry in MENU), "embedded")
    for knob, choices in (
        ("LOSS_TYPE", LOSS_TYPES),
        ("REPORT_TO", REPORT_TARGETS),
        ("TRAINER", TRAINERS),
        ("MODEL_NAME", models),
    ):
        assert (
            tuple(json.loads(re.search(rf"^{knob} = .*#@param (\[.*\])", source, re.MULTILINE).group(1)))
            == choices
        )


def test_no_number_is_set_below_the_parameter_cell():
    cells = own_code(NAMES[0])
    below = cells[
        next(i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])) + 1 :
    ]
    numbers = [
        (cell.source, node.value.value)
        for cell in below
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, (int, float))
        and not isinstance(node.value.value, bool)
    ]
    assert numbers == []


def test_the_demo_changes_only_knobs_that_exist():
    import yaml

    changed = yaml.safe_load((ROOT / "tests" / "demo_parameters.yaml").read_text())
    assert set(changed) <= set(parameters(NAMES[0])) and changed["MODEL_NAME"] == "embedded"
    RunConfig.from_form(changed)


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


def test_the_cell_writes_the_whole_package_and_then_uses_it(empty_machine, capsys):
    assert "作りました" in run_helpers_cell(capsys)
    for path in [*(ROOT / "dpo_helpers").glob("*.py"), *(ROOT / "dpo_helpers").glob("*.json")]:
        assert (empty_machine / "dpo_helpers" / path.name).read_bytes() == path.read_bytes()
    assert "そのまま使います" in run_helpers_cell(capsys)
    assert importlib.import_module("dpo_helpers.config").__file__ == str(
        empty_machine / "dpo_helpers" / "config.py"
    )


def write_older_copy(folder):
    """Make what an older notebook would have written: other contents, and the stamp of just these
    contents.
    """
    (folder / "config.py").write_text("OLD = True\n")
    names = {p.name: p.read_text() for p in folder.iterdir() if p.suffix in (".py", ".json")}
    source = tagged(NAMES[0], "helpers").source
    scope = {}
    exec(
        source[source.index("def package_hash") : source.index("def install_package")],
        {"hashlib": __import__("hashlib")},
        scope,
    )
    (folder / ".written_by_notebook").write_text(scope["package_hash"](names))


def test_a_copy_of_an_older_notebook_is_replaced_and_kept_beside(empty_machine, capsys):
    run_helpers_cell(capsys)
    write_older_copy(empty_machine / "dpo_helpers")
    assert "新しくしました" in run_helpers_cell(capsys)
    assert (empty_machine / "dpo_helpers" / "config.py").read_text() == (
        ROOT / "dpo_helpers" / "config.py"
    ).read_text()
    (old,) = empty_machine.glob("dpo_helpers_old_*")
    assert (old / "config.py").read_text() == "OLD = True\n"


def test_the_users_own_changes_are_used_and_told(empty_machine, capsys):
    run_helpers_cell(capsys)
    changed = empty_machine / "dpo_helpers" / "config.py"
    changed.write_text(changed.read_text() + "MINE = True\n")
    assert "あなたの変更を優先" in run_helpers_cell(capsys)
    assert changed.read_text().endswith("MINE = True\n") and not list(empty_machine.glob("dpo_helpers_old_*"))


def test_an_injected_switch_wins_over_the_form(monkeypatch):
    import IPython

    from dpo_helpers.tables import injected

    class Shell:
        user_ns = {
            "In": [
                "",
                "USE_DRIVE = True",
                '# Parameters\nUSE_DRIVE = False\nNAME = "x"\n',
                "USE_DRIVE = True",
            ]
        }

    monkeypatch.setattr(IPython, "get_ipython", Shell)
    assert (
        injected("USE_DRIVE", True) is False
        and injected("NAME", "y") == "x"
        and injected("QUICK_FIX", True) is True
    )


def test_a_users_problem_shows_as_its_message_alone():
    from dpo_helpers.errors import UserError

    assert UserError("直してください。")._render_traceback_() == ["", "⚠️ 直してください。"]


def test_a_table_shows_counts_as_whole_numbers_beside_fractions():
    from dpo_helpers.tables import show_table

    html = show_table([{"値": 1000}, {"値": 0.5}]).to_html()
    assert ">1000<" in html and ">0.5000<" in html
