"""Train the runs that the verdict is tested on, good and bad, and keep each as a small JSON file (metrics and
log).

    python tools/verdict_runs.py [NAME ...]                      runs of the embedded model; all of them without a name
    python tools/verdict_runs.py --real MODEL_FOLDER [NAME ...]  runs of a local, really pretrained model (an hour each)
    python tools/verdict_runs.py --keep NAME=RUN_FOLDER ...      keep finished runs; what their metrics lack is measured now

Files go to tests/fixtures/verdict/NAME.json. The weights are thrown away.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

import yaml
from dpo_helpers.judge.monitoring import build_metrics

from dpo_helpers.config import RunConfig
from dpo_helpers.data.generate import generate_preferences, split_rows
from dpo_helpers.errors import TrainingStopped
from dpo_helpers.judge.measure import evaluate_run, read_folder
from dpo_helpers.judge.scores import score_rows
from dpo_helpers.judge.verdict import describe_verdict, judge
from dpo_helpers.keep.run import open_run
from dpo_helpers.machine import find_machine
from dpo_helpers.tables import quiet_libraries
from dpo_helpers.train.trainers import build_dpo_trainer, train_dpo, train_sft

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tests" / "fixtures" / "verdict"
LARGEST = 60_000  # bytes of one file
# Numbers of the log that no rule and no plot reads.
LEFT_OUT = (
    "entropy",
    "num_tokens",
    "token_accuracy",
    "logits/chosen",
    "logits/rejected",
    "runtime",
    "per_second",
    "preparation_time",
    "total_flos",
)


def exchange_answers(rows: list[dict], draw: random.Random) -> list[dict]:
    """Exchange chosen and rejected in rows picked at random, each with probability 1/2."""
    return [
        row | {"chosen": row["rejected"], "rejected": row["chosen"]} if draw.random() < 0.5 else row
        for row in rows
    ]


def repeat_chosen(rows: list[dict], _) -> list[dict]:
    return [row | {"rejected": row["chosen"]} for row in rows]


# What each run changes: settings of tests/demo_parameters.yaml, training rows, held-out rows, and the rows'
# answers.
RUNS = {
    "healthy": {},
    "stuck": {"settings": {"learning_rate": 5e-9}},
    "overfitted": {"settings": {"num_train_epochs": 30}, "training": 20},
    "collapsed_rate": {"settings": {"learning_rate": 0.1}},
    "collapsed_scale": {"settings": {"lora_scale": 512}},
    "shuffled": {"change": exchange_answers},
    "shuffled_memorised": {
        "settings": {"num_train_epochs": 20, "logging_steps": 10, "checkpoint_steps": 50},
        "training": 100,
        "change": exchange_answers,
    },
    "equal_text": {"change": repeat_chosen},
    "few_rows": {"held_out": 5},
}
# The same of a really pretrained model, against the defaults of RunConfig; 4 x 1 gives the losses of 1 x 4,
# sooner.
REAL_RUNS = {
    "usual_scale_135m": {"settings": {"lora_scale": 2, "lora_targets": "default", "sft_epochs": 0}},
    "ours_135m": {"settings": {}},
}


def read_demo_settings() -> dict:
    return {
        name.lower(): value
        for name, value in yaml.safe_load((ROOT / "tests" / "demo_parameters.yaml").read_text()).items()
    }


def train(config: RunConfig, plan: dict, folder: Path) -> tuple[dict, list[dict]]:
    """Train as `python -m dpo_helpers train` does, on the plan's rows; return metrics and log, also of a
    run stopped by NaN.
    """
    sides = split_rows(
        generate_preferences(config.num_samples, config.seed, config.held_out_fraction),
        config.held_out_fraction,
        config.seed,
    )
    draw, change = random.Random(config.seed), plan.get("change", lambda rows, _: rows)
    train_rows, held_out_rows = (
        change(rows[: plan.get(side)], draw)
        for side, rows in zip(("training", "held_out"), sides, strict=True)
    )
    run = open_run(config, folder, find_machine("cpu"))
    try:
        run.use_rows(train_rows, held_out_rows)
        warmed_up = train_sft(run)
        trainer = train_dpo(run, build_dpo_trainer(run, warmed_up), warmed_up)
    except TrainingStopped:
        return read_folder(folder)
    finally:
        run.close()
    scores = score_rows(trainer.model, trainer.processing_class, held_out_rows, config.max_length)
    measured, _ = evaluate_run(trainer.model, trainer.processing_class, held_out_rows, scores, config)
    return build_metrics(run, trainer) | measured, trainer.state.log_history


def round_numbers(value):
    """Round to five significant digits at any depth: the files stay small, and no rule is that fine."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: round_numbers(each) for name, each in value.items()}
    return [round_numbers(each) for each in value] if isinstance(value, (list, tuple)) else value


def keep(name: str, metrics: dict, log_history: list[dict], plan: str) -> None:
    """Write one fixture, with the verdict of today left out: the test computes it."""
    log = [
        {key: value for key, value in entry.items() if not key.endswith(LEFT_OUT)} for entry in log_history
    ]
    kept = {
        "run": plan,
        "metrics": {key: value for key, value in metrics.items() if key != "verdict"},
        "log_history": log,
    }
    text = json.dumps(round_numbers(kept), ensure_ascii=False, indent=0) + "\n"
    if len(text.encode()) > LARGEST:
        raise SystemExit(f"{name}: {len(text.encode())} bytes are too many for a fixture")
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.json").write_text(text, encoding="utf-8")
    print(f"--- {name}\n{describe_verdict(judge(metrics, log_history))}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--real", metavar="MODEL_FOLDER")
    parser.add_argument("--keep", action="append", default=[], metavar="NAME=RUN_FOLDER")
    arguments = parser.parse_args()
    quiet_libraries()
    for name, _, folder in (pair.partition("=") for pair in arguments.keep):
        keep(name, *read_folder(folder), f"kept from {Path(folder).name}")
    if arguments.keep:
        return
    runs = REAL_RUNS if arguments.real else RUNS
    for name in arguments.names or runs:
        plan = runs[name]
        if arguments.real:
            base = {
                "model_name": arguments.real,
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 1,
            }
        else:
            base = read_demo_settings()
        settings = base | plan.get("settings", {})
        with tempfile.TemporaryDirectory() as folder:
            metrics, log_history = train(RunConfig(**settings), plan, Path(folder) / "run")
        rows = ", ".join(
            f"{key}: {getattr(value, '__name__', value)}" for key, value in plan.items() if key != "settings"
        )
        keep(
            name,
            metrics,
            log_history,
            f"{Path(settings['model_name']).name} {plan.get('settings', {})} {rows}".strip(),
        )


if __name__ == "__main__":
    main()
