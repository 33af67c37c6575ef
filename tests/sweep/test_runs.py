"""Runs of an experiment: what changes in their rows, and that none sees the one before (at both ends)."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import train

from dpo_helpers.config import RunConfig
from dpo_helpers.errors import UserError
from dpo_helpers.sweep.plan import Results, Variation, make_plan, run_plan
from dpo_helpers.sweep.runs import REFUSAL, Workshop, flip_labels, make_easy, make_rows

ROOT = Path(__file__).parent.parent.parent
SMALL = {
    "num_samples": 60,
    "training_rows": 16,
    "sft_epochs": 0,
    "learning_rate": 1e-2,
    "lora_rank": 4,
    "lora_scale": 4.0,
}
PAIRS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}


def test_easy_rows_and_flipped_labels(rows):
    longer = make_easy(rows, "longer")
    assert 0.4 < len(longer) / len(rows) < 0.6 and all(
        len(row["chosen"]) > len(row["rejected"]) for row in longer
    )
    refused = make_easy(rows[:5], "refusal")
    assert {row["rejected"] for row in refused} == {REFUSAL} and [r["chosen"] for r in refused] == [
        r["chosen"] for r in rows[:5]
    ]
    flipped = flip_labels(rows[:20], 0.3, seed=1)
    changed = [i for i in range(20) if flipped[i] != rows[i]]
    assert len(changed) == 6 and all(flipped[i]["chosen"] == rows[i]["rejected"] for i in changed)
    assert flip_labels(rows[:20], 0.3, seed=1) == flipped and flip_labels(rows[:20], 0.0, seed=1) == rows[:20]


def test_only_training_rows_change(gpt2_tokenizer):
    config = RunConfig(num_samples=100)
    training, held_out, easy = make_rows(config, Variation(), gpt2_tokenizer)
    assert len(training) + len(held_out) == 100 and easy == []
    noisy, same, _ = make_rows(config, Variation(label_noise=0.5, training_rows=20), gpt2_tokenizer)
    assert len(noisy) == 20 and same == held_out
    assert sum(a != b for a, b in zip(noisy, training, strict=False)) == 10
    refusing, honest, own = make_rows(config, Variation(data="refusal"), gpt2_tokenizer)
    assert honest == held_out and {row["rejected"] for row in [*refusing, *own]} == {REFUSAL}
    longer, honest, own = make_rows(config, Variation(data="longer"), gpt2_tokenizer)
    assert honest == held_out and longer and own
    assert all(len(row["chosen"]) > len(row["rejected"]) for row in [*longer, *own])
    with pytest.raises(UserError, match="行しかありません"):
        make_rows(config, Variation(training_rows=len(training) + 1), gpt2_tokenizer)


def numbers(metrics):
    return {name: value for name, value in metrics.items() if name not in ("seconds", "memory_gb")}


@pytest.fixture
def workshop():
    from dpo_helpers.machine import find_machine

    return lambda questions=4: Workshop(find_machine("cpu"), questions)


SETTINGS = [
    {},
    {"beta": 0.5},
    {"sft_epochs": 1, "sft_learning_rate": 1e-2},
    {"loss_type": "sigmoid+sft"},
    {"lora_rank": 2, "loss_type": "robust"},
    {"data": "refusal"},
    {"sft_epochs": 1, "sft_learning_rate": 1e-2, "learning_rate": 1e-3},
    {"label_noise": 0.4, "loss_type": "exo_pair"},
    {},
]


@pytest.mark.versions
def test_a_run_in_a_sweep_gives_the_same_numbers_as_alone(tiny_models, workshop):
    plan = make_plan(SETTINGS, {**SMALL, **PAIRS, "model_name": str(tiny_models["gpt2"])})
    shared = workshop()
    in_sweep = [numbers(shared.measure(e.config, e.variation)) for e in plan]
    assert len(shared._shared) == 4  # honest rows, refusals, flipped rows, and the warm-up
    assert in_sweep[0] == in_sweep[-1] and in_sweep[0] != in_sweep[1]
    for experiment, metrics in list(zip(plan, in_sweep, strict=True))[1:-1]:
        assert numbers(workshop().measure(experiment.config, experiment.variation)) == metrics


@pytest.mark.versions
@pytest.mark.parametrize("sft_epochs", [0, 1])
def test_the_runner_and_the_main_path_give_the_same_figures(
    tiny_models, workshop, start_run, gpt2_tokenizer, sft_epochs
):
    from dpo_helpers.judge.scores import score_rows, summarize_scores

    common = {**SMALL, **PAIRS, "model_name": str(tiny_models["gpt2"]), "sft_learning_rate": 1e-2}
    (experiment,) = make_plan([{}], common | {"sft_epochs": sft_epochs})
    config = experiment.config
    metrics = workshop().measure(config, experiment.variation)
    run = start_run(config, *make_rows(config, experiment.variation, gpt2_tokenizer)[:2])
    trainer = train(run)
    scores = score_rows(trainer.model, trainer.processing_class, run.rows[1], config.max_length)
    theirs = summarize_scores(scores, config.beta)
    for name in ("rows", "loss", "accuracy", "margin"):
        assert metrics["held_out"][name] == pytest.approx(theirs[name], abs=1e-3)
    assert metrics["first_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert metrics["held_out"]["loss"] != pytest.approx(0.6931, abs=1e-3)


@pytest.mark.versions
def test_the_first_preference_loss_is_ln_2_whichever_losses_are_trained(tiny_models, workshop):
    common = {**SMALL, **PAIRS, "model_name": str(tiny_models["gpt2"])}
    losses = {}
    for experiment in make_plan({"loss_type": ["sigmoid", "sigmoid+sft", "robust"]}, common):
        metrics = workshop(1).measure(experiment.config, experiment.variation)
        assert metrics["first_loss"] == pytest.approx(0.693147, abs=1e-5)
        losses[experiment.config.loss_type] = metrics["held_out"]["loss"]
    assert len(set(losses.values())) == 3


@pytest.mark.versions
def test_broken_numbers_and_wrong_layers_are_recorded(tiny_models, workshop, tmp_path):
    settings = [
        {"learning_rate": 1.0, "lora_scale": 1024.0, "max_grad_norm": 1000.0},
        {"lora_targets": "absent"},
        {},
    ]
    plan = make_plan(settings, {**SMALL, **PAIRS, "model_name": str(tiny_models["gpt2"])})
    outcomes = run_plan(plan, Results(tmp_path / "r.jsonl"), workshop())
    assert [record["status"] for _, record in outcomes][1:] == ["failed", "ok"]
    assert "absent という層" in outcomes[1][1]["reason"]
    assert outcomes[2][1]["metrics"]["steps"] == 4


@pytest.mark.versions
def test_memory_stays_flat(tiny_models, workshop):
    plan = make_plan(
        {"learning_rate": [1e-3 * i for i in range(1, 13)]},
        {**SMALL, **PAIRS, "model_name": str(tiny_models["gpt2"])},
    )
    shared = workshop()
    used = [shared.measure(e.config, e.variation)["memory_gb"] for e in plan]
    assert used[-1] - used[3] < 0.01


@pytest.mark.versions
def test_killed_in_the_middle_it_ends_with_the_same_results(tiny_models, tmp_path):
    grid = {
        "settings": {"beta": [0.1, 0.2, 0.3, 0.4]},
        "common": {**SMALL, **PAIRS, "model_name": str(tiny_models["gpt2"])},
        "seeds": [42],
    }
    (tmp_path / "grid.json").write_text(json.dumps(grid))

    def start(name):
        words = [
            sys.executable,
            "-m",
            "dpo_helpers",
            "experiment",
            "--grid",
            tmp_path / "grid.json",
            "--results",
            tmp_path / name,
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [*words, "--device", "cpu"],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    killed = start("r.jsonl")
    while not ((tmp_path / "r.jsonl").exists() and (tmp_path / "r.jsonl").read_text().count("\n") >= 2):
        assert killed.poll() is None, killed.stdout.read()
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    before = (tmp_path / "r.jsonl").read_text()
    assert before.count("\n") < 4
    for name in ("r.jsonl", "whole.jsonl"):
        done = start(name)
        assert "評価用の損失" in done.communicate()[0] and done.returncode == 0
    again, whole = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("r.jsonl", "whole.jsonl")
    )
    assert (tmp_path / "r.jsonl").read_text().startswith(before[: before.rfind("\n") + 1])
    for records in (again, whole):
        for record in records:
            record["metrics"] = numbers(record["metrics"])
            del record["seconds"]
    assert again == whole
