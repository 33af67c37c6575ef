"""Measure what checkpoints and mirroring cost: the same DPO training with and without them, alternating, in
one process.

    python tools/bench_checkpoints.py MODEL_FOLDER|embedded RESULT.json [--rounds 3] [--rows 400]

The mirror is a folder of this machine, or a slow one: `--slow SECONDS` makes every write there last that
long.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from dpo_helpers import folders
from dpo_helpers.config import RunConfig
from dpo_helpers.data.generate import generate_preferences, split_rows
from dpo_helpers.keep.run import open_run
from dpo_helpers.machine import find_machine
from dpo_helpers.tables import quiet_libraries
from dpo_helpers.train.stages import train_dpo
from dpo_helpers.train.trainers import build_dpo_trainer


def measure(config: RunConfig, sides, with_checkpoints: bool) -> float:
    """Return the seconds of one DPO training, the mirror's last wait left out."""
    with tempfile.TemporaryDirectory() as folder:
        machine, mirror = find_machine("cpu"), Path(folder) / "drive" if with_checkpoints else None
        run = open_run(config, Path(folder) / "run", machine, mirror)
        run.check_rows(*sides)
        trainer = build_dpo_trainer(run, config, machine, *sides)
        trainer.args.eval_strategy, trainer.args.eval_on_start = (
            "no",
            False,
        )  # the evaluation is there with or without
        if not with_checkpoints:
            trainer.args.save_strategy = "no"
        start = time.perf_counter()
        train_dpo(run, config, machine, *sides, trainer)
        seconds = time.perf_counter() - start
        run.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("result", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--slow", type=float, default=0.0)
    arguments = parser.parse_args()
    quiet_libraries()
    config = RunConfig(model_name=arguments.model, num_samples=arguments.rows, sft_epochs=0)
    sides = split_rows(
        generate_preferences(config.num_samples, config.seed), config.held_out_fraction, config.seed
    )
    write = folders.write_in_place

    def write_slowly(path, source):
        time.sleep(arguments.slow)
        write(path, source)

    folders.write_in_place = write_slowly
    measure(config, sides, True)  # caches and imports
    seconds = {False: [], True: []}
    for _ in range(arguments.rounds):
        for with_checkpoints in (False, True):
            seconds[with_checkpoints].append(measure(config, sides, with_checkpoints))
    costs = [there / without - 1 for without, there in zip(seconds[False], seconds[True], strict=True)]
    result = {
        "model": arguments.model,
        "steps": len(sides[0]) // config.effective_batch_size,
        "checkpoint_steps": config.checkpoint_steps,
        "seconds_without": [round(value, 2) for value in seconds[False]],
        "seconds_with": [round(value, 2) for value in seconds[True]],
        "cost_median": round(statistics.median(costs), 4),
        "slow_seconds_per_file": arguments.slow,
    }
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
