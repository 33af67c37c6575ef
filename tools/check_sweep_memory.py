"""Run fifty settings one after the other and show whether memory stays flat.

    python tools/check_sweep_memory.py [RUNS] [--vary-rows]     # default 50; with --vary-rows every run has rows of its own

Prints the resident memory after each run, and the growth from the tenth run to the last.
"""

import sys

from dpo_helpers.machine import find_machine
from dpo_helpers.sweep.plan import make_plan
from dpo_helpers.sweep.runs import Workshop
from dpo_helpers.tables import quiet_libraries

COMMON = {
    "model_name": "embedded",
    "num_samples": 100,
    "training_rows": 40,
    "sft_epochs": 0,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
}


def main() -> None:
    numbers = [int(word) for word in sys.argv[1:] if word.isdigit()]
    runs, vary = numbers[0] if numbers else 50, "--vary-rows" in sys.argv
    quiet_libraries()
    settings = [
        {"learning_rate": 1e-5 * (i + 1), **({"label_noise": i / 200} if vary else {})} for i in range(runs)
    ]
    workshop, used = Workshop(find_machine("cpu"), answers=4), []
    for experiment in make_plan(settings, COMMON):
        used.append(workshop.measure(experiment.config, experiment.variation)["memory_gb"])
        print(f"{len(used)}: {used[-1]:.3f} GB", flush=True)
    print(f"growth from run {min(10, runs)} to run {runs}: {used[-1] - used[min(10, runs) - 1]:+.3f} GB")


if __name__ == "__main__":
    main()
