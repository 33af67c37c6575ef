"""Kill real trainings in every phase, go on from what is left, and compare with an undisturbed one.

    python tools/soak.py FOLDER [--kills 30] [--seed 0]

Each run is a process that notes when a phase begins and ends; a kill counts only where the process was alive
and in the phase that was meant. SIGKILL, SIGTERM and SIGINT are mixed, every third run is killed twice; it
goes on from the mirror alone, the local folder alone, or both with one slot damaged. Ends with 1 at the first
byte that differs. Figures go to FOLDER/soak.json.
"""

import argparse
import functools
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from dpo_helpers.__main__ import main as run_command
from dpo_helpers.config import RunConfig
from dpo_helpers.data.generate import generate_preferences
from dpo_helpers.folders import verify_folder
from dpo_helpers.keep.checkpoints import SLOT_NAMES, list_checkpoints, order_of

# phase -> the function that is it, and the first argument that has to be right (a stage)
PHASES = {
    "set-up": ("dpo_helpers.keep.run", "_start", None),
    "warm-up": ("dpo_helpers.train.stages", "train_stage", "sft"),
    "dpo": ("dpo_helpers.train.stages", "train_stage", "dpo"),
    "checkpoint": ("dpo_helpers.keep.run", "publish_checkpoint", None),
    "copy": ("dpo_helpers.keep.drive", "copy_in_place", None),
    "evaluation": ("dpo_helpers.judge.measure", "evaluate_run", None),
    "saving": ("dpo_helpers.train.stages", "save_run", None),
    "delivery": ("dpo_helpers.keep.run", "deliver_result", None),
    "merge": ("dpo_helpers.keep.share", "merge_adapter", None),
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
PLACES = ("the mirror alone", "the local folder alone", "both, one slot damaged")
NOT_COMPARED = ("runtime", "per_second", "train_loss", "total_flos")
SETTINGS = {
    "num_samples": 60,
    "learning_rate": 1e-3,
    "sft_epochs": 1,
    "sft_learning_rate": 1e-2,
    "lora_rank": 4,
    "logging_steps": 1,
    "checkpoint_steps": 3,
}


def make_model(folder: Path) -> RunConfig:
    """Write a random two-layer GPT-2 with a small Japanese tokenizer; return the settings to train it."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    texts = [row[side] for row in generate_preferences(100, seed=1) for side in ("prompt", "chosen")]
    bpe.train_from_iterator(texts, 500, show_progress=False, special_tokens=["<end>"])
    ends = {"bos_token": "<end>", "eos_token": "<end>", "pad_token": "<end>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **ends)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256, "initializer_range": 0.2}
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**shape, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return RunConfig(model_name=str(folder), **SETTINGS)


class Process:
    """One process that trains and merges, and notes its phases in a file."""

    def __init__(self, root: Path, folder: Path, mirror: Path | None):
        self.notes, self.code = root / f"phases-{time.monotonic_ns()}", None
        self.notes.touch()
        self.pid = os.fork()  # of a process that has imported everything: no ten seconds for each
        if self.pid == 0:
            _run(root, folder, mirror, self.notes)

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal, or None while the process lives."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.01)
        return self.code

    def read_phases(self) -> list[tuple[str, float, float | None]]:
        """Return (phase, begin, end) in their order; the end of one that goes on, or was cut off, is None."""
        phases = []
        for line in self.notes.read_text().splitlines():
            sign, name, moment = line.split()
            if sign == "+":
                phases.append([name, float(moment), None])
            else:
                next(p for p in reversed(phases) if p[0] == name and p[2] is None)[2] = float(moment)
        return [tuple(phase) for phase in phases]

    def is_in(self, phase: str) -> bool:
        return any(name == phase and end is None for name, _, end in self.read_phases())


def _run(root: Path, folder: Path, mirror: Path | None, notes: Path) -> None:
    """Do the work of one process, and end it."""
    code = 99
    try:
        output = os.open(root / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(output, number)
        sync = os.fsync
        os.fsync = lambda number: (
            time.sleep(0.01),
            sync(number),
        )  # a slow disk: writes last long enough to hit
        for name, (module, function, stage) in PHASES.items():
            note_phase(name, sys.modules[module], function, stage, notes)
        arguments = [
            "train",
            "--config",
            str(root.parent / "config.json"),
            "--run-dir",
            str(folder),
            "--device",
            "cpu",
        ]
        code = run_command([*arguments, *(["--mirror", str(mirror)] if mirror else [])])
        if code == 0:
            code = run_command(["merge", str(folder), str(folder.with_name("merged"))])
    finally:
        sys.stdout.flush()
        os._exit(code)


def note_phase(name: str, module, function: str, stage: str | None, notes: Path) -> None:
    original = getattr(module, function)

    def note(sign):
        with open(notes, "a") as file:
            file.write(f"{sign} {name} {time.monotonic()}\n")

    @functools.wraps(original)
    def noted(*arguments, **options):
        if stage not in (None, *arguments[1:2]):
            return original(*arguments, **options)
        note("+")
        try:
            return original(*arguments, **options)
        finally:
            note("-")

    setattr(module, function, noted)


def kill(process: Process, phase: str, number: int, delay: float, sign: int) -> bool:
    """Kill a process `delay` seconds into its `number`-th time in a phase; return whether it was in it."""
    while process.poll() is None:
        begun = [begin for name, begin, _ in process.read_phases() if name == phase]
        if len(begun) > number and time.monotonic() >= begun[number] + delay:
            break
        time.sleep(0.0005)
    hit = process.poll() is None and process.is_in(phase)
    if process.poll() is None:
        os.kill(process.pid, sign)
        hit = hit and process.is_in(phase)  # SIGINT lets the phase end; at this moment it has not
    code = process.wait()
    return hit and code == (130 if sign == signal.SIGINT else -sign)


def read_result(folder: Path) -> dict:
    """Return what two runs are compared by: the bytes of the weights and rows, and the logs without times."""
    logs = [json.loads((folder / name).read_text()) for name in ("log_history.json", "sft_log_history.json")]
    lines = [[entry for entry in log if "train_runtime" not in entry] for log in logs]
    files = (
        "adapter_model.safetensors",
        "reference/adapter_model.safetensors",
        "train.jsonl",
        "held_out.jsonl",
    )
    return {
        "logs": [
            [{k: v for k, v in e.items() if not k.endswith(NOT_COMPARED)} for e in log] for log in lines
        ],
        "merged": (folder.with_name("merged") / "model.safetensors").read_bytes(),
        **{name: (folder / name).read_bytes() for name in files},
    }


def find_newest(places: list[Path]) -> tuple[str, int] | None:
    """Return (stage, step) of the newest checkpoint whose every byte is right."""
    manifests = [manifest for place in places if (manifest := verify_folder(place)) and order_of(manifest)]
    best = max(manifests, key=order_of, default=None)
    return best and (best["stage"], best["step"])


def leave(root: Path, place: str, draw: random.Random) -> tuple[Path, Path | None]:
    """Arrange what the next process finds; return its folder and its mirror."""
    folder, mirror = root / "run", root / "drive"
    if place == PLACES[0]:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(root / "run.checkpoints", ignore_errors=True)
        for name in ("merged", "merged.partial"):
            shutil.rmtree(root / name, ignore_errors=True)
    elif place == PLACES[1]:
        shutil.rmtree(mirror, ignore_errors=True)
        return folder, None
    else:
        slot = mirror / draw.choice(SLOT_NAMES)
        files = [path for path in sorted(slot.rglob("*")) if path.is_file() and path.stat().st_size]
        if files:
            damaged = draw.choice(files)
            damaged.write_bytes(damaged.read_bytes()[:-1])
    return folder, mirror


def kill_and_resume(
    root: Path, reference: dict, draw: random.Random, phase: str, sign: int, place: str, twice: bool
):
    """Kill one run once or twice, go on, and compare; return what happened, None where no kill hit."""
    root.mkdir()
    folder, mirror, kills = root / "run", root / "drive", []
    for number in range(2 if twice else 1):
        spans = [end - begin for name, begin, end in reference["phases"] if name == phase]
        chosen = draw.randrange(len(spans)) if not number else 0
        process = Process(root, folder, mirror)
        if kill(process, phase, chosen, draw.random() * spans[chosen] * 0.6, sign):
            kills.append([phase, signal.Signals(sign).name])
        folder, mirror = leave(root, place, draw)
    if not kills:
        shutil.rmtree(root)
        return None
    places = list_checkpoints(root / "run.checkpoints") + [root / "drive" / name for name in SLOT_NAMES]
    newest = find_newest([path for path in places if path.is_dir()])
    finished = any(verify_folder(p) and not _stopped(p) for p in (folder, mirror) if p)
    process = Process(root, folder, mirror)
    assert process.wait() == 0, f"the resumed run failed: {root / 'output.txt'}"
    metrics = json.loads((folder / "metrics.json").read_text())
    result = read_result(folder)
    assert [name for name in result if result[name] != reference["result"][name]] == [], f"differs: {root}"
    if not finished:
        expected = dict(reference["steps"])
        for stage in ("sft", "dpo"):
            if newest and (newest[0] == "dpo" or stage == "sft"):
                expected[stage] = 0 if stage != newest[0] else expected[stage] - newest[1]
        assert metrics["steps_executed"] == expected, f"{metrics['steps_executed']}, not {expected}: {root}"
    shutil.rmtree(root)
    return {"kills": kills, "from": place, "newest": newest, "resumed_at": metrics["resumed_at"]}


def _stopped(folder: Path) -> bool:
    return "stopped" in json.loads((folder / "metrics.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=30, help="runs that are killed")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    root = arguments.folder.resolve()
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    import dpo_helpers.judge.measure
    import dpo_helpers.keep.share
    import dpo_helpers.train.fast
    import dpo_helpers.train.stages  # noqa: F401, and with them torch, transformers and TRL

    make_model(root / "model").save(root / "config.json")
    begun, done, draw = time.monotonic(), [], random.Random(arguments.seed)
    (root / "whole").mkdir()
    whole = Process(root / "whole", root / "whole" / "run", root / "whole" / "drive")
    assert whole.wait() == 0, root / "whole" / "output.txt"
    steps = json.loads((root / "whole" / "run" / "metrics.json").read_text())["steps_executed"]
    reference = {"phases": whole.read_phases(), "steps": steps, "result": read_result(root / "whole" / "run")}
    tries = 0
    while len(done) < arguments.kills:
        phase = list(PHASES)[len(done) % len(PHASES)]
        sign, place = draw.choice(SIGNALS), PLACES[len(done) % len(PLACES)]
        tries += 1
        if outcome := kill_and_resume(
            root / f"{tries}", reference, draw, phase, sign, place, len(done) % 3 == 2
        ):
            done.append(outcome)
            print(len(done), json.dumps(outcome), flush=True)
    summary = {
        "runs_killed": len(done),
        "kills": sum(len(outcome["kills"]) for outcome in done),
        "missed": tries - len(done),  # the process had left the phase, or ended: not counted
        "by_phase": {phase: sum([phase] == [k[0] for k in o["kills"][:1]] for o in done) for phase in PHASES},
        "by_signal": {s.name: sum(k[1] == s.name for o in done for k in o["kills"]) for s in SIGNALS},
        "identical": len(done),
        "minutes": round((time.monotonic() - begun) / 60, 1),
    }
    (root / "soak.json").write_text(json.dumps(summary | {"runs": done}, indent=1))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
