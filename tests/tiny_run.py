"""A training of seconds on a tiny model, and what two of them are compared by."""

from dpo_helpers.config import RunConfig
from dpo_helpers.machine import find_machine
from dpo_helpers.train.stages import build_metrics, save_result, train_dpo, train_sft
from dpo_helpers.train.trainers import build_dpo_trainer

NOT_COMPARED = ("runtime", "per_second", "train_loss", "total_flos")


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


def warm_up(run):
    """Train the first stage; return the folder of the warmed-up adapter, or None."""
    return train_sft(run, run.config, find_machine("cpu"), run.rows[0])


def build(run, warmed_up=None):
    return build_dpo_trainer(run, run.config, find_machine("cpu"), *run.rows, warmed_up)


def train_on(run, trainer, warmed_up=None):
    return train_dpo(run, run.config, find_machine("cpu"), *run.rows, trainer, warmed_up)


def train(run):
    """Train both stages of a run that start_run opened to their end; return the trainer of DPO."""
    warmed_up = warm_up(run)
    return train_on(run, build(run, warmed_up), warmed_up)


def save(run, trainer):
    """Save the result as the notebook does, without the evaluation; return the names of the files."""
    metrics = build_metrics(run, run.config, find_machine("cpu"), run.rows[0], trainer)
    return save_result(run, run.config, *run.rows, trainer, metrics)


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


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package catches it."""
