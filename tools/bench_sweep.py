"""Compare a sweep of eight settings with eight runs by the main path: time for training and evaluation, in
alternation.

    python tools/bench_sweep.py MODEL_FOLDER RESULT.json [--rows 60] [--settings 8]

Both sides train and score the same rows. Left out on both: start-up, loading models, building trainers,
generated answers, saving results. The sweep's shared part (tokens and reference log-probs, once) counts in
full. The two sides take turns, so that another process on the machine slows both.
"""

import argparse
import contextlib
import io
import itertools
import json
import tempfile
from pathlib import Path

from dpo_helpers.data.generate import split_rows
from dpo_helpers.data.own_rows import collect_rows
from dpo_helpers.judge.scores import score_rows, summarize_scores
from dpo_helpers.keep.run import open_run
from dpo_helpers.machine import find_machine
from dpo_helpers.model.load import load_tokenizer
from dpo_helpers.sweep.plan import make_plan
from dpo_helpers.sweep.runs import Workshop
from dpo_helpers.tables import quiet_libraries
from dpo_helpers.train.trainers import build_dpo_trainer, train_dpo

RATES, BETAS = [5e-6, 1e-5, 2e-5, 5e-5], [0.1, 0.5]


def measure_main(config, folder) -> tuple[float, float]:
    """Return (seconds, held-out loss) of one run by the main path, checkpoints and curve included."""
    with contextlib.redirect_stdout(io.StringIO()):
        run = open_run(config, folder, find_machine("cpu"))
        try:
            rows = collect_rows(config, load_tokenizer(config.model_name))
            run.use_rows(*split_rows(rows, config.held_out_fraction, config.seed))
            trainer = train_dpo(run, build_dpo_trainer(run))
            with run.clock("evaluation"):
                scores = score_rows(
                    trainer.model, trainer.processing_class, run.held_out_rows, config.max_length
                )
        finally:
            run.close()
    return run.clock.seconds["training"] + run.clock.seconds["evaluation"], summarize_scores(
        scores, config.beta
    )["loss"]


def measure_sweep(experiment, workshop) -> tuple[float, float]:
    metrics = workshop.measure(experiment.config, experiment.variation)
    return sum(metrics["seconds"][phase] for phase in ("shared", "training", "evaluation")), metrics[
        "held_out"
    ]["loss"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("result", type=Path)
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--settings", type=int, default=8)
    arguments = parser.parse_args()
    quiet_libraries()
    common = {
        "model_name": arguments.model,
        "num_samples": arguments.rows,
        "sft_epochs": 0,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
    }
    settings = [{"learning_rate": rate, "beta": beta} for rate, beta in itertools.product(RATES, BETAS)]
    plan, workshop, lines = (
        make_plan(settings[: arguments.settings], common),
        Workshop(find_machine("cpu"), answers=0),
        [],
    )
    for number, experiment in enumerate(plan):
        with tempfile.TemporaryDirectory() as folder:
            sides = {
                "sweep": lambda e=experiment: measure_sweep(e, workshop),
                "main": lambda e=experiment, f=folder: measure_main(e.config, f),
            }
            measured = {
                name: sides[name]() for name in (("sweep", "main") if number % 2 == 0 else ("main", "sweep"))
            }
        line = {"setting": dict(experiment.setting)}
        line |= {
            f"{name}_{what}": value
            for name, pair in measured.items()
            for what, value in zip(("seconds", "loss"), pair, strict=True)
        }
        lines.append(line)
        print(line, flush=True)
    sums = {name: sum(line[f"{name}_seconds"] for line in lines) for name in ("sweep", "main")}
    ratio = sums["sweep"] / sums["main"]
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(
        json.dumps({"rows": arguments.rows, "ratio": ratio, "seconds": sums, "runs": lines}, indent=1) + "\n"
    )
    print(
        f"sweep {sums['sweep']:.1f} s, main path {sums['main']:.1f} s, ratio {ratio:.3f} (aim: at most 0.7)"
    )


if __name__ == "__main__":
    main()
