"""Completes the trainer's checkpoint folders with a manifest and finds the newest good one, here or on the
mirror.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from dpo_helpers.files import hash_file, write_json
from dpo_helpers.keep.mirror import (
    MANIFEST,
    SLOT_NAMES,
    STAGES,
    find_valid_slots,
    order_of,
    restore_slot,
    verify_folder,
)

# what the trainer's own files do not say: configuration, identity of the data, seconds, resumptions
PROGRESS = "progress.json"
KEPT = 2  # the newest, and the one before it in case the newest is damaged


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on this machine."""

    path: Path
    stage: str  # "sft" or "dpo"
    step: int
    progress: dict
    on_mirror: bool = False

    @property
    def ends_its_stage(self) -> bool:
        return self.step >= self.progress["max_steps"]

    @property
    def ends_the_run(self) -> bool:
        return self.stage == "dpo" and self.ends_its_stage


def publish_checkpoint(
    made: Path, root: Path, stage: str, step: int, progress: dict, base_model: Path | None = None
) -> Path:
    """Add what is missing to a folder that the trainer wrote, then its manifest, then rename it to
    root/stage-step.

    `base_model` is a folder to carry along: the embedded model, which no other machine could rebuild to the
    bit.
    """
    if base_model is not None:
        shutil.copytree(base_model, made / "base_model")
    write_json(made / PROGRESS, progress)
    files = {
        path.relative_to(made).as_posix(): {"bytes": path.stat().st_size, "sha256": hash_file(path)}
        for path in sorted(made.rglob("*"))
        if path.is_file()
    }
    write_json(made / MANIFEST, {"stage": stage, "step": step, "files": files})
    target = _path_of(root, stage, step)
    shutil.rmtree(
        target, ignore_errors=True
    )  # only a damaged one can be here: training goes on from the newest good one
    made.rename(target)
    return target


def _path_of(root: Path, stage: str, step: int) -> Path:
    return root / f"{stage}-{step:06d}"


def list_checkpoints(root: Path) -> list[Path]:
    """Return the folders that are named like checkpoints, newest first, without looking into them."""
    return [
        path
        for stage in reversed(STAGES)
        for path in sorted(root.glob(f"{stage}-{'[0-9]' * 6}"), reverse=True)
    ]


def rotate_checkpoints(root: Path, in_use: set[Path]) -> None:
    """Delete all but the newest `KEPT` checkpoints of this machine, sparing those that the mirror still
    reads.
    """
    for path in list_checkpoints(root)[KEPT:]:
        if path not in in_use:
            shutil.rmtree(path, ignore_errors=True)  # one that cannot be deleted costs space, not the run


def find_newest(root: Path, mirror: Path | None, report=print) -> Checkpoint | None:
    """Return the newest checkpoint whose every byte is right, fetched from the mirror where that has a newer
    one.

    A damaged or half-written one is announced and the one before it taken.
    """
    local = None
    for path in list_checkpoints(root):
        if manifest := verify_folder(path):
            local = path, manifest
            break
        report(f"チェックポイント {path.name} は書きかけか壊れているので、その前のものを探します。")
    slots = find_valid_slots(mirror) if mirror else []
    for name in SLOT_NAMES if mirror else ():
        if os.path.isfile(mirror / name / MANIFEST) and mirror / name not in dict(slots):
            report(f"{mirror.name} の {name} は書きかけか壊れているので使いません。")
    for slot, manifest in slots:
        if local and order_of(manifest) <= order_of(local[1]):
            break
        target = _path_of(root, manifest["stage"], manifest["step"])
        shutil.rmtree(target, ignore_errors=True)  # a damaged one
        try:
            restore_slot(slot, target)
            local = target, manifest
            break
        except OSError as error:
            report(
                f"{slot.name} のチェックポイントを読み出せませんでした（{error}）。その前のものを探します。"
            )
    if local is None:
        return None
    path, manifest = local
    progress = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
    on_mirror = any(order_of(there) == order_of(manifest) for _, there in slots)
    return Checkpoint(path, manifest["stage"], manifest["step"], progress, on_mirror)


def load_adapters(model, checkpoint: Path) -> None:
    """Put every adapter's weights from its file into the model.

    Trainer.train(resume_from_checkpoint=...) does so too, but transformers 5.15 leaves the trained one out
    where the checkpoint holds `ref` beside it.
    """
    from peft import set_peft_model_state_dict

    for name, weights in _read_adapters(model, checkpoint).items():
        set_peft_model_state_dict(model, weights, adapter_name=name)


def find_different_adapters(model, checkpoint: Path) -> list[str]:
    """Name the adapters whose weights in memory differ from their file in any bit."""
    import torch
    from peft import get_peft_model_state_dict

    different = []
    for name, weights in _read_adapters(model, checkpoint).items():
        held = get_peft_model_state_dict(model, adapter_name=name)
        if set(held) != set(weights) or any(
            not torch.equal(held[key].cpu(), weights[key]) for key in weights
        ):
            different.append(name)
    return different


def _read_adapters(model, checkpoint: Path) -> dict[str, dict]:
    from peft.utils import load_peft_weights

    folders = {name: checkpoint if name == "default" else checkpoint / name for name in model.peft_config}
    return {name: load_peft_weights(str(folder), device="cpu") for name, folder in folders.items()}
