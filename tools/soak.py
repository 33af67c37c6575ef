"""Kill real trainings at random moments, go on from a copy of the mirror alone, and compare every byte with
an uninterrupted run.

    python tools/soak.py FOLDER [--kills 30] [--seed 0]

Every second kill waits for a checkpoint or a mirrored slot that is just being written; every third run is
killed twice. Ends with 1 at the first difference. Figures go to FOLDER/soak.json.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from dpo_helpers.config import RunConfig
from dpo_helpers.keep.mirror import find_valid_slots, read_manifest

ROOT = Path(__file__).parent.parent
CONFIG = RunConfig(
    model_name="embedded",
    num_samples=120,
    learning_rate=8e-4,
    beta=0.2,
    lora_scale=2.0,
    sft_epochs=1,
    sft_learning_rate=5e-4,
    logging_steps=1,
    checkpoint_steps=3,
)
NOT_COMPARED = ("runtime", "per_second", "train_loss", "total_flos")


def start(folder: Path, mirror: Path) -> subprocess.Popen:
    CONFIG.save(folder.parent / "config.json")
    command = [
        "-m",
        "dpo_helpers",
        "train",
        "--config",
        str(folder.parent / "config.json"),
        "--run-dir",
        str(folder),
        "--mirror",
        str(mirror),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(folder.parent / "output.txt", "ab") as output:
        return subprocess.Popen(
            [sys.executable, *command, "--device", "cpu"],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def finish(folder: Path, mirror: Path) -> dict:
    if start(folder, mirror).wait() != 0:
        raise SystemExit(f"a run failed: {folder.parent / 'output.txt'}")
    return json.loads((folder / "metrics.json").read_text())


def is_writing(folder: Path, mirror: Path) -> bool:
    """Tell whether a checkpoint or a slot is being written at this moment."""
    local = any((folder / "checkpoints").glob("writing-*/checkpoint-*"))
    return local or any(
        (mirror / name / "manifest.json").is_file() and not read_manifest(mirror / name)
        for name in ("slot-0", "slot-1")
    )


def kill(folder: Path, mirror: Path, seconds: float, in_a_write: bool) -> bool:
    """Start a run and kill it `seconds` after its first sign of training, or in the first write after
    that; False if it ended before.
    """
    process, begun = start(folder, mirror), None
    while process.poll() is None:
        if begun is None and any((folder / "checkpoints").glob("*")):
            begun = time.monotonic()
        if (
            begun is not None
            and time.monotonic() - begun >= seconds
            and (not in_a_write or is_writing(folder, mirror))
        ):
            process.kill()
            process.wait()
            return True
        time.sleep(0.001)
    return False


def comparable(log: list[dict]) -> list[dict]:
    return [
        {key: value for key, value in entry.items() if not key.endswith(NOT_COMPARED)}
        for entry in log
        if "train_runtime" not in entry
    ]


def read_log(folder: Path, name: str) -> list[dict]:
    return comparable(json.loads((folder / name).read_text()))


def measure_reference(root: Path) -> dict:
    """Run without interruption; return what is to be compared, and how long the training lasts."""
    (root / "whole").mkdir(parents=True)
    metrics = finish(root / "whole" / "run", root / "whole" / "drive")
    folder = root / "whole" / "run"
    return {
        "adapter": (folder / "adapter_model.safetensors").read_bytes(),
        "logs": [read_log(folder, name) for name in ("log_history.json", "sft_log_history.json")],
        "seconds": metrics["seconds"]["sft"]
        + metrics["seconds"]["training"]
        + 2,  # and the time in which the second model is loaded
        "steps": {"sft": metrics["steps_executed"]["sft"], "dpo": metrics["steps_executed"]["dpo"]},
    }


def kill_and_resume(root: Path, reference: dict, draw: random.Random, in_a_write: bool, twice: bool) -> dict:
    """One soak: kill once or twice, resume on a new machine with a copy of the mirror alone, compare;
    raise AssertionError.
    """
    folder, mirror, expected, kills = root / "run", root / "drive", [], 0
    root.mkdir(parents=True)
    for number in range(2 if twice else 1):
        if not kill(folder, mirror, draw.uniform(0, reference["seconds"] / (number + 1)), in_a_write):
            break
        kills += 1
        new_machine = root / f"machine {number + 2}"
        new_machine.mkdir()
        shutil.copytree(mirror, new_machine / "drive") if mirror.is_dir() else None
        folder, mirror = new_machine / "run", new_machine / "drive"
        slots = find_valid_slots(mirror)
        expected.append((slots[0][1]["stage"], slots[0][1]["step"]) if slots else None)
    metrics = finish(folder, mirror)
    place = expected[-1] if expected else None
    steps = dict(reference["steps"])
    if place:
        steps = (
            {"sft": steps["sft"] - place[1], "dpo": steps["dpo"]}
            if place[0] == "sft"
            else {"sft": 0, "dpo": steps["dpo"] - place[1]}
        )
    ends = [
        ("sft", reference["steps"]["sft"]),
        ("dpo", reference["steps"]["dpo"]),
    ]  # nothing is left to go on with in that stage
    last = None if place is None or place in ends else place
    resumed = list(zip(metrics["resumed_stages"], metrics["resumed_at"], strict=True))
    assert (folder / "adapter_model.safetensors").read_bytes() == reference["adapter"], (
        f"the adapter differs: {root}"
    )
    assert [read_log(folder, name) for name in ("log_history.json", "sft_log_history.json")] == reference[
        "logs"
    ], f"a log differs: {root}"
    assert last is None or resumed[-1] == last, f"resumed at {resumed}, not at {last}: {root}"
    assert not kills or metrics["steps_executed"] == steps, (
        f"executed {metrics['steps_executed']}, not {steps}: {root}"
    )
    shutil.rmtree(root)
    return {
        "kills": kills,
        "in_a_write": in_a_write,
        "newest_slots": expected,
        "resumed_at": resumed,
        "steps_executed": metrics["steps_executed"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=30, help="runs that are killed (at least once each)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    begun, done = time.monotonic(), []
    reference = measure_reference(arguments.folder)
    draw, number = random.Random(arguments.seed), 0
    while sum(result["kills"] > 0 for result in done) < arguments.kills:
        number += 1
        done.append(
            kill_and_resume(arguments.folder / f"{number}", reference, draw, number % 2 == 0, number % 3 == 0)
        )
        print(number, json.dumps(done[-1]), flush=True)
    stages = [place[0] for result in done for place in result["newest_slots"] if place]
    summary = {
        "runs_killed": sum(result["kills"] > 0 for result in done),
        "kills": sum(result["kills"] for result in done),
        "killed_while_writing": sum(result["kills"] > 0 and result["in_a_write"] for result in done),
        "resumed_in": {stage: stages.count(stage) for stage in ("sft", "dpo")},
        "identical_adapters": len(done),
        "minutes": round((time.monotonic() - begun) / 60, 1),
    }
    (arguments.folder / "soak.json").write_text(json.dumps(summary | {"runs": done}, indent=1))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
