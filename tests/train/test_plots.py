import math
import warnings
from xml.etree import ElementTree

import pytest

from dpo_helpers.train.plots import make_panels, plot_training, read_curve


def make_log(losses):
    """Training and held-out lines of a run with beta 0.1: an answer's log-prob drifts by 10 × its reward,
    in nats.
    """
    log = []
    for step, loss in enumerate(losses, start=1):
        log.append(
            {
                "step": step,
                "loss": loss,
                "rewards/accuracies": 0.75,
                "rewards/margins": 0.3 * step,
                "rewards/chosen": -0.1 * step,
                "rewards/rejected": -0.4 * step,
            }
        )
        log.append({f"eval_{key}": value for key, value in log[-1].items() if key != "step"} | {"step": step})
    return [*log, {"step": len(losses), "train_runtime": 1.0, "train_loss": 0.5}]


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing glyph is a warning
        yield


def lines_of(axis):
    return {line.get_label(): list(line.get_ydata()) for line in axis.lines}


def test_the_plot_has_four_panels_in_japanese_with_every_glyph_as_png_and_svg(tmp_path):
    figure = plot_training(make_log([0.69, 0.6, 0.5]), tmp_path / "training.png", beta=0.1)
    assert [axis.get_ylabel() for axis in figure.axes] == [
        "損失",
        "正解率",
        "β × 対数確率比の差（nat）",
        "対数確率の変化（nat）",
    ]
    assert all(axis.get_title() and axis.get_xlabel() == "ステップ" for axis in figure.axes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["training.png", "training.svg"]
    assert (tmp_path / "training.png").read_bytes()[:4] == b"\x89PNG" and (
        tmp_path / "training.png"
    ).stat().st_size > 20_000
    ElementTree.parse(tmp_path / "training.svg")


def test_training_and_held_out_stand_beside_the_values_before_training():
    loss, accuracy, margin, drift = plot_training(make_log([0.69, 0.5]), beta=0.1).axes
    assert lines_of(loss) == {
        "学習用": [0.69, 0.5],
        "評価用": [0.69, 0.5],
        "ln 2（学習前）": [math.log(2)] * 2,
    }
    assert lines_of(accuracy) == {
        "学習用": [0.75, 0.75],
        "評価用": [0.75, 0.75],
        "0.5（当てずっぽう）": [0.5, 0.5],
    }
    assert lines_of(margin)["評価用"] == [0.3, 0.6]
    assert lines_of(drift)["良い回答（評価用）"] == pytest.approx([-1.0, -2.0])
    assert lines_of(drift)["悪い回答（学習用）"] == pytest.approx([-4.0, -8.0])


def test_without_beta_the_drift_keeps_trls_unit_and_says_so():
    drift = plot_training(make_log([0.69])).axes[3]
    assert (
        lines_of(drift)["良い回答（学習用）"] == [-0.1] and drift.get_ylabel() == "β × 対数確率の変化（nat）"
    )


def test_the_accuracy_before_training_is_a_tie_and_not_an_error():
    log = [
        {"step": 1, "rewards/accuracies": 0.0, "rewards/margins": 0.0},
        {"step": 5, "rewards/accuracies": 0.0, "rewards/margins": -0.2},
    ]
    steps, values = read_curve(log, "rewards/accuracies")
    assert steps == [1, 5] and math.isnan(values[0]) and values[1] == 0.0
    assert read_curve(log, "rewards/margins") == ([1, 5], [0.0, -0.2])


@pytest.mark.parametrize(
    "log",
    [
        [],
        [entry for entry in make_log([0.69, 0.5]) if "eval_loss" not in entry],
        make_log([0.69, math.nan, math.inf, 0.4]),
        make_log([math.nan]),
        [{"step": 1, "loss": 0.69}],
    ],
    ids=["empty", "without held-out", "NaN within", "NaN alone", "loss alone"],
)
def test_a_log_with_little_in_it_is_drawn_as_well(log, tmp_path):
    plot_training(log, tmp_path / "training")
    assert (tmp_path / "training.png").is_file() and (tmp_path / "training.svg").is_file()


def test_a_notebook_shows_the_figure_once_and_pyplot_keeps_none():
    import matplotlib.pyplot as plt

    figure = plot_training(make_log([0.69, 0.5]))
    assert figure._repr_png_()[:4] == b"\x89PNG"
    assert plt.get_fignums() == []


def test_curves_of_a_panel_differ_in_more_than_their_colour():
    for stage in ("sft", "dpo"):
        for panel in make_panels(stage, 0.1):
            for color in {curve.color for curve in panel.curves}:
                markers = [curve.marker for curve in panel.curves if curve.color == color]
                assert len(markers) == len(set(markers))
