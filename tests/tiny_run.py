"""A training of seconds on a tiny model, and what two of them are compared by."""

from typing import NamedTuple

from dpo_helpers.config import RunConfig
from dpo_helpers.keep.run import Run, open_run
from dpo_helpers.machine import Machine, find_machine
from dpo_helpers.train.stages import build_metrics, save_result, train_dpo, train_sft
from dpo_helpers.train.trainers import build_dpo_trainer

NOT_COMPARED = ("runtime", "per_second", "train_loss", "total_flos")


class Started(NamedTuple):
    """An open run with what its stages take, in their order: `build_dpo_trainer(*started)` and the like."""

    run: Run
    config: RunConfig
    machine: Machine
    train_rows: list[dict]
    held_out_rows: list[dict]


def make_config(tiny_models, **changes):
    values = {
        "model_name": str(tiny_models["gpt2"]),
        "learning_rate": 1e-3,
        "lora_rank": 4,
        "lora_scale": 4.0,
        "sft_epochs": 1,
        "sft_learning_rate": 1e-2,
        "logging_steps": 3,
        "checkpoint_steps": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
    }
    return RunConfig(**{**values, **changes})


def start(config, train_rows, held_out_rows, folder, **options) -> Started:
    """Open the run on the CPU and check its rows; it is closed again where those are refused."""
    machine = find_machine("cpu")
    run = open_run(config, folder, machine, **options)
    try:
        run.check_rows(train_rows, held_out_rows)
    except BaseException:
        run.close()
        raise
    return Started(run, config, machine, train_rows, held_out_rows)


def warm_up(started):
    """Train the first stage; return the folder of the warmed-up adapter, or None."""
    return train_sft(started.run, started.config, started.machine, started.train_rows)


def train(started):
    """Train both stages to their end; return the trainer of DPO."""
    warmed_up = warm_up(started)
    return train_dpo(*started, build_dpo_trainer(*started, warmed_up), warmed_up)


def save(started, trainer):
    """Save the result as the notebook does, without the evaluation; return the names of the files."""
    run, config, machine, train_rows, held_out_rows = started
    metrics = build_metrics(run, config, machine, train_rows, trainer)
    return save_result(run, config, train_rows, held_out_rows, trainer, metrics)


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_" in name}


def comparable(log):
    return [
        {key: value for key, value in entry.items() if not key.endswith(NOT_COMPARED)}
        for entry in log
        if "train_runtime" not in entry
    ]


def losses(log, key="loss"):
    return [entry[key] for entry in log if key in entry]
