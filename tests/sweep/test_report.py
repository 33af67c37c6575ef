"""What is said of an experiment: intervals, differences paired by seed, a recommendation, pictures."""

import math

import pytest

from dpo_helpers.config import RunConfig
from dpo_helpers.sweep.plan import make_plan
from dpo_helpers.sweep.report import (
    METRICS,
    RIGHT,
    collect_answers,
    compare,
    estimate,
    plot_bars,
    plot_lines,
    read_metric,
    recommend,
    save_recommendation,
    say_differences,
    summarize_outcomes,
)


def nest(path, value):
    """Return {"a": {"b": value}} for "a.b"."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def make_outcomes(values, metric="held_out.loss", more=None):
    """Outcomes of one knob: {beta: [the metric of each of the seeds 1, 2, 3]}."""
    outcomes = []
    for beta, of_seeds in values.items():
        for seed, value in enumerate(of_seeds, start=1):
            (experiment,) = make_plan([{"beta": beta}], seeds=[seed])
            metrics = nest(metric, value) | (more(beta) if more else {})
            outcomes.append((experiment, {"status": "ok", "reason": "", "metrics": metrics}))
    return outcomes


def test_the_interval_worked_by_hand():
    """Three values 1, 2, 3: mean 2, s = 1, t(2) = 4.3027, half width 4.3027 / sqrt(3) = 2.4841."""
    assert estimate([1.0, 2.0, 3.0]) == (
        2.0,
        pytest.approx(-0.4841, abs=1e-4),
        pytest.approx(4.4841, abs=1e-4),
    )
    assert estimate([1.0, 2.0, 3.0], low=0.0, high=4.0)[1:] == (0.0, 4.0)
    two = estimate([1.0, 3.0])
    assert two.mean == 2 and not two.has_interval and math.isnan(two.high)


def test_two_settings_are_compared_seed_by_seed():
    outcomes = make_outcomes({0.1: [1.0, 2.0, 4.0, 9.0], 0.5: [2.0, 4.0, 7.0]})
    found = compare(outcomes, {"beta": 0.1}, {"beta": 0.5}, "held_out.loss")
    assert found == (2.0, pytest.approx(-0.4841, abs=1e-4), pytest.approx(4.4841, abs=1e-4))
    assert compare(outcomes, {"beta": 0.1}, {"beta": 0.7}, "held_out.loss") is None


@pytest.mark.parametrize(
    ("path", "second", "words"),
    [
        ("held_out.loss", [0.5, 0.61, 0.7], "差 -0.10（95 % 区間 -0.11〜-0.08）。良くなりました。"),
        ("held_out.loss", [0.7, 0.81, 0.9], "差 +0.10（95 % 区間 +0.09〜+0.12）。悪くなりました。"),
        ("held_out.accuracy", [0.7, 0.81, 0.9], "差 +10%（95 % 区間 +9%〜+12%）。良くなりました。"),
        ("held_out.accuracy", [0.5, 0.61, 0.7], "差 -10%（95 % 区間 -11%〜-8%）。悪くなりました。"),
        ("held_out.loss", [0.5, 0.8, 0.7], "区間が 0 を含むので、変わったとも変わらないとも言えません。"),
        ("held_out.loss", [0.5, 0.6], "乱数シードが 3 つより少ないので、偶然かどうかは言えません。"),
    ],
)
def test_a_difference_is_said_only_where_its_interval_leaves_out_zero(path, second, words):
    text = say_differences(make_outcomes({0.1: [0.6, 0.7, 0.8], 0.5: second}, path))
    assert text.startswith(f"・β 0.5（β 0.1と比べて）：{METRICS[path].name}は差 ") and text.endswith(words)


def test_nothing_is_said_of_a_setting_without_a_result():
    outcomes = make_outcomes({0.1: [0.6, 0.7, 0.8], 0.5: [None, None, None]})
    assert say_differences(outcomes) == ""
    assert read_metric({"metrics": {}}, "held_out.loss") is None


def make_writing_outcomes(values):
    """{beta: (the shares of right answers, the loss)}."""
    shares = {beta: right for beta, (right, _) in values.items()}
    return make_outcomes(shares, RIGHT, lambda beta: nest("held_out.loss", values[beta][1]))


def test_the_recommendation_takes_the_lowest_loss_of_what_writes_no_worse():
    values = {
        0.1: ([0.80, 0.82, 0.81], 0.6),
        0.2: ([0.78, 0.84, 0.80], 0.5),  # its interval reaches 0.81
        0.3: ([0.30, 0.31, 0.32], 0.1),  # the lowest loss, and the writing is broken
        0.4: ([None, None, None], 0.0),  # NaN: nothing was written
    }
    setting, reason = recommend(make_writing_outcomes(values))
    assert setting == {"beta": 0.2}
    assert "2 通りのうち" in reason and "比べた設定は 3 通り" in reason


def test_without_three_seeds_or_a_second_setting_nothing_is_recommended():
    few = {0.1: ([0.8, 0.9], 0.6), 0.2: ([0.7, 0.8], 0.5)}
    alone = {0.1: ([0.8, 0.9, 0.8], 0.6)}
    for values in (few, alone):
        setting, reason = recommend(make_writing_outcomes(values))
        assert setting is None and "おすすめはありません" in reason


def test_the_recommended_file_is_one_of_the_main_notebook(tmp_path):
    common = {"learning_rate": 1e-3, "training_rows": 5, "beta": 9.0}
    path = tmp_path / "best.json"
    text = save_recommendation(path, common, [{"beta": 0.2}, None], "embedded")
    assert RunConfig.load(path) == RunConfig(learning_rate=1e-3, beta=0.2)
    assert "embedded で見つけた" in text and "・beta: 0.1 → 0.2" in text
    assert "書きませんでした" in save_recommendation(tmp_path / "none.json", common, [None], "embedded")
    assert [each.name for each in tmp_path.iterdir()] == ["best.json"]


def test_a_table_has_a_line_for_each_setting_with_what_went_wrong():
    outcomes = make_outcomes({0.1: [0.5, 0.5, 0.5], 0.2: [0.4]})
    outcomes[3][1].update(status="nan", reason="ステップ 3 の次で", metrics={})
    first, second = summarize_outcomes(outcomes, ["held_out.loss"])
    assert first == {"設定": "β 0.1", "回数": 3, "評価用の損失": "0.50（0.50〜0.50）", "問題": ""}
    assert second == {"設定": "β 0.2", "回数": 0, "評価用の損失": "－", "問題": "ステップ 3 の次で"}


def test_answers_stand_side_by_side():
    outcomes = make_outcomes({0.1: [1.0], 0.5: [1.0]})
    for (_, record), answer in zip(outcomes, ("短い", "長い答え"), strict=True):
        record["metrics"]["shown"] = [{"question": "問い", "answer": answer}]
    assert collect_answers(outcomes) == [{"質問": "問い", "β 0.1": "短い", "β 0.5": "長い答え"}]


def test_the_pictures_show_every_number_in_japanese_without_a_missing_glyph(recwarn):
    outcomes = make_outcomes(
        {0.1: [0.5, 0.5, 0.5], 1.0: [0.25, 0.25, 0.25], 2.0: [None]}, "held_out.accuracy"
    )
    bars = plot_bars(outcomes, ["held_out.accuracy", "held_out.loss"], "見分ける力")
    accuracy, loss = bars.axes
    assert [text.get_text() for text in accuracy.texts] == ["50%", "25%", "なし"]
    assert [text.get_text() for text in loss.texts] == ["なし"] * 3
    assert accuracy.get_title() == METRICS["held_out.accuracy"].name and accuracy.get_xlabel() == "β"
    lines = plot_lines(outcomes, "beta", ["held_out.accuracy"], "β を大きくする", log_x=True)
    (axis,) = lines.axes
    assert [tuple(point) for point in axis.lines[0].get_xydata()] == [(0.1, 0.5), (1.0, 0.25)]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["正解率"]
    for figure in (bars, lines):
        assert figure._repr_png_()[:4] == b"\x89PNG"
    assert not [str(warning.message) for warning in recwarn if "lyph" in str(warning.message)]
