import math

import pytest

from dpo_helpers.judge.history import collect_history, summarize_training


def make_log(losses):
    log = []
    for step, loss in enumerate(losses, start=1):
        log.append(
            {
                "step": step,
                "loss": loss,
                "rewards/accuracies": 0.5,
                "rewards/margins": 0.1 * step,
                "logps/chosen": -50.0,
                "logps/rejected": -60.0 - step,
            }
        )
        log.append({f"eval_{key}": value for key, value in log[-1].items() if key != "step"} | {"step": step})
    return [*log, {"step": len(losses), "train_runtime": 1.0, "train_loss": 0.5}]


def test_training_and_held_out_curves_are_kept_apart():
    curves = collect_history(make_log([0.69, 0.5]))
    assert curves["training"] == {
        "step": [1, 2],
        "loss": [0.69, 0.5],
        "accuracy": [0.5, 0.5],
        "margin": [0.1, 0.2],
        "chosen": [-50.0, -50.0],
        "rejected": [-61.0, -62.0],
    }
    assert curves["held_out"]["step"] == [1, 2]


def test_the_final_loss_is_the_mean_of_the_last_tenth():
    summary = summarize_training(make_log([math.log(2)] + [0.5] * 17 + [0.2, 0.4]))
    assert summary == {"first_loss": math.log(2), "final_train_loss": pytest.approx(0.3)}
