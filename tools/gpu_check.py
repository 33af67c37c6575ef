"""Train on this machine's GPU, check the numbers there, and measure; without a GPU it ends with 0.

    python tools/gpu_check.py [MODEL_FOLDER ...] [--device cuda] [--rows 160]

Every model ("embedded" and the folders given) is trained in each precision that the GPU has, by the fast
trainer and by TRL's own. It fails where a trained weight is not float32, the first loss is not ln 2, a number
is NaN, or the trainers' losses part. `--device cpu` only runs the check's own code.
"""

import argparse
import math
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from dpo_helpers.config import RunConfig
from dpo_helpers.data.generate import generate_preferences, split_rows
from dpo_helpers.keep.run import open_run
from dpo_helpers.machine import clear_memory, describe_machine, find_machine, measure_peak_memory
from dpo_helpers.tables import quiet_libraries
from dpo_helpers.train.stages import train_dpo
from dpo_helpers.train.trainers import build_dpo_trainer

FIRST_LOSS = {"fp32": 1e-4, "bf16": 0.02, "fp16": 0.02}  # how far from ln 2
SAME_LOSS = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.05}  # between the trainers, the largest of all steps
CAPABILITIES = {"fp32": (6, 0), "fp16": (7, 5), "bf16": (8, 0)}


def train_once(config, machine, sides) -> list[float]:
    """Train, print speed and memory and what is wrong, and return the losses; problems end with NaN."""
    with tempfile.TemporaryDirectory() as folder:
        run = open_run(config, Path(folder) / "run", machine)
        run.check_rows(*sides)
        trainer = build_dpo_trainer(run, config, machine, *sides)
        trainer.args.eval_strategy, trainer.args.eval_on_start, trainer.args.save_strategy = "no", False, "no"
        if machine.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        trainer = train_dpo(run, config, machine, *sides, trainer)
        speed = len(sides[0]) / (time.perf_counter() - start)
        run.close()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trained = {str(p.dtype) for p in trainer.model.parameters() if p.requires_grad}
    wrong = {
        f"trained weights in {trained}": trained != {"torch.float32"},
        "NaN or infinity in the losses": not all(map(math.isfinite, losses)),
        f"first loss {losses[0]:.5f}": abs(losses[0] - math.log(2)) > FIRST_LOSS[machine.precision],
        "the fast trainer took the stock path": not getattr(trainer, "is_exact", True),
    }
    problems = [text for text, is_so in wrong.items() if is_so]
    memory = measure_peak_memory(machine.device) / 1e9
    print(
        f"  {machine.precision}, {config.trainer}: {speed:.2f} pairs/s, {memory:.2f} GB, "
        f"{run.progress.micro_batch} pairs at once, loss {losses[0]:.4f} → {losses[-1]:.4f} "
        f"{'; '.join(problems) or 'OK'}",
        flush=True,
    )
    del trainer
    clear_memory()
    return [math.nan] if problems else losses


def check_model(name: str, machine, count: int) -> bool:
    """Train a model in every precision both ways; return whether all was right."""
    training, held_out = split_rows(generate_preferences(max(200, 2 * count), 42), 0.3, 42)
    sides, good = (training[:count], held_out), True
    config = RunConfig(model_name=name, sft_epochs=0, learning_rate=5e-5, logging_steps=1)
    print(name)
    precisions = CAPABILITIES if machine.device == "cuda" else {"fp32": None}
    for precision, capability in precisions.items():
        if capability and capability > max(machine.capability, (7, 5)):
            continue
        pretended = replace(machine, capability=capability)
        both = [config.replace({"trainer": trainer}) for trainer in ("fast", "stock")]
        fast, stock = (train_once(each, pretended, sides) for each in both)
        # NaN is never below: a problem counts here, too
        good &= max(abs(a - b) for a, b in zip(fast, stock, strict=False)) < SAME_LOSS[precision]
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rows", type=int, default=160)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("このマシンには CUDA の GPU がないので、GPU での確認は行いません。")
        return 0
    quiet_libraries()
    machine = find_machine(arguments.device)
    print(describe_machine(machine))
    return (
        0
        if all([check_model(name, machine, arguments.rows) for name in ("embedded", *arguments.models)])
        else 1
    )


if __name__ == "__main__":
    sys.exit(main())
