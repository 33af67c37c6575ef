"""The rules of the verdict on made figures, one change at a time, and on the recorded runs."""

import copy
import json
import math
from pathlib import Path

import pytest

from dpo_helpers.judge.verdict import LABEL_NAMES, RULES, collect_facts, describe_verdict, judge

RECORDED = Path(__file__).parent.parent / "fixtures" / "verdict"


def write_summary(right, manners=0.0, questions=150, **changes):
    summary = {"questions": questions, "right": right, "names": 1.0, "ends": 1.0, "loops": 0.0, "japanese": 1.0,
               "manners": manners, "interval": {"right": [0, 1], "manners": [0, 1]}}  # fmt: skip
    return summary | changes


def write_change(right=0.0, manners=0.0, half=0.04):
    return {
        "right": [right, right - half, right + half],
        "manners": [manners, manners - half, manners + half],
    }


def make_metrics():
    """A healthy run without a warm-up: it tells apart, its writing is right, and its manners got better."""
    roles = {
        "base": {"greedy": write_summary(0.94), "sampled": write_summary(0.4, 0.25)},
        "policy": {"greedy": write_summary(0.93), "sampled": write_summary(0.6, 0.01)},
    }
    return {
        "first_loss": math.log(2),
        "final_train_loss": 0.2,
        "held_out": {"rows": 300, "loss": 0.25, "accuracy": 0.93, "accuracy_interval": [0.895, 0.954], "margin": 2.0,
                     "chosen_log_prob_change": 1.0, "rejected_log_prob_change": -12.0},
        "discrimination": {"accuracy": 0.93, "interval": [0.895, 0.954], "best_rule": "usual_length",
                           "best_rule_accuracy": 0.6},
        "writing": {"new_concept": copy.deepcopy(roles), "new_wording": copy.deepcopy(roles)},
        "writing_change": {
            "base": {"greedy": write_change(-0.01), "sampled": write_change(0.2, -0.24)},
        },
    }  # fmt: skip


def make_log(loss=0.2, **last):
    lines = [{"step": step, "loss": loss, "grad_norm": 1.0, "rewards/margins": 1.0, "rewards/accuracies": 0.9,
              "logps/chosen": -40.0, "logps/rejected": -60.0} for step in (1, 50, 100)]  # fmt: skip
    return lines[:-1] + [lines[-1] | last]


def change(path, value, metrics=None):
    metrics = metrics or make_metrics()
    *way, last = path.split(".")
    place = metrics
    for name in way:
        place = place[name]
    place[last] = value
    return metrics


def label(metrics, log=None):
    return judge(metrics, make_log() if log is None else log)["label"]


def with_warm_up(right=0.0, manners=0.0):
    metrics = make_metrics()
    for roles in metrics["writing"].values():
        roles["warm_up"] = copy.deepcopy(roles["policy"])
    metrics["writing_change"]["warm_up"] = {"greedy": write_change(right, manners), "sampled": write_change()}
    return metrics


def test_a_healthy_run_has_learned_both_abilities():
    verdict = judge(make_metrics(), make_log())
    assert verdict["label"] == "learned" and verdict["headline"] == "学習できました"
    text = describe_verdict(verdict)
    assert "見分ける：評価用 300 行の正解率は 93.0%（95 % 区間 89.5%〜95.4%）" in text
    assert "書く：新しい概念 150 問で、正しい回答は ベース 94% → DPO 後 93%" in text and "次の一手：" in text


def test_a_high_accuracy_over_answers_that_are_not_right_is_not_learning():
    metrics = make_metrics()
    for roles in metrics["writing"].values():
        roles["policy"]["greedy"]["right"] = 0.05
    assert label(metrics) == "discriminates_only"
    # one kind of unseen question is enough: where the base knew nothing, new concepts cannot be right
    metrics["writing"]["new_wording"]["policy"]["greedy"]["right"] = 0.5
    assert label(metrics) == "learned"


@pytest.mark.parametrize(("low", "expected"), [(0.59, "undecided"), (0.601, "learned")])
def test_a_rule_of_text_that_does_as_well_is_the_first_sentence(low, expected):
    verdict = judge(change("held_out.accuracy_interval", [low, 0.954]), make_log())
    assert verdict["label"] == expected
    if expected == "undecided":
        assert verdict["reasons"][0].startswith(
            "「いつもの長さに近いほうを選ぶ」という単純な規則だけで 60.0%"
        )


@pytest.mark.parametrize(
    ("right", "half", "expected"), [(-0.05, 0.04, "learned"), (-0.05, 0.06, "harmed"), (-0.2, 0.05, "harmed")]
)
def test_writing_that_got_worse_is_harm_by_the_lower_end_of_its_interval(right, half, expected):
    metrics = make_metrics()
    metrics["writing_change"]["base"]["greedy"] = write_change(right, half=half)
    assert label(metrics) == expected


def test_manners_that_got_worse_are_harm_too():
    metrics = make_metrics()
    metrics["writing_change"]["base"]["greedy"] = write_change(
        0.0, manners=+0.1, half=0.04
    )  # more bad manners
    verdict = judge(metrics, make_log())
    assert (
        verdict["label"] == "harmed" and "良い書き方の差 -10%、95 % 区間 -14%〜-6%" in verdict["reasons"][0]
    )


def test_harm_is_held_against_the_warm_up_where_there_was_one():
    metrics = with_warm_up(right=-0.3)
    metrics["writing_change"]["base"]["greedy"] = write_change(+0.4)
    assert label(metrics) == "harmed"


def test_what_dpo_added_to_the_warm_up_is_a_sentence_and_nothing_is_said_in_the_headline():
    verdict = judge(with_warm_up(), make_log())
    assert verdict["headline"] == "学習できました（教師あり学習の成果です。DPO は書き方を変えていません）"
    assert any(
        reason.startswith("教師あり学習のあとに DPO が加えた差：正しい回答 +0%")
        for reason in verdict["reasons"]
    )
    assert judge(with_warm_up(manners=-0.2), make_log())["headline"] == "学習できました"


def test_nothing_better_than_the_base_is_no_success():
    metrics = make_metrics()
    metrics["writing_change"]["base"] = {"greedy": write_change(), "sampled": write_change(0.03, -0.03)}
    assert label(metrics) == "discriminates_only"
    for way, measure, value in (
        ("greedy", "right", 0.1),
        ("sampled", "right", 0.1),
        ("sampled", "manners", -0.1),
    ):
        better = copy.deepcopy(metrics)
        better["writing_change"]["base"][way][measure] = [value, value - 0.04, value + 0.04]
        assert label(better) == "learned"


def test_own_rows_are_held_against_manners():
    metrics = make_metrics()
    metrics["writing"] = {"held_out": metrics["writing"]["new_concept"]}
    metrics["writing"]["held_out"]["policy"]["greedy"] |= {"right": 0.1, "manners": 0.3}
    assert label(metrics) == "learned"
    metrics["writing"]["held_out"]["policy"]["greedy"]["manners"] = 0.31
    assert label(metrics) == "discriminates_only"


@pytest.mark.parametrize(("questions", "expected"), [(19, "undecided"), (20, "learned")])
def test_fewer_than_forty_questions_decide_nothing(questions, expected):
    metrics = make_metrics()
    for roles in metrics["writing"].values():
        roles["policy"]["greedy"]["questions"] = questions
    assert label(metrics) == expected


def test_nan_is_a_collapse_and_a_single_overflow_is_not():
    assert label(change("held_out.loss", math.nan)) == "collapsed"
    assert label(make_metrics() | {"stopped": {"reason": "nan", "step": 3}}) == "collapsed"
    assert label(make_metrics(), make_log(grad_norm=math.inf)) == "learned"
    assert label(make_metrics(), [line | {"grad_norm": math.nan} for line in make_log()]) == "collapsed"


@pytest.mark.parametrize("measure", ["loops", "ends", "japanese"])
def test_answers_that_lost_their_form_are_a_collapse(measure):
    metrics = make_metrics()
    metrics["writing"]["new_concept"]["policy"]["greedy"][measure] = 0.3 if measure == "loops" else 0.7
    assert label(metrics) == "collapsed"
    metrics["writing"]["new_concept"]["base"]["greedy"][measure] = 0.3 if measure == "loops" else 0.7
    assert label(metrics) == "learned"  # the base wrote no better


def test_equal_texts_leave_nothing_to_compare():
    log = [line | {"logps/rejected": line["logps/chosen"]} for line in make_log()]
    assert "同じ文章" in judge(make_metrics(), log)["reasons"][0]


@pytest.mark.parametrize(
    ("loss", "expected"),
    [(0.5, "learned"), (0.6, "undertrained"), (0.69, "undertrained"), (0.71, "undecided")],
)
def test_how_far_the_held_out_loss_came(loss, expected):
    metrics = change("final_train_loss", loss, change("held_out.loss", loss))
    if loss > 0.7:
        metrics["held_out"]["accuracy_interval"] = [0.4, 0.6]
    assert label(metrics, make_log(loss)) == expected


def test_the_gap_between_training_and_held_out_is_overfitting():
    assert label(change("held_out.loss", 0.51)) == "overfitted"
    assert label(change("held_out.loss", 0.49)) == "learned"


def test_divergence_and_chance():
    assert label(change("final_train_loss", 1.0)) == "collapsed"
    assert label(change("held_out.accuracy_interval", [0.49, 0.6])) == "undecided"


def test_a_stopped_run_and_a_run_without_measures_are_told_so():
    assert "途中で止まって" in judge({"stopped": {"reason": "interrupted"}}, make_log())["reasons"][0]
    assert "評価がない" in judge({}, make_log())["reasons"][0]
    assert "記録がありません" in judge({}, [])["reasons"][0]


def test_both_log_probs_falling_is_explained_and_weak_kinds_are_named():
    metrics = change("held_out.chosen_log_prob_change", -3.0)
    metrics["by_rejection_kind"] = [
        {"rejection_kind": "off_form", "rows": 75, "accuracy": 0.52},
        {"rejection_kind": "vague", "rows": 30, "accuracy": 1.0},
    ]
    reasons = "".join(judge(metrics, make_log())["reasons"])
    assert "どちらも DPO の前より下がっています" in reasons and "質問とずれている（52%）" in reasons


def test_every_rule_has_a_label_and_its_text_can_be_filled():
    facts = collect_facts(with_warm_up(), make_log())
    for rule in RULES:
        assert rule.label in LABEL_NAMES and rule.next_step
        rule.reason.format(**facts)


# What a reader of each recorded run's answers would say of it.
EXPECTED = {path.stem: json.loads(path.read_text())["expected"] for path in sorted(RECORDED.glob("*.json"))}


@pytest.mark.parametrize("name", EXPECTED)
def test_recorded_runs_are_judged_rightly(name):
    recorded = json.loads((RECORDED / f"{name}.json").read_text())
    assert judge(recorded["metrics"], recorded["log_history"])["label"] == recorded["expected"]
