"""Measure speed on this machine; ways take turns, so that another program slows all of them: look at ratios.

    python tools/bench.py training MODEL [--other PYTHON]    ours, the seed's way, the best stock TRL
    python tools/bench.py generation MODEL                   32 questions in one call, and one by one
    python tools/bench.py sweep MODEL                        eight settings in one workshop, and one by one
    python tools/bench.py checkpoints MODEL                  a run with checkpoints and a mirror, and without

MODEL is a folder or "embedded"; `tools/build_models.py shape` makes one in DialoGPT's shape. `--other` is a
Python with another TRL. `training` also counts the arithmetic that a pair needs: 6 operations for each weight
and token (reference, policy, gradient), the prompt once, the head for the answers alone; it is compared with
what torch.mm reaches at fixed shapes, those of GPT-2 small, measured in every round.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import trl
from peft import get_peft_model
from peft.tuners.lora import LoraLayer

from dpo_helpers.config import RunConfig
from dpo_helpers.data.generate import generate_preferences, split_rows
from dpo_helpers.keep.run import open_run
from dpo_helpers.machine import choose_micro_batch, find_machine
from dpo_helpers.model.answer import generate_response
from dpo_helpers.model.load import load_base_model, make_lora_config
from dpo_helpers.sweep.plan import make_plan
from dpo_helpers.sweep.runs import Workshop, make_rows
from dpo_helpers.tables import quiet_libraries
from dpo_helpers.train.fast import FastDPOTrainer
from dpo_helpers.train.stages import train_dpo
from dpo_helpers.train.trainers import build_dpo_trainer, make_dataset, make_shared_arguments

PAIRS = 4  # a step
SEED = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "gradient_checkpointing": True}
FOUR = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
FIRST = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 16}
# What can be set in a DPOConfig at both ends of the version range; the rest is as in the package.
STOCK = {"4x1": FOUR, "1x4": SEED | {"gradient_checkpointing": False}, "4x1, reference first": FOUR | FIRST}
SHAPES = [(256, 768, 2304), (256, 768, 3072), (256, 3072, 768), (128, 768, 50257)]  # rows, inner, columns


def alternate(ways: dict, rounds: int, between=lambda: None) -> dict[str, list]:
    """Call each way in turn, round by round; return {name: results}."""
    found = {name: [] for name in ways}
    for _ in range(rounds):
        for name, call in ways.items():
            found[name].append(call())
        between()
    return found


def time_call(call):
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def median_ratio(slower: list[float], faster: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(slower, faster, strict=True)), 3)


def make_sides(count: int) -> tuple[list[dict], list[dict]]:
    training, held_out = split_rows(generate_preferences(1000, 42), 0.3, 42)
    return training[:count], held_out


def train_one_way(job: dict) -> dict:
    """Train `steps` steps with job["settings"] ("ours", or DPOConfig's); return seconds and losses."""
    torch.set_num_threads(job["threads"])
    # at the seed's 5e-6 the losses would hardly leave ln 2, and a wrong gradient would not show
    config, machine = RunConfig(model_name=job["model"], learning_rate=5e-5), find_machine()
    is_ours, settings = job["settings"] == "ours", job["settings"]
    arguments = make_shared_arguments(
        config, machine, job["folder"], choose_micro_batch(config, machine.device)
    )
    arguments |= {"save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    arguments |= {} if is_ours else settings
    model, tokenizer = load_base_model(config, machine)
    data = make_dataset(make_sides(job["steps"] * PAIRS)[0], tokenizer)
    start = time.perf_counter()
    trainer = (FastDPOTrainer if is_ours else trl.DPOTrainer)(
        model=model,
        args=trl.DPOConfig(learning_rate=config.learning_rate, beta=config.beta, **arguments),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=make_lora_config(config, model),
    )
    if "precompute_ref_log_probs" not in arguments:  # the constructor runs the reference: part of the price
        start = time.perf_counter()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"seconds": time.perf_counter() - start, "losses": losses, "trl": trl.__version__}


def count_arithmetic(name: str, rows: list[dict]) -> float:
    """Return the operations that a pair needs, the mean of the rows."""
    config = RunConfig(model_name=name)
    model, tokenizer = load_base_model(config)
    head = model.get_output_embeddings().weight.numel()
    adapted = get_peft_model(model, make_lora_config(config, model))
    layers = [module.get_base_layer() for module in adapted.modules() if isinstance(module, LoraLayer)]
    weights = sum(layer.weight.numel() for layer in layers)
    weights += sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    columns = ("prompt", "chosen", "rejected")
    lengths = [statistics.mean(len(tokenizer(row[c])["input_ids"]) for row in rows) for c in columns]
    return 6 * (weights * sum(lengths) + head * sum(lengths[1:]))


def measure_rate(device: str) -> float:
    """Return the operations per second that torch.mm reaches at the fixed shapes."""
    operations = seconds = 0.0
    for rows, inner, columns in SHAPES:
        a, b = torch.randn(rows, inner, device=device), torch.randn(inner, columns, device=device)
        for _ in range(6):
            start = time.perf_counter()
            torch.mm(a, b).sum().item()  # waits for the device
            seconds += time.perf_counter() - start
            operations += 2 * rows * inner * columns
    return operations / seconds


def bench_training(arguments) -> dict:
    def train(python, settings, steps):
        with tempfile.TemporaryDirectory() as folder:
            job = {"model": arguments.model, "settings": settings, "steps": steps, "folder": folder}
            command = [python, __file__, "--work", json.dumps(job | {"threads": arguments.threads})]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    candidates, rates, device = {}, [], find_machine().device
    for python, (name, settings) in itertools.product({sys.executable, arguments.other}, STOCK.items()):
        found = train(python, settings, 4)
        candidates[f"{name}, trl {found['trl']}"] = (round(found["seconds"], 2), python, settings)
    best = min(candidates, key=lambda name: candidates[name][0])
    places = {"seed": (sys.executable, SEED), "best_stock": candidates[best][1:]}
    places["ours"] = (sys.executable, "ours")
    ways = {name: lambda at=at: train(*at, arguments.steps) for name, at in places.items()}
    found = alternate(ways, arguments.rounds, lambda: rates.append(measure_rate(device)))
    seconds = {name: [result["seconds"] for result in results] for name, results in found.items()}
    pairs, losses = arguments.steps * PAIRS, {name: results[0]["losses"] for name, results in found.items()}
    speeds = {name: pairs / statistics.median(values) for name, values in seconds.items()}
    work, rate = count_arithmetic(arguments.model, make_sides(pairs)[0]), statistics.median(rates)
    parts = zip(losses["seed"], losses["best_stock"], losses["ours"], strict=True)
    return {
        "ours_vs_seed": median_ratio(seconds["seed"], seconds["ours"]),
        "ours_vs_best_stock": median_ratio(seconds["best_stock"], seconds["ours"]),
        "largest_difference_of_losses": max(max(part) - min(part) for part in parts),
        "pairs_per_second": speeds,
        "share_of_matrix_rate": {name: round(work * speed / rate, 3) for name, speed in speeds.items()},
        "gigaflop_a_pair": work / 1e9,
        "matrix_gigaflop_per_second": rate / 1e9,
        "best_stock": best,
        "seconds_of_stock_settings": {name: value[0] for name, value in candidates.items()},
    }


def bench_generation(arguments) -> dict:
    """Take a trained model for equal answers: random weights make near ties, which rounding decides."""
    model, tokenizer = load_base_model(RunConfig(model_name=arguments.model))
    asked = list(dict.fromkeys(row["prompt"] for row in make_sides(400)[0]))[:32]
    generate_response(model, tokenizer, asked[:2], max_new_tokens=4)  # caches and imports
    ways = {
        "alone": lambda: time_call(lambda: [generate_response(model, tokenizer, each) for each in asked]),
        "together": lambda: time_call(lambda: generate_response(model, tokenizer, asked)),
    }
    found = alternate(ways, arguments.rounds)
    seconds = {name: [taken for taken, _ in results] for name, results in found.items()}
    same = sum(a == b for a, b in zip(found["alone"][0][1], found["together"][0][1], strict=True))
    return {"ratio": median_ratio(*seconds.values()), "seconds": seconds, "same_answers": same}


def train_a_run(config, sides, keeps: bool, mirror: bool = False) -> float:
    """Return the seconds of one DPO training by the main path, with or without checkpoints."""
    machine = find_machine()
    with tempfile.TemporaryDirectory() as folder:
        run = open_run(config, Path(folder) / "run", machine, Path(folder) / "drive" if mirror else None)
        run.check_rows(*sides)
        trainer = build_dpo_trainer(run, config, machine, *sides)
        trainer.args.save_strategy = "steps" if keeps else "no"
        seconds, _ = time_call(lambda: train_dpo(run, config, machine, *sides, trainer))
        run.close()
    return seconds


def bench_sweep(arguments) -> dict:
    """Both ways train on the same rows; the sweep's shared part (reference, scores) counts in full."""
    common = {"model_name": arguments.model, "num_samples": 100, "sft_epochs": 0} | FOUR
    plan = make_plan({"learning_rate": [5e-6, 1e-5, 2e-5, 5e-5], "beta": [0.1, 0.5]}, common)
    _, tokenizer = load_base_model(plan[0].config)
    workshop, seconds = Workshop(find_machine(), questions=1), {"alone": 0.0, "sweep": 0.0}
    for experiment in plan:
        measured = workshop.measure(experiment.config, experiment.variation)["seconds"]
        seconds["sweep"] += measured["training"] + measured["shared"]
        sides = make_rows(experiment.config, experiment.variation, tokenizer)[:2]
        seconds["alone"] += train_a_run(experiment.config, sides, keeps=True)
    return {"ratio": round(seconds["alone"] / seconds["sweep"], 3), "seconds": seconds}


def bench_checkpoints(arguments) -> dict:
    config, sides = RunConfig(model_name=arguments.model, sft_epochs=0), make_sides(200)
    train_a_run(config, (sides[0][:8], sides[1]), keeps=True)  # caches and imports
    ways = {
        "with": lambda: train_a_run(config, sides, keeps=True, mirror=True),
        "without": lambda: train_a_run(config, sides, keeps=False),
    }
    seconds = alternate(ways, arguments.rounds)
    return {"ratio": median_ratio(*seconds.values()), "seconds": seconds}


def main() -> None:
    jobs = {
        "training": bench_training,
        "generation": bench_generation,
        "sweep": bench_sweep,
        "checkpoints": bench_checkpoints,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=jobs)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--other", metavar="PYTHON", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="of one round of `training`")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = {"what": arguments.what, "model": arguments.model} | jobs[arguments.what](arguments)
    print(json.dumps(found, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    quiet_libraries()
    if sys.argv[1:2] == ["--work"]:  # one way of `training`, in a process of its own
        print(json.dumps(train_one_way(json.loads(sys.argv[2]))))
    else:
        main()
