"""Two processes of `accelerate launch` (gloo on the CPU) give what one gives: the same loss, one log, one
checkpoint.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_helpers.__main__ import train
from dpo_helpers.config import RunConfig

LAUNCH = ["accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
ROOT = Path(__file__).parent.parent.parent


def launch(config: RunConfig, folder, mirror):
    """Train in two processes; return the finished launcher and metrics.json."""
    config.save(folder.with_suffix(".json"))
    options = [
        "train",
        "--config",
        folder.with_suffix(".json"),
        "--run-dir",
        folder,
        "--mirror",
        mirror,
        "--device",
        "cpu",
    ]
    command = [sys.executable, "-m", *LAUNCH, "--multi_gpu", "-m", "dpo_helpers", *map(str, options)]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done, json.loads((folder / "metrics.json").read_text())


def steps(folder) -> list[int]:
    return [
        entry["step"] for entry in json.loads((folder / "log_history.json").read_text()) if "loss" in entry
    ]


CONFIG = {
    "num_samples": 68,
    "max_length": 256,
    "learning_rate": 1e-3,
    "sft_epochs": 1,
    "sft_learning_rate": 1e-3,
    "checkpoint_steps": 5,
    "gradient_accumulation_steps": 2,
}


@pytest.fixture(scope="module")
def two(tiny_models, tmp_path_factory):
    """A run of two processes, its mirror, its launcher and its metrics: 1 pair × 2 rounds × 2 processes
    are four pairs a step.
    """
    folder, config = tmp_path_factory.mktemp("two"), RunConfig(model_name=str(tiny_models["llama"]), **CONFIG)
    done, metrics = launch(config, folder / "run", folder / "mirror")
    return config, folder, done, metrics


@pytest.mark.versions
def test_two_processes_train_as_one_does(two, tmp_path):
    config, folder, done, together = two
    alone = train(config.replace({"gradient_accumulation_steps": 4}), tmp_path / "run", device="cpu")
    assert alone["held_out"]["loss"] != pytest.approx(0.6931, abs=0.005)
    assert together["held_out"]["loss"] == pytest.approx(alone["held_out"]["loss"], abs=1e-3)
    assert (together["processes"], together["steps"]) == (2, alone["steps"])
    assert steps(folder / "run") == steps(tmp_path / "run") and done.stdout.count("。結果：") == 1
    assert json.loads((folder / "mirror" / "metrics.json").read_text()) == together
    checkpoints = folder / "run.checkpoints"
    assert sorted(path.name for path in checkpoints.glob("dpo-*")) == ["dpo-000010", "dpo-000012"]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(
        json.loads((checkpoints / "dpo-000010" / "manifest.json").read_text())["files"]
    )


def test_two_processes_resume_to_the_same_bytes(two):
    """At the newest versions alone: transformers 5.15 cannot read an optimizer back onto "cpu:0", a device
    of CPU processes only.
    """
    config, folder, _, finished = two
    adapter, log = (folder / "run" / "adapter_model.safetensors").read_bytes(), steps(folder / "run")
    shutil.rmtree(folder / "run.checkpoints" / "dpo-000012")  # as if it had been cut off after step 10
    shutil.rmtree(folder / "mirror")
    (folder / "run" / "metrics.json").unlink()
    done, resumed = launch(config, folder / "run", folder / "mirror")
    assert (resumed["resumed_at"], resumed["steps_executed"]) == ([10], {"sft": 0, "dpo": 2})
    assert resumed["held_out"] == finished["held_out"]
    assert (folder / "run" / "adapter_model.safetensors").read_bytes() == adapter
    assert steps(folder / "run") == log and done.stdout.count("から再開します") == 1
