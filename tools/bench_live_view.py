"""Measure what the live view costs: a short real training with and without it, alternating, then its log
replayed redraw by redraw.

    python tools/bench_live_view.py [RESULT.json] [--model embedded] [--rows 300] [--rounds 3]

The display of this script packs every message as a kernel does, and sends it nowhere.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from dpo_helpers.config import RunConfig
from dpo_helpers.data.generate import generate_preferences, split_rows
from dpo_helpers.keep.run import open_run
from dpo_helpers.machine import find_machine
from dpo_helpers.tables import quiet_libraries
from dpo_helpers.train.live_display import LiveDisplay
from dpo_helpers.train.live_view import LiveView
from dpo_helpers.train.trainers import build_dpo_trainer


class PackingDisplay:
    def __init__(self):
        self.sizes = []

    def __call__(self, data, raw, display_id):
        self.update(data, raw)
        return self

    def update(self, data, raw):
        self.sizes.append(len(json.dumps(data)))


def train(config: RunConfig, sides, view: LiveView | None) -> tuple[float, list[dict]]:
    """Return the seconds of one DPO training and its log."""
    with tempfile.TemporaryDirectory() as folder:
        run = open_run(config, Path(folder) / "run", find_machine("cpu"))
        run.use_rows(*sides)
        trainer = build_dpo_trainer(run)
        trainer.args.save_strategy = "no"
        if view:
            trainer.add_callback(view)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        run.close()
    return seconds, trainer.state.log_history


def replay(log: list[dict]) -> dict:
    """Return milliseconds of a redraw for every prefix of the log, and the kilobytes sent."""
    display, now, costs = PackingDisplay(), [0.0], []
    shown = LiveDisplay("dpo", 4, "cpu", display, lambda: now[0])
    shown.begin(0, log[-1]["step"], [], beta=0.1)
    for count in range(1, len(log) + 1):
        now[0] += 3
        start = time.perf_counter()
        shown.update(log[count - 1]["step"], log[:count])
        costs.append(1000 * (time.perf_counter() - start))
    return {
        "lines": len(log),
        "redraws": len(display.sizes),
        "ms_median": round(statistics.median(costs), 2),
        "ms_most": round(max(costs), 2),
        "kilobytes_most": round(max(display.sizes) / 1000, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path, nargs="?")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    quiet_libraries()
    config = RunConfig(
        model_name=arguments.model,
        num_samples=arguments.rows,
        sft_epochs=0,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
    )
    sides = split_rows(
        generate_preferences(config.num_samples, config.seed), config.held_out_fraction, config.seed
    )
    train(config, sides, None)  # caches and imports
    seconds, paid = {False: [], True: []}, []
    for turn in range(arguments.rounds):
        for with_view in (
            (True, False) if turn % 2 else (False, True)
        ):  # whoever comes first must not always be the same
            view = (
                LiveView("dpo", config.effective_batch_size, "cpu", PackingDisplay()) if with_view else None
            )
            took, history = train(config, sides, view)
            seconds[with_view].append(round(took, 2))
            if view:
                paid.append(
                    {"redraws": len(view.shown.display.sizes), "seconds": round(view.shown.budget.spent, 4)}
                )
    log = [entry for entry in history if "loss" in entry or "eval_loss" in entry]
    long_log = [{**log[i % len(log)], "step": i + 1} for i in range(5000)]
    result = {
        "model": arguments.model,
        "steps": log[-1]["step"],
        "seconds_without": seconds[False],
        "seconds_with": seconds[True],
        "paid_for_drawing": paid,
        "replay": replay(log),
        "replay_of_5000_lines": replay(long_log),
    }
    if arguments.result:
        arguments.result.parent.mkdir(parents=True, exist_ok=True)
        arguments.result.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
