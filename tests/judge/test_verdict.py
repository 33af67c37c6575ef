import copy
import json
import math
from argparse import ArgumentParser
from pathlib import Path

import pytest

from dpo_helpers.config import RunConfig
from dpo_helpers.errors import UserError
from dpo_helpers.judge.measure import add_judge_arguments, judge_folder, run_judge
from dpo_helpers.judge.verdict import LABEL_NAMES, RULES, describe_verdict, judge

RECORDED = Path(__file__).parent.parent / "fixtures" / "verdict"
LN_2 = math.log(2)
BEFORE = {
    "answers": 40,
    "repetition": 0.05,
    "distinct_2": 0.6,
    "mean_length": 27.0,
    "ends": 0.95,
    "japanese": 0.95,
    "chrf": 9.0,
}
HEALTHY = {
    "held_out": {
        "rows": 200,
        "loss": 0.3,
        "accuracy": 0.9,
        "margin": 1.8,
        "chosen_log_prob_change": -3.0,
        "rejected_log_prob_change": -12.0,
    },
    "baselines": {
        "longer": 0.5,
        "shorter": 0.5,
        "base_log_prob_sum": 0.4,
        "base_log_prob_mean": 0.45,
        "shuffled_labels": 0.95,
    },
    "by_rejection_kind": [
        {"rejection_kind": "rude", "rows": 30, "loss": 0.2, "accuracy": 0.9, "margin": 2.0}
    ],
    "generation": {
        "before": BEFORE,
        "after": BEFORE | {"chrf": 12.0},
        "chosen": BEFORE
        | {"repetition": 0.0, "distinct_2": 0.7, "ends": 1.0, "japanese": 1.0, "chrf": 100.0},
    },
    "reference_distance": 0.2,
}


def make_log(
    loss=0.25,
    margin=1.8,
    evaluated=(LN_2, 0.3),
    chosen=(-60.0, -62.0),
    side_difference=10.0,
    gradients=(1.0, 1.0),
) -> list[dict]:
    """A log of steps 1 and 100: the last loss and margin, the held-out curve, its chosen log-probs, the
    gradients.
    """
    log = []
    for step, value, gain, gradient in ((1, LN_2, 0.0, gradients[0]), (100, loss, margin, gradients[-1])):
        log.append(
            {
                "step": step,
                "loss": value,
                "grad_norm": gradient,
                "rewards/margins": gain,
                "rewards/accuracies": 0.9,
                "rewards/chosen": -0.3,
                "rewards/rejected": -0.3 - gain,
                "logps/chosen": -50.0,
                "logps/rejected": -50.0 - side_difference,
            }
        )
    for step, (value, log_prob) in enumerate(zip(evaluated, chosen, strict=True)):
        log.append(
            {
                "step": step,
                "eval_loss": value,
                "eval_rewards/margins": 1.0,
                "eval_rewards/accuracies": 0.9,
                "eval_logps/chosen": log_prob,
                "eval_logps/rejected": -80.0,
            }
        )
    return log


def change(**changes) -> dict:
    """HEALTHY with some values replaced, named as held_out__loss or generation__after__ends."""
    metrics = copy.deepcopy(HEALTHY)
    for name, value in changes.items():
        *path, last = name.split("__")
        part = metrics
        for key in path:
            part = part[key]
        part[last] = value
    return metrics


def decide(metrics: dict, **log) -> tuple[str, str]:
    """The label and the first word of the next step, which is the knob."""
    verdict = judge(metrics, make_log(**log))
    return verdict["label"], verdict["next_step"].split(" ")[0]


# --- every rule, on both sides of its threshold ---


def test_a_healthy_run_has_learned():
    verdict = judge(HEALTHY, make_log())
    assert verdict["label"] == "learned" and list(verdict) == ["label", "reasons", "next_step"]
    assert any("95 % 区間 85.1%〜93.4%" in reason for reason in verdict["reasons"])


def test_nan_is_a_collapse_and_a_single_overflow_is_not():
    nan = float("nan")
    assert decide(change(stopped={"reason": "nan", "step": 7, "stage": "dpo"}))[0] == "collapsed"
    assert judge({"stopped": {"reason": "nan", "step": 0, "stage": "sft"}}, [])["label"] == "collapsed"
    assert decide(HEALTHY, evaluated=(LN_2, nan)) == ("collapsed", "LEARNING_RATE")
    assert decide({}, gradients=(nan, nan))[0] == "collapsed"
    assert decide(HEALTHY, gradients=(float("inf"), 1.0))[0] == "learned"
    assert decide(change(held_out__loss=nan))[0] == "collapsed"


def test_equal_texts_leave_nothing_to_compare():
    stuck = change(held_out__loss=LN_2, held_out__accuracy=0.0)
    assert decide(stuck, loss=LN_2, margin=0.0, side_difference=0.009) == ("undecided", "DATA_FILE")
    assert decide(stuck, loss=LN_2, margin=0.0, side_difference=0.011) == ("undertrained", "LEARNING_RATE")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"repetition": 0.36}, "collapsed"),  # 0.05 before
        ({"repetition": 0.34}, "undertrained"),  # 0.0 in the chosen answers
        ({"repetition": 0.29}, "learned"),
        ({"ends": 0.64}, "collapsed"),  # 0.95 before
        ({"ends": 0.66}, "undertrained"),  # 1.0 in the chosen answers
        ({"ends": 0.71}, "learned"),
        ({"japanese": 0.64}, "collapsed"),
        ({"japanese": 0.66}, "undertrained"),
        ({"japanese": 0.71}, "learned"),
        ({"distinct_2": 0.11}, "collapsed"),  # 0.6 before
        ({"distinct_2": 0.13}, "learned"),
    ],
)
def test_answers_that_got_worse_are_a_collapse_and_bad_ones_are_not_learned(changes, expected):
    label, knob = decide(change(generation__after=BEFORE | changes))
    assert label == expected and knob == {"collapsed": "LEARNING_RATE", "undertrained": "SFT_EPOCHS"}.get(
        label, knob
    )


@pytest.mark.parametrize(("ends", "label"), [(0.44, "collapsed"), (0.46, "overfitted")])  # 0.95 before
def test_memorising_damages_answers_and_is_a_collapse_only_when_most_are_bad(ends, label):
    assert decide(change(generation__after=BEFORE | {"ends": ends}, held_out__loss=0.9), loss=0.1)[0] == label


def test_a_base_that_repeats_itself_needs_a_warm_up_unless_the_policy_went_far_away():
    loops = {
        "generation__before": BEFORE | {"repetition": 0.9},
        "generation__after": BEFORE | {"repetition": 0.9},
    }
    assert decide(change(**loops, reference_distance=0.99)) == ("undertrained", "SFT_EPOCHS")
    assert decide(change(**loops, reference_distance=1.01)) == ("collapsed", "LEARNING_RATE")


def test_answers_need_not_be_better_than_the_chosen_ones():
    english = {
        when: BEFORE | {"japanese": 0.0, "ends": 0.1, "repetition": 0.5}
        for when in ("before", "after", "chosen")
    }
    assert decide(change(generation=english))[0] == "learned"


def test_generation_without_the_chosen_answers_is_compared_with_perfect_ones():
    assert decide(change(generation={"before": BEFORE, "after": BEFORE}))[0] == "learned"
    bad = BEFORE | {"ends": 0.69}
    assert decide(change(generation={"before": bad, "after": bad})) == ("undertrained", "SFT_EPOCHS")


def test_held_out_figures_without_answers_do_not_show_that_it_learned():
    assert decide({"held_out": HEALTHY["held_out"]})[0] == "undecided"


def test_a_training_loss_above_that_of_knowing_nothing_has_diverged():
    assert decide(HEALTHY, loss=1.01) == ("collapsed", "LEARNING_RATE")
    assert decide(HEALTHY, loss=0.99)[0] == "learned"


def test_chosen_answers_that_became_much_less_likely_are_a_collapse():
    assert decide(HEALTHY, chosen=(-60.0, -78.1)) == ("collapsed", "LEARNING_RATE")
    assert decide(HEALTHY, chosen=(-60.0, -77.9))[0] == "learned"


def test_how_far_the_held_out_loss_came():
    steps = [judge(change(held_out__loss=loss), make_log(loss=0.6))["next_step"] for loss in (0.681, 0.679)]
    assert "10 倍" in steps[0] and "3 倍" in steps[1]
    assert decide(change(held_out__loss=0.601), loss=0.6)[0] == "undertrained"
    assert decide(change(held_out__loss=0.599), loss=0.6)[0] == "learned"


def test_a_model_that_moved_and_got_worse_shows_labels_without_a_rule():
    noise = {"held_out__accuracy": 0.5}
    assert decide(change(**noise, held_out__loss=LN_2 + 0.011), loss=0.6) == ("undecided", "DATA_FILE")
    assert decide(change(**noise, held_out__loss=LN_2 + 0.009), loss=0.6) == ("undertrained", "LEARNING_RATE")
    assert decide(change(held_out__accuracy=0.9, held_out__loss=LN_2 + 0.011), loss=0.6)[0] == "undertrained"


def test_eight_held_out_rows_are_too_few_even_if_all_are_right():
    assert decide(change(held_out__rows=8, held_out__accuracy=1.0)) == (
        "undecided",
        "NUM_SAMPLES",
    )  # 67.6 % to 100 %
    assert decide(change(held_out__rows=9, held_out__accuracy=1.0))[0] == "learned"  # 70.1 % to 100 %


def test_a_training_loss_far_below_the_held_out_one_is_overfitting():
    assert decide(change(held_out__loss=0.41), loss=0.1) == ("overfitted", "NUM_TRAIN_EPOCHS")
    assert decide(change(held_out__loss=0.39), loss=0.1)[0] == "learned"


def test_memorised_noise_is_overfitting():
    assert decide(change(held_out__loss=1.4, held_out__accuracy=0.5), loss=0.05) == (
        "overfitted",
        "NUM_TRAIN_EPOCHS",
    )


def test_the_sample_of_the_curve_decides_only_where_the_whole_was_not_measured():
    assert decide({}, loss=0.1, evaluated=(LN_2, 0.41)) == ("overfitted", "NUM_TRAIN_EPOCHS")
    assert decide({}, loss=0.1, evaluated=(LN_2, 0.39))[0] == "undecided"
    assert decide(HEALTHY, loss=0.1, evaluated=(LN_2, 0.41))[0] == "learned"


def test_an_interval_that_holds_a_half_is_chance():
    fair = dict.fromkeys(HEALTHY["baselines"], 0.4)
    assert decide(change(held_out__loss=0.5, held_out__accuracy=113 / 200, baselines=fair)) == (
        "undecided",
        "NUM_SAMPLES",
    )  # from 49.6 %
    assert (
        decide(change(held_out__loss=0.5, held_out__accuracy=114 / 200, baselines=fair))[0] == "learned"
    )  # from 50.1 %


def test_a_rule_that_knows_nothing_and_does_as_well_speaks_against_the_model():
    verdict = judge(change(baselines__longer=0.852), make_log())  # the model's interval begins at 85.1 %
    assert verdict["label"] == "undecided" and "長いほうを選ぶ" in verdict["reasons"][0]
    assert decide(change(baselines__longer=0.849))[0] == "learned"


# --- by the log alone ---


def test_the_log_of_plain_trl_decides_only_where_it_is_enough():
    assert decide({}, loss=0.69, margin=0.01) == ("undertrained", "LEARNING_RATE")
    assert decide({}, loss=0.6, margin=0.19) == (
        "undertrained",
        "LEARNING_RATE",
    )  # -log sigmoid(0.19) = 0.603
    assert decide({}, loss=0.59, margin=0.21) == ("undecided", "HELD_OUT_FRACTION")  # 0.594
    assert decide({"stopped": {"reason": "interrupted", "step": 9, "stage": "dpo"}}) == (
        "undecided",
        "RESUME",
    )
    assert judge({}, [])["label"] == "undecided"
    assert judge({}, [{"step": 1, "loss": 2.3, "grad_norm": 1.0}])["next_step"].startswith("NUM_TRAIN_EPOCHS")


def test_a_first_loss_that_is_not_ln_2_is_not_compared_with_it():
    log = make_log(loss=1.2)
    log[0]["loss"] = 1.0  # hinge begins at 1
    assert judge(HEALTHY, log)["label"] == "learned"


# --- what is said ---


def test_both_log_probs_falling_is_explained_in_two_sentences():
    explanations = [reason for reason in judge(HEALTHY, make_log())["reasons"] if "どちらも" in reason]
    assert len(explanations) == 1 and explanations[0].count("。") == 2
    risen = judge(change(held_out__chosen_log_prob_change=0.5), make_log())
    assert not [reason for reason in risen["reasons"] if "どちらも" in reason]
    assert [reason for reason in judge({}, make_log())["reasons"] if "どちらも" in reason]
    noise = judge(change(held_out__chosen_log_prob_change=-0.009), make_log())
    assert not [reason for reason in noise["reasons"] if "どちらも" in reason]


def test_answers_that_came_no_nearer_to_the_chosen_ones_are_told():
    told = "お手本に近づいたとは言えません"
    chrf = HEALTHY["generation"]["before"]["chrf"]
    assert any(
        told in reason for reason in judge(change(generation__after__chrf=chrf + 2.9), make_log())["reasons"]
    )
    assert not any(
        told in reason for reason in judge(change(generation__after__chrf=chrf + 3.1), make_log())["reasons"]
    )


def test_kinds_that_may_be_chance_are_named():
    weak = [
        {"rejection_kind": "off_topic", "rows": 30, "accuracy": 0.6},
        {"rejection_kind": "rude", "rows": 30, "accuracy": 0.9},
    ]
    weak.append({"rejection_kind": "vague", "rows": 9, "accuracy": 0.5})
    assert judge(change(by_rejection_kind=weak), make_log())["reasons"][-1].endswith("関係のない話（60%）。")


def test_every_rule_is_complete_and_every_text_can_be_filled():
    assert {rule.label for rule in RULES} == set(LABEL_NAMES)
    assert RULES[-1].conditions == () and all(rule.next_step for rule in RULES)


def test_a_verdict_reads_as_text():
    verdict = {
        "label": "overfitted",
        "reasons": ["一つ目。", "二つ目。"],
        "next_step": "NUM_TRAIN_EPOCHS を減らしてください。",
    }
    text = "判定：過学習です\n・一つ目。\n・二つ目。\n次の一手：NUM_TRAIN_EPOCHS を減らしてください。"
    assert describe_verdict(verdict) == text


# --- real runs, recorded by make verdict-runs ---

LABELS = {
    "healthy": "learned",
    "stuck": "undertrained",
    "overfitted": "overfitted",
    "collapsed_rate": "collapsed",
    "collapsed_scale": "collapsed",
    "shuffled": "undecided",
    "shuffled_memorised": "overfitted",
    "equal_text": "undecided",
    "few_rows": "undecided",
    "ours_135m": "learned",
    "usual_scale_135m": "undertrained",
    # it tells the answers apart and writes broken syllables, as its base does
    "no_warm_up_135m": "undertrained",
}


def read_recorded(name: str) -> tuple[dict, list[dict]]:
    recorded = json.loads((RECORDED / f"{name}.json").read_text())
    return recorded["metrics"], recorded["log_history"]


@pytest.mark.parametrize("name", LABELS)
def test_recorded_runs_are_judged_rightly(name):
    verdict = judge(*read_recorded(name))
    assert verdict["label"] == LABELS[name], describe_verdict(verdict)
    assert (RECORDED / f"{name}.json").stat().st_size < 60_000


# --- folders ---


def write_state(folder: Path, step: int, log: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": log}))


def test_a_folder_of_plain_trl_is_judged_by_its_newest_log(tmp_path):
    write_state(tmp_path / "checkpoint-9", 9, make_log(loss=0.25))
    write_state(tmp_path / "checkpoint-100", 100, make_log(loss=0.69, margin=0.01))
    assert judge_folder(tmp_path)["label"] == "undertrained"
    write_state(tmp_path, 200, make_log(loss=float("nan")))
    assert judge_folder(tmp_path)["label"] == "collapsed"


def test_a_saved_folder_is_judged_by_its_metrics_and_log(tmp_path, capsys):
    metrics, log = read_recorded("healthy")
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "log_history.json").write_text(json.dumps(log))
    parser = ArgumentParser()
    add_judge_arguments(parser)
    assert run_judge(parser.parse_args([str(tmp_path)])) == 0
    assert capsys.readouterr().out.startswith("判定：学習できました\n・")
    assert run_judge(parser.parse_args([str(tmp_path), "--json"])) == 0
    assert json.loads(capsys.readouterr().out)["label"] == "learned"


def test_a_folder_without_any_record_is_told(tmp_path):
    with pytest.raises(UserError, match="学習の記録がありません"):
        judge_folder(tmp_path)


def test_a_damaged_record_is_told(tmp_path):
    (tmp_path / "metrics.json").write_text('{"held_out": ')
    with pytest.raises(UserError, match=r"metrics.json を読めません"):
        judge_folder(tmp_path)


def test_without_its_base_model_a_saved_run_is_judged_by_its_record_and_that_is_said(tmp_path, capsys):
    metrics, log = read_recorded("healthy")
    del metrics["generation"]
    contents = {
        "metrics.json": metrics,
        "log_history.json": log,
        "adapter_config.json": {"base_model_name_or_path": "/nowhere/model"},
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(json.dumps(content))
    RunConfig().save(tmp_path / "run_config.json")
    (tmp_path / "held_out.jsonl").write_text("")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert judge_folder(tmp_path)["label"] == "undecided"
    assert "ベースモデルを読み込めない" in capsys.readouterr().err


def test_what_a_saved_run_lacks_is_measured_on_its_model(finished_run, monkeypatch):
    from dpo_helpers.judge import measure as module

    folder, metrics = finished_run
    seen = {}
    monkeypatch.setattr(module, "judge", lambda metrics, log: seen.update(metrics) or {"label": "learned"})
    judge_folder(folder)
    assert seen["held_out"]["loss"] == pytest.approx(metrics["held_out"]["loss"], abs=1e-4)
    assert (
        seen["held_out"]["accuracy_interval"][0]
        < seen["held_out"]["accuracy"]
        < seen["held_out"]["accuracy_interval"][1]
    )
    assert (
        list(seen["generation"]) == ["before", "after", "chosen"]
        and seen["first_loss"] == metrics["first_loss"]
    )
    assert (
        sum(line["rows"] for line in seen["by_rejection_kind"])
        == sum(line["rows"] for line in seen["by_field"])
        == 30
    )
    assert seen["reference_distance"] > 0
