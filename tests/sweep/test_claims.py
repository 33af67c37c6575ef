"""The notebook's conclusions: each stands in the prose, can be checked in the full grid, and is what the
committed results say.
"""

import ast
import json
from pathlib import Path

import nbformat
import pytest
import yaml

from dpo_helpers.sweep.claims import CLAIMS, list_claims
from dpo_helpers.sweep.plan import make_plan
from dpo_helpers.sweep.plots import plot_bars, plot_frontier, plot_heat_map, plot_lines
from dpo_helpers.sweep.results import Results
from dpo_helpers.sweep.tables import check_claim, describe_claims, read_metric

ROOT = Path(__file__).parent.parent.parent
CELLS = nbformat.read(ROOT / "dpo_training_experiment.ipynb", as_version=4).cells
FULL = yaml.safe_load((ROOT / "tests" / "experiment_full.yaml").read_text())
COMMITTED = ROOT / "tests" / "fixtures" / "experiments" / "results.jsonl"


def read_parameters(changes=()):
    (cell,) = (cell for cell in CELLS if "parameters" in cell.metadata.get("tags", []))
    return {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(cell.source).body} | dict(
        changes
    )


def run_cell(marker, scope):
    """Run the one cell that holds a marker; return what `compare` was asked for: [(settings, changes)]."""
    asked = []
    scope |= {
        "compare": lambda settings, **changes: asked.append((settings, changes)),
        "injected": lambda name, default: default,
    }
    scope |= {
        name: lambda *_, **__: None for name in ("plot_heat_map", "plot_frontier", "plot_bars", "plot_lines")
    }
    (cell,) = (
        cell
        for cell in CELLS
        if cell.cell_type == "code"
        and "helpers" not in cell.metadata.get("tags", [])
        and marker in cell.source
    )
    exec(cell.source, scope)
    return asked


def read_common(parameters):
    scope = dict(parameters)
    run_cell("common = {", scope)
    return scope["common"]


# The cells of each section that train.
RUNS = {
    1: ["rates ="],
    2: ["betas ="],
    3: ["losses ="],
    4: ["amounts =", "noise ="],
    5: ["kinds ="],
    6: ["sizes ="],
    7: ["warm_ups ="],
}


def list_plans(parameters):
    """Return {section: plan} of sections 1 to 7, and 8: that of the form, as the notebook's own cells ask
    for them.
    """
    common, plans = read_common(parameters), {}
    for section, markers in {**RUNS, 8: ["mine ="]}.items():
        asked = [entry for marker in markers for entry in run_cell(marker, dict(parameters))]
        plans[section] = [
            e
            for settings, changes in asked
            for e in make_plan(settings, common | changes, parameters["SEEDS"])
        ]
    return plans


def test_every_claim_stands_in_the_prose_of_its_section_and_in_no_other():
    for section in RUNS:
        (prose,) = (
            CELLS[i - 1].source
            for i, cell in enumerate(CELLS)
            if cell.cell_type == "code" and f"show_claims({section}, " in cell.source
        )
        assert (
            [line[2:] for line in prose.splitlines() if line.startswith("- ")]
            == [claim.text for claim in list_claims(section)]
            != []
        )


@pytest.mark.parametrize("changes", [{}, FULL])
def test_the_notebook_runs_what_its_claims_compare(changes):
    parameters = read_parameters(changes)
    assert set(changes) <= set(read_parameters())
    plans = list_plans(parameters)
    for claim in CLAIMS:
        settings = [dict(experiment.setting) for experiment in plans[claim.section]]
        assert claim.first in settings and claim.second in settings, claim.text
    if not changes:
        assert len({experiment.identity for plan in plans.values() for experiment in plan}) <= 60
    else:
        assert len(parameters["SEEDS"]) >= 3


def test_the_smallest_form_changes_only_what_exists():
    small = yaml.safe_load((ROOT / "tests" / "experiment_parameters.yaml").read_text())
    assert set(small) <= {*read_parameters(), "MY_SETTINGS"}


def make_outcomes(claim, gap):
    """Three seeds of both sides of a claim, the second one apart from the first by about `gap` in the
    claimed direction.
    """
    sign = 1 if claim.direction == "higher" else -1
    outcomes = []
    for side, (setting, metric) in enumerate(
        ((claim.first, claim.first_metric or claim.metric), (claim.second, claim.metric))
    ):
        for seed in (42, 43, 44):
            metrics = value = {}
            *path, last = metric.split(".")
            for name in path:
                value = value.setdefault(name, {})
            value[last] = seed / 100 + side * sign * (gap + seed / 1000)
            outcomes.append(
                (make_plan([setting], seeds=[seed])[0], {"status": "ok", "reason": "", "metrics": metrics})
            )
    return outcomes


@pytest.mark.parametrize(
    "claim", CLAIMS, ids=lambda claim: f"{claim.section}-{claim.metric}-{claim.direction}"
)
def test_a_claim_is_told_from_its_opposite(claim):
    assert check_claim(claim, make_outcomes(claim, 0.5))[0] == "yes"
    assert check_claim(claim, make_outcomes(claim, -0.5))[0] == "no"
    assert check_claim(claim, make_outcomes(claim, -0.043))[0] == "unclear"
    assert describe_claims([claim], make_outcomes(claim, 0.5))[0]["この結果では"] == "その通り"


def read_committed_outcomes():
    """Return {section: outcomes} of the committed full results; sections without any before they exist."""
    records = Results(COMMITTED).records
    return {
        section: [(experiment, records[experiment.identity]) for experiment in plan if section < 8]
        for section, plan in list_plans(read_parameters(FULL)).items()
    }


def test_every_claim_is_what_the_committed_results_say():
    outcomes = read_committed_outcomes()
    verdicts = {claim.text: check_claim(claim, outcomes[claim.section]) for claim in CLAIMS}
    assert {text: verdict for text, verdict in verdicts.items() if verdict[0] != "yes"} == {}


def make_grid_outcomes(settings, metrics):
    return [
        (experiment, {"status": "ok", "reason": "", "metrics": json.loads(json.dumps(metrics))})
        for experiment in make_plan(settings)
    ]


def test_the_pictures_show_every_number_in_japanese_without_a_missing_glyph(recwarn):
    metrics = {"held_out": {"loss": 0.5, "accuracy": 0.75, "log_ratio": 2.0}, "distance": 0.25}
    grid = make_grid_outcomes({"learning_rate": [1e-4, 1e-2], "lora_scale": [2.0, 16.0]}, metrics)
    grid[3][1]["metrics"] = {}
    heat_map = plot_heat_map(grid, "learning_rate", "lora_scale")
    texts = [text.get_text() for text in heat_map.axes[0].texts]
    assert texts.count("0.50") == 3 and texts.count("壊れた") == 1
    bars = plot_bars(grid, ["held_out.loss", "held_out.accuracy"])
    assert [len(axis.patches) for axis in bars.axes] == [3, 3] and bars.axes[0].texts[-1].get_text() == "なし"
    frontier = plot_frontier(make_grid_outcomes({"beta": [0.1, 1.0]}, metrics))
    assert [tuple(point) for point in frontier.axes[0].lines[0].get_xydata()] == [(0.25, 2.0)] * 2
    noise = make_grid_outcomes({"label_noise": [0.0, 0.4], "loss_type": ["sigmoid", "robust"]}, metrics)
    lines = plot_lines(noise, "label_noise", "held_out.loss", by="loss_type")
    assert [text.get_text() for text in lines.axes[0].get_legend().get_texts()] == [
        "ln 2（学習前）",
        "sigmoid",
        "robust",
    ]
    for figure in (heat_map, bars, frontier, lines):
        assert figure._repr_png_()[:4] == b"\x89PNG"
    assert not [str(warning.message) for warning in recwarn if "lyph" in str(warning.message)]
    assert read_metric(noise[0][1], "held_out.nothing") is None
