"""Publishes checkpoints and finds the newest good one, here or in the mirror.

A checkpoint is good when its hashes are right and its inside makes sense: hashes say that nothing changed,
not that it was ever a checkpoint.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from dpo_helpers.config import RunConfig
from dpo_helpers.files import list_names, write_json
from dpo_helpers.folders import is_whole, read_manifest, verify_folder, write_manifest
from dpo_helpers.model.adapters import WEIGHTS, are_states_sound

STAGES = ("sft", "dpo")  # in the order of training
SLOT_NAMES = ("slot-0", "slot-1")  # the two copies in the mirror
PROGRESS = "progress.json"  # what the trainer's own files do not say
NEEDED = {"adapter_config.json", WEIGHTS, "optimizer.pt", "scheduler.pt", "trainer_state.json", PROGRESS}


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, in this machine's folder or in a slot of the mirror."""

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


def publish_checkpoint(made: Path, root: Path, stage: str, step: int, progress: dict, base=None) -> Path:
    """Complete a folder that the trainer wrote, write its manifest, and rename it to root/stage-step.

    `base` is a folder to carry along: the embedded model, which no other machine could rebuild to the bit.
    """
    if base is not None:
        shutil.copytree(base, made / "base_model", dirs_exist_ok=True)
    write_json(made / PROGRESS, progress)
    write_manifest(made, stage=stage, step=step)
    target = root / f"{stage}-{step:06d}"
    shutil.rmtree(target, ignore_errors=True)  # only a damaged one can be here
    made.rename(target)
    return target


def list_checkpoints(root: Path) -> list[Path]:
    """Return the folders that are named like checkpoints, newest first, without looking into them."""
    named = [(name, re.fullmatch(r"(sft|dpo)-(\d{6,})", name)) for name in list_names(root)]
    found = sorted((STAGES.index(match[1]), int(match[2]), name) for name, match in named if match)
    return [root / name for *_, name in reversed(found)]


def order_of(manifest: dict | None) -> tuple | None:
    """Return the key that sorts checkpoints from old to new; None where it is no checkpoint's manifest."""
    stage, step = (manifest or {}).get("stage"), (manifest or {}).get("step")
    return (STAGES.index(stage), step) if stage in STAGES and type(step) is int and step >= 0 else None


def find_newest(root: Path, mirror: Path | None, report=print) -> Checkpoint | None:
    """Return the newest good checkpoint, where both places have it this machine's; nothing is copied.

    A damaged or half-written one is announced and the one before it taken. OSError: one could not be read.
    """
    slots = [mirror / name for name in SLOT_NAMES if name in list_names(mirror)] if mirror else []
    manifests = {path: read_manifest(path) for path in (*list_checkpoints(root), *slots)}
    known = {path: order for path, manifest in manifests.items() if (order := order_of(manifest))}
    damaged = [path for path in manifests if path not in known]
    found = None
    for path in sorted(known, key=lambda path: (known[path], path not in slots), reverse=True):
        manifest = manifests[path]
        progress = read_progress(path, manifest) if is_whole(path, manifest) else None
        if progress is not None:
            copies = [slot for slot in slots if manifests[slot] == manifest]
            there = any(slot == path or is_whole(slot, manifest) for slot in copies)
            found = Checkpoint(path, manifest["stage"], manifest["step"], progress, there)
            break
        damaged.append(path)
    for path in damaged:
        report(f"{path.parent.name} の {path.name} は書きかけか壊れているので、その前のものを探します。")
    return found


def find_valid_slots(mirror) -> list[tuple[Path, dict]]:
    """Return (slot, manifest) of the slots that verify, newest first."""
    slots = [(slot, verify_folder(slot)) for slot in (Path(mirror) / name for name in SLOT_NAMES)]
    found = [(slot, manifest) for slot, manifest in slots if order_of(manifest)]
    return sorted(found, key=lambda slot: order_of(slot[1]), reverse=True)


def read_progress(folder: Path, manifest: dict) -> dict | None:
    """Return a whole checkpoint's progress, or None where what the trainer would load makes no sense."""
    listed = set(manifest["files"])
    states = [name for name in listed if re.fullmatch(r"rng_state(_\d+)?\.pth|scaler\.pt", name)]
    if not (listed >= NEEDED and any("rng" in name for name in states)):
        return None
    read = {name: (folder / name).read_bytes() for name in (*NEEDED, *states)}
    try:
        sound = _is_sound(read, manifest["step"]) and are_states_sound(read, states, manifest["step"])
    except Exception:  # each library has its own word for nonsense; the caller announces it as damaged
        sound = False
    return json.loads(read[PROGRESS]) if sound else None


def _is_sound(read: dict[str, bytes], step: int) -> bool:
    from transformers import TrainerState

    progress, state = json.loads(read[PROGRESS]), json.loads(read["trainer_state.json"])
    RunConfig().replace(progress["config"])
    log = TrainerState(**state).log_history
    return (
        state["global_step"] == step <= progress["max_steps"] == state["max_steps"]
        and any("num_tokens" in entry for entry in log)
        and all(type(entry["step"]) is int for entry in (*log, *progress["sft_log"]))
        and all(type(number) is int for number in progress["resumed_at"])
        and set(progress["resumed_stages"]) <= set(STAGES)
        and all(seconds >= 0 for seconds in progress["seconds"].values())
        and min(progress["micro_batch"], progress["eval_batch"]) >= 1
        and {"rows", "base", "counts"} <= set(progress["identity"])
        and progress["precision"] in ("fp32", "fp16", "bf16")
        and json.loads(read["adapter_config.json"])["r"] > 0
    )


def prepare_resume(checkpoint: Checkpoint, precision: str) -> Path:
    """Return the folder to resume from: without the scaler's state where this machine has no scaler."""
    before, scaler = checkpoint.progress["precision"], checkpoint.path / "scaler.pt"
    if before != precision:
        print(
            f"このチェックポイントは {before} の計算で学習したものです。ここでは {precision} で続けるので、"
            "止まらずに学習したときと、数字がわずかに違います。"
        )
    if precision == "fp16" or not scaler.is_file():
        return checkpoint.path
    copy = checkpoint.path.with_name("without-scaler")
    shutil.rmtree(copy, ignore_errors=True)
    left_out = shutil.ignore_patterns("scaler.pt", "base_model")
    return shutil.copytree(checkpoint.path, copy, ignore=left_out)
