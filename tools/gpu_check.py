"""Train on this machine's GPU, check the numbers there, and measure: `make gpu-check`. Without a GPU it says
so and ends with 0.

    python tools/gpu_check.py [MODEL_FOLDER ...] [--device cuda] [--rows 160] [--result outputs/gpu_check.json]

Every model ("embedded" and, if given, a folder in DialoGPT's shape) is trained in each precision that the GPU
has (a T4's fp16 everywhere), by the fast trainer and by TRL's own. It fails where a trained weight is not
float32, the first loss is not ln 2, a number is NaN, or the two trainers' losses part. `--device cpu` only
runs the check's own code.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

FIRST_LOSS = {"fp32": 1e-4, "bf16": 0.02, "fp16": 0.02}  # how far from ln 2
SAME_LOSS = {
    "fp32": 1e-3,
    "bf16": 0.05,
    "fp16": 0.05,
}  # the largest difference between the trainers, of all steps
PACKS = (
    512,
    2048,
    4096,
    8192,
)  # tokens of one forward pass; environment.PACK_TOKENS["cuda"] should be about the fastest


def train_once(config, machine, rows, held_out_rows) -> dict:
    """Return losses, pairs/s and peak memory of one DPO training, and what is wrong with it."""
    import torch

    from dpo_helpers.keep.run import open_run
    from dpo_helpers.machine import clear_memory, measure_peak_memory
    from dpo_helpers.train.trainers import build_dpo_trainer, train_dpo

    with tempfile.TemporaryDirectory() as folder:
        run = open_run(config, Path(folder) / "run", machine)
        run.use_rows(rows, held_out_rows)
        trainer = build_dpo_trainer(run)
        trainer.args.eval_strategy, trainer.args.eval_on_start, trainer.args.save_strategy = "no", False, "no"
        if machine.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        trainer = train_dpo(run, trainer)
        seconds = time.perf_counter() - start
        run.close()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trained = {str(p.dtype) for p in trainer.model.parameters() if p.requires_grad}
    problems = [
        text
        for wrong, text in (
            (trained != {"torch.float32"}, f"trained weights in {trained}"),
            (
                (trainer.args.bf16, trainer.args.fp16)
                != (machine.precision == "bf16", machine.precision == "fp16"),
                "another precision",
            ),
            (not all(map(math.isfinite, losses)), "NaN or infinity in the losses"),
            (abs(losses[0] - math.log(2)) > FIRST_LOSS[machine.precision], f"first loss {losses[0]:.5f}"),
            (not getattr(trainer, "is_exact", True), "the fast trainer took the stock path"),
        )
        if wrong
    ]
    result = {
        "pairs_per_second": round(len(rows) / seconds, 2),
        "peak_memory_bytes": measure_peak_memory(machine.device),
    }
    result |= {
        "micro_batch": run.micro_batch,
        "losses": [round(loss, 5) for loss in losses],
        "problems": problems,
    }
    del trainer
    clear_memory()
    return result


def check_model(name: str, machine, count: int) -> dict:
    """Train a model in every precision both ways, then with packs of other lengths; return {what: result}."""
    from dpo_helpers import machine as environment
    from dpo_helpers.config import RunConfig
    from dpo_helpers.data.generate import generate_preferences, split_rows

    rows, held_out_rows = split_rows(generate_preferences(max(200, 2 * count), 42), 0.2, 42)
    config = RunConfig(
        model_name=name, sft_epochs=0, learning_rate=5e-5, gradient_accumulation_steps=4, logging_steps=1
    )
    capabilities = (
        {"fp32": (6, 0), "fp16": (7, 5), "bf16": (8, 0)} if machine.device == "cuda" else {"fp32": None}
    )
    results = {}
    for precision, capability in capabilities.items():
        if capability and capability > max(machine.capability, (7, 5)):
            continue
        pretended = replace(machine, capability=capability)
        both = {
            trainer: train_once(config.replace({"trainer": trainer}), pretended, rows[:count], held_out_rows)
            for trainer in ("fast", "stock")
        }
        difference = max(
            abs(a - b) for a, b in zip(both["fast"]["losses"], both["stock"]["losses"], strict=True)
        )
        if not difference < SAME_LOSS[precision]:
            both["fast"]["problems"].append(f"losses differ by {difference:.4f} from the stock trainer's")
        results |= {f"{precision}, {trainer}": result for trainer, result in both.items()}
    large = config.replace({"gradient_accumulation_steps": 32})
    usual = environment.PACK_TOKENS[machine.device]
    for tokens in PACKS if machine.device == "cuda" else ():
        environment.PACK_TOKENS[machine.device] = tokens  # one dict, which the fast trainer reads too
        results[f"{machine.precision}, 32 pairs a step, packs of {tokens} tokens"] = train_once(
            large, machine, rows[:count], held_out_rows
        )
    environment.PACK_TOKENS[machine.device] = usual
    return results


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--result", type=Path, default=Path("outputs/gpu_check.json"))
    arguments = parser.parse_args()
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("このマシンには CUDA の GPU がないので、GPU での確認は行いません。")
        return 0
    from dpo_helpers.machine import describe_machine, find_machine
    from dpo_helpers.tables import quiet_libraries

    quiet_libraries()
    machine = find_machine(arguments.device)
    print(describe_machine(machine))
    results = {name: check_model(name, machine, arguments.rows) for name in ("embedded", *arguments.models)}
    failed = 0
    for name, found in results.items():
        for what, result in found.items():
            failed += bool(result["problems"])
            memory = result["peak_memory_bytes"] / 1e9
            print(
                f"{name}: {what}: {result['pairs_per_second']} pairs/s, {memory:.2f} GB, 1 回に "
                f"{result['micro_batch']} 組, "
                f"loss {result['losses'][0]} → {result['losses'][-1]} "
                f"{'; '.join(result['problems']) or 'OK'}"
            )
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    written = {
        "machine": machine.name,
        "capability": machine.capability,
        "torch": torch.__version__,
        "models": results,
    }
    arguments.result.write_text(json.dumps(written, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
