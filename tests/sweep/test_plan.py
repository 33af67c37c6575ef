"""Plans of an experiment and the file of results: what is run, what is not run again, what is kept."""

import ast
import json
from pathlib import Path

import nbformat
import pytest
import yaml

from dpo_helpers.config import RunConfig
from dpo_helpers.errors import TrainingStopped, UserError
from dpo_helpers.sweep.plan import Results, Variation, load_grid, make_plan, run_plan
from dpo_helpers.sweep.report import summarize_outcomes

ROOT = Path(__file__).parent.parent.parent
RATES = {"learning_rate": [0.1, 0.2, 0.3]}


class Machine:
    name = device = "cpu"


class FakeWorkshop:
    """Measures in no time: the held-out loss is the learning rate plus the seed.

    `breaks` maps the n-th run to an error.
    """

    machine = Machine

    def __init__(self, breaks=None):
        self.breaks, self.measured = breaks or {}, []

    def measure(self, config, variation):
        self.measured.append((config.learning_rate, config.seed))
        if error := self.breaks.get(len(self.measured)):
            raise error
        return {"held_out": {"loss": config.learning_rate + config.seed}}


def test_a_grid_is_every_combination_with_every_seed():
    plan = make_plan({"beta": [0.1, 0.5], "label_noise": [0.0, 0.4]}, {"learning_rate": 1e-3}, [1, 2])
    assert [(e.config.beta, e.variation.label_noise, e.config.seed) for e in plan] == [
        (0.1, 0.0, 1),
        (0.1, 0.0, 2),
        (0.1, 0.4, 1),
        (0.1, 0.4, 2),
        (0.5, 0.0, 1),
        (0.5, 0.0, 2),
        (0.5, 0.4, 1),
        (0.5, 0.4, 2),
    ]
    assert all(e.config.learning_rate == 1e-3 for e in plan)
    assert plan[2].setting == (("beta", 0.1), ("label_noise", 0.4))
    assert [e.config.beta for e in make_plan([{"beta": 2}, {}])] == [2.0, 0.1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"betta": [0.1]}, r"知らない項目があります：betta"),
        ({"beta": [0.1, 0.0]}, r"beta = 0\.0"),
        ({"beta": 0.1}, r"\[ \] に並べて"),
        ({"label_noise": [0.9]}, r"label_noise = 0\.9"),
        ({"label_noise": [True]}, r"label_noise = True"),
        ({"data": ["easy"]}, r"generated, longer, refusal"),
        ({"training_rows": [-1]}, r"training_rows = -1"),
        ({"data_file": ["absent.csv"]}, r"absent\.csv'：ファイルがないか"),
        ({"seed": [1]}, r"seeds に並べて"),
        ({"beta": []}, r"グリッドが空です"),
        ({}, r"グリッドが空です"),
        ([], r"グリッドが空です"),
        ([3], r"グリッドの 3 は使えません"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_runs(settings, words):
    with pytest.raises(UserError, match=words):
        make_plan(settings)


def test_own_rows_and_easy_rows_exclude_each_other(tmp_path):
    (tmp_path / "rows.csv").write_text("x")
    with pytest.raises(UserError, match="data と一緒に"):
        Variation(data="longer", data_file=str(tmp_path / "rows.csv"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "JSON の書き方"),
        ("[]", "の形で書いて"),
        ('{"grid": {}}', "の形で書いて"),
        ('{"settings": {"beta": [0.1]}, "seeds": 3}', "の形で書いて"),
        ("{}", "グリッドが空"),
    ],
)
def test_a_grid_file_says_what_is_wrong_with_it(tmp_path, text, words):
    (tmp_path / "grid.json").write_text(text)
    with pytest.raises(UserError, match=words):
        load_grid(tmp_path / "grid.json")


def test_a_grid_file_has_three_seeds_unless_it_says_so(tmp_path):
    with pytest.raises(UserError, match="見つかりません"):
        load_grid(tmp_path / "grid.json")
    (tmp_path / "grid.json").write_text('{"settings": {"beta": [0.1]}}')
    assert [e.config.seed for e in load_grid(tmp_path / "grid.json")] == [42, 43, 44]


def test_runs_are_the_same_run_only_when_all_that_counts_is_the_same(tmp_path):
    own, same = tmp_path / "a.csv", tmp_path / "b.csv"
    own.write_text("x"), same.write_text("x")
    base = {"learning_rate": 1e-3}
    settings = [
        base,
        {"learning_rate": "1e-3"},
        {**base, "beta": 0.2},
        {**base, "label_noise": 0.1},
        {**base, "num_samples": 60},
        {**base, "model_name": "embedded"},
        {**base, "model_name": "embedded-small"},
        {**base, "data_file": str(own)},
        {**base, "data_file": str(same)},
    ]
    names = [e.identity for e in make_plan(settings)]
    assert names[0] == names[1] and names[7] == names[8] and len(set(names)) == 7


def without_times(outcomes):
    return [{name: value for name, value in record.items() if name != "seconds"} for _, record in outcomes]


def test_stopped_and_run_again_it_ends_with_the_same_table(tmp_path, capsys):
    plan = make_plan(RATES, seeds=[1, 2])
    whole = run_plan(plan, Results(tmp_path / "whole.jsonl"), FakeWorkshop())
    with pytest.raises(TrainingStopped, match="6 個のうち 3 個"):
        run_plan(plan, Results(tmp_path / "r.jsonl"), FakeWorkshop({4: KeyboardInterrupt()}))
    second = FakeWorkshop()
    again = run_plan(plan, Results(tmp_path / "r.jsonl"), second)
    assert len(second.measured) == 3 and "3 個は結果があります" in capsys.readouterr().out
    assert summarize_outcomes(again) == summarize_outcomes(whole)
    assert without_times(again) == without_times(whole)
    third = FakeWorkshop()
    run_plan(plan, Results(tmp_path / "r.jsonl"), third)
    assert third.measured == [] and len((tmp_path / "r.jsonl").read_text().splitlines()) == 6


def test_each_base_and_seed_is_run_in_one_go_and_the_table_keeps_the_plans_order(tmp_path):
    workshop = FakeWorkshop()
    outcomes = run_plan(make_plan(RATES, seeds=[1, 2]), Results(tmp_path / "r.jsonl"), workshop)
    assert [seed for _, seed in workshop.measured] == [1, 1, 1, 2, 2, 2]
    assert [experiment.config.seed for experiment, _ in outcomes] == [1, 2] * 3


def test_a_failed_and_a_collapsed_run_are_results_and_not_the_end(tmp_path):
    from dpo_helpers.train.callbacks import BrokenNumbers

    plan = make_plan(RATES)
    breaks = {1: BrokenNumbers(7), 2: RuntimeError("no memory")}
    outcomes = run_plan(plan, Results(tmp_path / "r.jsonl"), FakeWorkshop(breaks))
    assert [record["status"] for _, record in outcomes] == ["nan", "failed", "ok"]
    assert "ステップ 7 の次" in outcomes[0][1]["reason"]
    assert outcomes[1][1]["reason"] == "RuntimeError: no memory"
    assert [line["評価用の損失"] for line in summarize_outcomes(outcomes)] == ["－", "－", "42.30"]
    again = FakeWorkshop()
    run_plan(plan, Results(tmp_path / "r.jsonl"), again)
    assert again.measured == []
    outcomes = run_plan(plan, Results(tmp_path / "r.jsonl"), again, retry_failed=True)
    assert again.measured == [(0.2, 42)]
    assert [record["status"] for _, record in outcomes] == ["nan", "ok", "ok"]


def finish(path, count=3):
    run_plan(make_plan(RATES)[:count], Results(path), FakeWorkshop())
    return path.read_text()


@pytest.mark.parametrize("cut", [40, 1])
def test_a_run_whose_line_was_not_written_to_its_end_is_done_again(tmp_path, capsys, cut):
    path = tmp_path / "r.jsonl"
    text = finish(path)
    path.write_text(text[:-cut])
    workshop = FakeWorkshop()
    run_plan(make_plan(RATES), Results(path), workshop)
    assert workshop.measured == [(0.3, 42)] and "書きかけでした" in capsys.readouterr().out
    lines = path.read_text().splitlines()
    assert lines[:2] == text.splitlines()[:2] and json.loads(lines[2])["config"]["learning_rate"] == 0.3


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"schema": 1}', "別のバージョン"),
        ('{"a": 1}', "別のバージョン"),
        ("7", "別のバージョン"),
        ("garbage", "読めません"),
    ],
)
def test_a_file_of_another_version_or_with_garbage_is_refused_untouched(tmp_path, line, words):
    path = tmp_path / "r.jsonl"
    first, *rest = finish(path).splitlines()
    path.write_text("\n".join([first, line, *rest]) + "\n")
    before = path.read_bytes()
    with pytest.raises(UserError, match=words):
        Results(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["r.jsonl"]


def test_the_mirror_gets_every_result_and_gives_them_to_a_fresh_machine(tmp_path):
    mirror = tmp_path / "drive"
    run_plan(make_plan(RATES)[:2], Results(tmp_path / "a" / "r.jsonl", mirror), FakeWorkshop())
    assert (mirror / "r.jsonl").read_bytes() == (tmp_path / "a" / "r.jsonl").read_bytes()
    workshop = FakeWorkshop()
    run_plan(make_plan(RATES), Results(tmp_path / "b" / "r.jsonl", mirror), workshop)
    assert workshop.measured == [(0.3, 42)]
    assert len((mirror / "r.jsonl").read_text().splitlines()) == 3


def test_a_mirror_that_fails_stops_nothing_and_is_tried_again(tmp_path, capsys):
    (tmp_path / "drive").write_text("")  # a file, where a folder should be
    plan = make_plan(RATES)
    results = Results(tmp_path / "r.jsonl", tmp_path / "drive")
    outcomes = run_plan(plan[:2], results, FakeWorkshop())
    assert [record["status"] for _, record in outcomes] == ["ok", "ok"]
    assert capsys.readouterr().out.count("コピーできませんでした") == 2
    (tmp_path / "drive").unlink()
    run_plan(plan, results, FakeWorkshop())
    assert (tmp_path / "drive" / "r.jsonl").read_bytes() == (tmp_path / "r.jsonl").read_bytes()


def read_experiment_notebook():
    """Return (the parameters, the sources of the cells that ask for runs)."""
    cells = nbformat.read(ROOT / "dpo_training_experiment.ipynb", as_version=4).cells
    (given,) = (cell for cell in cells if "parameters" in cell.metadata.get("tags", []))
    asking = [cell.source for cell in cells if cell.cell_type == "code" and " = compare(" in cell.source]
    values = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(given.source).body}
    return values, asking


def list_runs(parameters, sources):
    """Return the plans that the notebook's own cells ask for, by the name that each result gets."""
    plans = {}
    for source in sources:
        (assignment,) = (node for node in ast.parse(source).body if isinstance(node, ast.Assign))

        def compare(settings, **changes):
            common = {"model_name": parameters["MODEL_NAME"]} | parameters["COMMON"] | changes
            return make_plan(settings, common, parameters["SEEDS"])

        scope = dict(parameters) | {"compare": compare}
        plans[assignment.targets[0].id] = eval(ast.unparse(assignment.value), scope)
    return plans


def test_the_experiment_notebook_asks_for_runs_that_can_be_done():
    parameters, sources = read_experiment_notebook()
    plans = list_runs(parameters, sources)
    assert len(plans) == 9 and all(len(plan) >= 2 * len(parameters["SEEDS"]) for plan in plans.values())
    assert {e.config.model_name for e in plans["sizes"]} == set(parameters["MODEL_SIZES"])
    assert {e.variation.label_noise for e in plans["noise"]} == set(parameters["NOISE_SHARES"])


def test_the_smallest_form_changes_only_what_the_experiment_notebook_has():
    parameters, sources = read_experiment_notebook()
    small = yaml.safe_load((ROOT / "tests" / "experiment_parameters.yaml").read_text())
    assert set(small) <= set(parameters)
    plans = list_runs(parameters | small, sources)
    runs = {experiment.identity for plan in plans.values() for experiment in plan}
    assert len(runs) <= 25 and all(e.config.num_samples <= 100 for e in plans["rates"])


def test_a_setting_is_a_configuration_of_the_main_notebook():
    (experiment,) = make_plan([{"beta": 0.3}], {"learning_rate": 1e-3, "training_rows": 5})
    assert experiment.config == RunConfig(beta=0.3, learning_rate=1e-3)
    assert experiment.variation == Variation(training_rows=5)
