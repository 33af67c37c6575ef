"""A training of seconds on a tiny model, and what two of them are compared by."""

from dpo_helpers.config import RunConfig
from dpo_helpers.judge.monitoring import build_metrics
from dpo_helpers.keep.storage import save_run
from dpo_helpers.train.trainers import build_dpo_trainer, train_dpo, train_sft

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


def train(run):
    warmed_up = train_sft(run)
    return train_dpo(run, build_dpo_trainer(run, warmed_up), warmed_up)


def save(run, trainer):
    return save_run(run, trainer, build_metrics(run, trainer))


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
