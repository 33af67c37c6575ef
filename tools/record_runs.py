"""Train named recipes, good and bad, and keep each as a small JSON file that the verdict is tested on.

    python tools/record_runs.py [NAME ...]      all of them without a name; minutes, on the embedded model

Files go to tests/fixtures/verdict/NAME.json: {"recipe", "metrics", "log_history"}. No weights are kept.
"""

import argparse
import random
import tempfile
from pathlib import Path

import yaml

from dpo_helpers.config import RunConfig
from dpo_helpers.data.generate import generate_preferences, split_rows
from dpo_helpers.errors import TrainingStopped
from dpo_helpers.files import read_json, write_json
from dpo_helpers.judge.measure import BEFORE_ROWS, evaluate_run
from dpo_helpers.judge.scores import measure_before
from dpo_helpers.judge.verdict import describe_verdict, judge
from dpo_helpers.keep.run import open_run
from dpo_helpers.machine import find_machine
from dpo_helpers.tables import quiet_libraries
from dpo_helpers.train.stages import build_metrics, train_dpo, train_sft
from dpo_helpers.train.trainers import build_dpo_trainer

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "tests" / "fixtures" / "verdict"
# What a recipe changes: settings of the demo, how many rows of a side are used, and the training answers.
RECIPES = {
    "healthy": {},
    "stuck": {"settings": {"learning_rate": 5e-9}},
    "overfitted": {"settings": {"num_train_epochs": 30}, "training": 20},
    "collapsed": {"settings": {"learning_rate": 0.1}},
    "shuffled": {"answers": "shuffled"},
    "equal_text": {"answers": "equal"},
    "few_rows": {"held_out": 5},
}


def read_config(recipe: dict) -> RunConfig:
    demo = yaml.safe_load((ROOT / "tests" / "demo_parameters.yaml").read_text(encoding="utf-8"))
    demo |= demo.pop("MORE")
    return RunConfig(**{name.lower(): value for name, value in demo.items()} | recipe.get("settings", {}))


def make_rows(config: RunConfig, recipe: dict) -> tuple[list[dict], list[dict]]:
    rows = generate_preferences(config.num_samples, config.seed, config.held_out_fraction)
    training, held_out = split_rows(rows, config.held_out_fraction, config.seed)
    draw = random.Random(config.seed)
    if recipe.get("answers") == "equal":
        training = [row | {"rejected": row["chosen"]} for row in training]
    elif recipe.get("answers") == "shuffled":
        turned = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in training]
        training = [draw.choice(pair) for pair in zip(training, turned, strict=True)]
    return training[: recipe.get("training")], held_out[: recipe.get("held_out")]


def train(config: RunConfig, rows: tuple[list[dict], list[dict]], folder: Path) -> tuple[dict, list[dict]]:
    """Return metrics and log as the notebook would have them, also of a run that NaN stopped."""
    machine, length = find_machine("cpu"), config.max_length
    run = open_run(config, folder, machine)
    try:
        run.check_rows(*rows)
        warmed_up = train_sft(run, config, machine, rows[0])
        trainer = build_dpo_trainer(run, config, machine, *rows, warmed_up)
        tokenizer = trainer.processing_class
        before = measure_before(trainer.model, tokenizer, rows[1][:BEFORE_ROWS], length)
        trainer = train_dpo(run, config, machine, *rows, trainer, warmed_up)
        measured = evaluate_run(trainer.model, tokenizer, *rows, config, before).metrics
        return build_metrics(run, config, machine, rows[0], trainer) | measured, trainer.state.log_history
    except TrainingStopped:
        return tuple(read_json(folder / name, name) for name in ("metrics.json", "log_history.json"))
    finally:
        run.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)}")
    names = parser.parse_args().names or list(RECIPES)
    quiet_libraries()
    FIXTURES.mkdir(parents=True, exist_ok=True)
    for name in names:
        config = read_config(RECIPES[name])
        with tempfile.TemporaryDirectory() as folder:
            metrics, log = train(config, make_rows(config, RECIPES[name]), Path(folder) / "run")
        metrics.pop("verdict", None)  # the test computes it
        kept = {"recipe": RECIPES[name], "metrics": metrics, "log_history": log}
        write_json(FIXTURES / f"{name}.json", kept)
        print(f"--- {name}\n{describe_verdict(judge(metrics, log))}", flush=True)


if __name__ == "__main__":
    main()
