"""Makes in milliseconds what a training leaves: checkpoints that make sense, and a run that was opened."""

import json
import random

import numpy
import torch
from safetensors.torch import save_file
from transformers import TrainerState

from dpo_helpers.config import RunConfig
from dpo_helpers.files import write_json
from dpo_helpers.folders import write_manifest
from dpo_helpers.keep.checkpoints import PROGRESS

CONFIG = RunConfig(model_name="someone/model", sft_epochs=0)
ROWS = [
    {"prompt": f"質問: {i}は何ですか？\n回答:\n", "chosen": "良い。", "rejected": "悪い。"} for i in range(8)
]
SIDES = ROWS[:6], ROWS[6:]


def fill_checkpoint(folder, stage="dpo", step=2, max_steps=8, config=CONFIG, identity=None, **progress):
    """Write what the trainer would, with what the run adds to it, but no manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(step)
    shapes = {"base_model.model.layer.lora_A.weight": (2, 3), "base_model.model.layer.lora_B.weight": (3, 2)}
    save_file(
        {name: torch.randn(shape) for name, shape in shapes.items()}, folder / "adapter_model.safetensors"
    )
    write_json(folder / "adapter_config.json", {"r": 2, "peft_type": "LORA"})
    moments = {i: {"step": step, "exp_avg": torch.zeros(shape)} for i, shape in enumerate(shapes.values())}
    torch.save({"state": moments, "param_groups": []}, folder / "optimizer.pt")
    torch.save({"last_epoch": step}, folder / "scheduler.pt")
    states = {"python": random.getstate(), "numpy": numpy.random.get_state(), "cpu": torch.get_rng_state()}
    torch.save(states, folder / "rng_state.pth")
    log = [{"step": step, "loss": 0.5, "num_tokens": 10.0}]
    state = TrainerState(global_step=step, max_steps=max_steps, log_history=log)
    state.save_to_json(str(folder / "trainer_state.json"))
    values = {"config": config.as_dict(), "max_steps": max_steps, "micro_batch": 4, "eval_batch": 8}
    identity = {"rows": "r", "base": "b", "counts": [6, 2]} | (identity or {})
    values |= {"identity": identity, "generated": True, "precision": "fp32", "sft_log": []}
    values |= {"resumed_at": [], "resumed_stages": [], "seconds": {"training": 1.0}}
    write_json(folder / PROGRESS, values | progress)
    return folder


def make_checkpoint(folder, stage="dpo", step=2, **options):
    """Write a whole checkpoint that makes sense."""
    fill_checkpoint(folder, stage, step, **options)
    write_manifest(folder, stage=stage, step=step)
    return folder


def make_result(folder, **identity):
    """Write a small whole result, as a finished run leaves it, into a run's folder."""
    (folder / "adapter_model.safetensors").write_bytes(b"adapter")
    (folder / "reference").mkdir(exist_ok=True)
    (folder / "reference" / "adapter_model.safetensors").write_bytes(b"reference")
    write_json(folder / "metrics.json", {"steps": 8, "rows_generated": True})
    files = {
        "adapter_model.safetensors",
        "reference/adapter_model.safetensors",
        "metrics.json",
        "run_config.json",
    }
    write_manifest_of(folder, files, identity or {"rows": "r"})
    return folder


def write_manifest_of(folder, names, identity):
    from dpo_helpers.files import hash_file

    files = {
        n: {"bytes": (folder / n).stat().st_size, "sha256": hash_file(folder / n)} for n in sorted(names)
    }
    (folder / "manifest.json").write_text(json.dumps({"identity": identity, "files": files}))


def contents(folder):
    """Return {name: bytes} of all files below a folder."""
    paths = sorted(folder.rglob("*"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if path.is_file()}
