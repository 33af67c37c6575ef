"""Compare the speed of DPO training: the seed's way, stock TRL at its best, and ours, alternating, on one
machine.

    python tools/bench.py MODEL_FOLDER outputs/bench.json [--other PYTHON] [--threads 2] [--rounds 5] [--steps 10]

MODEL_FOLDER has DialoGPT's shape and its vocabulary of 50,257 (the weights may be random). Every way is a
process of its own that trains on the same rows with the same seed, 4 pairs a step, and waits while another
computes: a round is `--steps` steps of each. `--other` is a Python with another TRL; its stock settings take
part in the search for the best one.

The arithmetic that must be done for a pair, in floating-point operations (a matrix product of k terms counts
2k):

    3 * 2 * layer_weights * (prompt + chosen + rejected - 2)    reference forward, policy forward, gradient of the activations
    3 * 2 * lora_weights  * (prompt + chosen + rejected - 2)    policy forward, gradients of the activations and of the weights
    3 * 2 * head_weights  * (chosen + rejected)                 as for the layers, but only where an answer's token is predicted

in tokens, with the prompt once. The frozen weights need no gradient, and the two tokens that end the answers
predict nothing; attention scores, norms and activations are left out. The machine's rate is that of torch.mm
at these shapes, each shape weighted with its share of the arithmetic; a way's share is (arithmetic a pair *
pairs/s) / rate.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

PAIRS_A_STEP = 4
# at the seed's 5e-6 the losses would hardly leave ln 2 in 50 steps, and a wrong gradient would not show
LEARNING_RATE = 5e-5
SEED = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}  # the rest as DPOConfig comes
PLAIN = {"gradient_checkpointing": False}
# what can be set in a DPOConfig at both ends of the version range; `padding_free` is accepted there and does
# nothing
STOCK = {
    "4x1": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, **PLAIN},
    "2x2": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **PLAIN},
    "1x4": {**SEED, **PLAIN},
}
STOCK["4x1, reference first"] = {
    **STOCK["4x1"],
    "precompute_ref_log_probs": True,
    "precompute_ref_batch_size": 16,
}


def make_rows(count: int) -> list[dict]:
    from dpo_helpers.data.generate import generate_preferences, split_rows

    return split_rows(generate_preferences(max(1000, 2 * count), 42), 0.2, 42)[0][:count]


def work(job: dict) -> None:
    """Train one way, printing a line and waiting for one before every `steps` steps; then print what was
    measured.
    """
    import torch

    torch.set_num_threads(job["threads"])
    from transformers import TrainerCallback, set_seed
    from trl import DPOConfig, DPOTrainer

    from dpo_helpers.config import RunConfig
    from dpo_helpers.machine import choose_micro_batch, choose_precision, measure_peak_memory
    from dpo_helpers.model.load import load_base_model, make_lora_config
    from dpo_helpers.tables import quiet_libraries
    from dpo_helpers.train.trainers import make_dataset

    quiet_libraries()
    config = RunConfig(model_name=job["model"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = choose_precision(device, torch.cuda.get_device_capability() if device == "cuda" else None)
    settings, trainer_class = job["settings"], DPOTrainer
    if settings == "ours":
        from dpo_helpers.train.fast import FastDPOTrainer as trainer_class

        size = choose_micro_batch(config, device)
        settings = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": PAIRS_A_STEP // size,
            **PLAIN,
        }
    rows = make_rows(job["rounds"] * job["steps"] * PAIRS_A_STEP)

    class TakeTurns(TrainerCallback):
        def __init__(self):
            self.seconds, self.cpu_seconds, self.started = [], [], (0.0, 0.0)

        def on_step_begin(self, args, state, control, **_):
            if state.global_step % job["steps"] == 0:
                wait_for_turn()
                self.started = time.perf_counter(), time.process_time()

        def on_step_end(self, args, state, control, **_):
            if state.global_step % job["steps"] == 0:
                self.seconds.append(time.perf_counter() - self.started[0])
                self.cpu_seconds.append(time.process_time() - self.started[1])

    def wait_for_turn():
        print("ready", file=sys.__stdout__, flush=True)
        sys.stdin.readline()

    turns = TakeTurns()
    sys.stdout = sys.stderr  # the libraries' lines must not mix with ours
    wait_for_turn()
    set_seed(config.seed)
    model, tokenizer = load_base_model(config)
    start, cpu_start = time.perf_counter(), time.process_time()
    trainer = trainer_class(
        model=model,
        args=DPOConfig(
            job["folder"],
            num_train_epochs=1,
            beta=config.beta,
            learning_rate=LEARNING_RATE,
            max_length=config.max_length,
            seed=config.seed,
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            use_cpu=device == "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=device == "cuda",
            **settings,
        ),
        train_dataset=make_dataset(rows, tokenizer),
        processing_class=tokenizer,
        peft_config=make_lora_config(config, model),
        callbacks=[turns],
    )
    prepared = cpu_prepared = 0.0
    if "precompute_ref_log_probs" in settings:  # done by the constructor, and part of the price
        prepared, cpu_prepared = time.perf_counter() - start, time.process_time() - cpu_start
    trainer.train()
    result = {
        "seconds": [value + prepared / job["rounds"] for value in turns.seconds],
        "cpu_seconds": [value + cpu_prepared / job["rounds"] for value in turns.cpu_seconds],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "peak_memory_bytes": measure_peak_memory(device),
        "trl": version("trl"),
    }
    print("done", json.dumps(result), file=sys.__stdout__, flush=True)


def alternate(jobs: dict[str, tuple[str, dict]], log: Path, between=lambda: None) -> dict[str, dict]:
    """Run each named (Python, job) as a process, one of them computing at a time, round by round; return
    their results.
    """
    workers, results = {}, {}
    with log.open("a") as errors:
        for name, (python, job) in jobs.items():
            command = [python, __file__, "--work", json.dumps(job)]
            workers[name] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
            workers[name].stdout.readline()  # it waits before it loads the model
        while len(results) < len(workers):
            for name, worker in workers.items():
                if name in results:
                    continue
                worker.stdin.write("go\n")
                worker.stdin.flush()
                line = worker.stdout.readline()
                if line.startswith("done"):
                    results[name] = json.loads(line.removeprefix("done"))
                elif not line:
                    raise SystemExit(f"{name} ended early; see {log}")
            between()
    return results


def count_arithmetic(model_folder: str, rows: list[dict]) -> dict[str, float]:
    """Return the operations that a pair needs, the mean of the rows: in all, in the layers, in LoRA and in
    the head.
    """
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    from dpo_helpers.config import RunConfig
    from dpo_helpers.model.load import load_base_model, make_lora_config

    config = RunConfig(model_name=model_folder)
    model, tokenizer = load_base_model(config)
    prompt, chosen, rejected = (
        statistics.mean(len(tokenizer(text)["input_ids"]) for text in texts)
        for texts in (
            [row["prompt"] for row in rows],
            [row["prompt"] + row["chosen"] + tokenizer.eos_token for row in rows],
            [row["prompt"] + row["rejected"] + tokenizer.eos_token for row in rows],
        )
    )
    tokens, answers = chosen + rejected - prompt - 2, chosen + rejected - 2 * prompt
    head = model.get_output_embeddings().weight.numel()
    adapted = get_peft_model(model, make_lora_config(config, model))
    layers = sum(
        module.get_base_layer().weight.numel()
        for module in adapted.modules()
        if isinstance(module, LoraLayer)
    )
    lora = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    parts = {"layers": 6 * layers * tokens, "lora": 6 * lora * tokens, "head": 6 * head * answers}
    return {"pair": sum(parts.values()), **parts, "tokens": tokens, "answer_tokens": answers}


class MatrixRate:
    """Measures torch.mm at the shapes of GPT-2 small, once a call, because a shared machine changes its
    pace.
    """

    def __init__(self, arithmetic: dict, threads: int):
        import torch

        torch.set_num_threads(threads)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.arithmetic, self.rates = arithmetic, {"layers": [], "lora": [], "head": []}
        tokens, answers = (
            round(2 * arithmetic["tokens"]),
            round(2 * arithmetic["answer_tokens"]),
        )  # of two pairs, as on a CPU
        self.shapes = {
            "layers": [(tokens, 768, 2304), (tokens, 768, 768), (tokens, 768, 3072), (tokens, 3072, 768)],
            "lora": [(tokens, 768, 16), (tokens, 16, 2304), (tokens, 3072, 16), (tokens, 16, 3072)],
            "head": [(answers, 768, 50257), (answers, 50257, 768)],
        }

    def measure(self) -> None:
        import torch

        for part, shapes in self.shapes.items():
            operations = seconds = 0.0
            for rows, inner, columns in shapes:
                a, b = (
                    torch.randn(rows, inner, device=self.device),
                    torch.randn(inner, columns, device=self.device),
                )
                out = torch.empty(rows, columns, device=self.device)
                for measured in (False, True):
                    self._wait()
                    start = time.perf_counter()
                    for _ in range(5):
                        torch.mm(a, b, out=out)
                    self._wait()
                    if measured:
                        seconds += time.perf_counter() - start
                        operations += 5 * 2 * rows * inner * columns
            self.rates[part].append(operations / seconds)

    def _wait(self) -> None:
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()

    def summarize(self) -> dict[str, float]:
        """Return operations per second: of each part, and `rate`, of a pair's arithmetic done at these."""
        medians = {part: statistics.median(values) for part, values in self.rates.items()}
        return {
            **medians,
            "rate": self.arithmetic["pair"] / sum(self.arithmetic[part] / medians[part] for part in medians),
        }


def find_best_stock(pythons: list[str], make_job, steps: int, log: Path) -> tuple[str, str, dict]:
    """Train two short rounds with every stock setting of every Python, one after the other; return the
    fastest and all pairs/s.
    """
    speeds, places = {}, {}
    for python in pythons:
        for name, settings in STOCK.items():
            found = alternate({name: (python, make_job(settings, 2, min(2, steps)))}, log)[name]
            label = f"{name}, trl {found['trl']}"
            speeds[label], places[label] = (
                round(PAIRS_A_STEP * min(2, steps) / min(found["seconds"]), 3),
                (name, python),
            )
    return *places[max(speeds, key=speeds.get)], speeds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?")
    parser.add_argument("result", nargs="?", type=Path)
    parser.add_argument("--other", help="a Python with another TRL, for the search of the best stock setting")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        return work(arguments.work)
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    log = arguments.result.with_suffix(".log")
    log.unlink(missing_ok=True)

    def make_job(settings, rounds, steps):
        return {
            "model": arguments.model,
            "settings": settings,
            "rounds": rounds,
            "steps": steps,
            "threads": arguments.threads,
            "folder": str(arguments.result.parent / "bench-trainer"),
        }

    pythons = [sys.executable, *([arguments.other] if arguments.other else [])]
    best, best_python, candidates = find_best_stock(pythons, make_job, arguments.steps, log)
    print("stock settings, pairs/s:", json.dumps(candidates, indent=1))
    ways = {
        "seed": (sys.executable, SEED),
        "best_stock": (best_python, STOCK[best]),
        "ours": (sys.executable, "ours"),
    }
    arithmetic = count_arithmetic(
        arguments.model, make_rows(arguments.rounds * arguments.steps * PAIRS_A_STEP)
    )
    rate = MatrixRate(arithmetic, arguments.threads)
    jobs = {
        name: (python, make_job(settings, arguments.rounds, arguments.steps))
        for name, (python, settings) in ways.items()
    }
    found = alternate(jobs, log, rate.measure)

    pairs = arguments.steps * PAIRS_A_STEP
    speeds = {name: pairs / statistics.median(found[name]["seconds"]) for name in ways}
    machine = rate.summarize()

    def compare(clock: str) -> dict[str, float]:
        return {
            f"ours_vs_{name}": round(
                statistics.median(
                    a / b for a, b in zip(found[name][clock], found["ours"][clock], strict=True)
                ),
                3,
            )
            for name in ("seed", "best_stock")
        }

    differences = {
        name: max(abs(a - b) for a, b in zip(found[name]["losses"], found["ours"]["losses"], strict=True))
        for name in ("seed", "best_stock")
    }
    result = {
        "ratios": compare("seconds"),
        "ratios_of_cpu_seconds": compare(
            "cpu_seconds"
        ),  # what to look at where other programs share the machine
        "max_loss_difference": max(differences.values()),
        "loss_differences": differences,
        "loss_first_and_last": [found["ours"]["losses"][0], found["ours"]["losses"][-1]],
        "pairs_per_second": {name: round(speed, 3) for name, speed in speeds.items()},
        "seconds_of_rounds": {name: [round(value, 2) for value in found[name]["seconds"]] for name in ways},
        "peak_memory_bytes": {name: found[name]["peak_memory_bytes"] for name in ways},
        "best_stock": best,
        "stock_candidates_pairs_per_second": candidates,
        "trl": {name: found[name]["trl"] for name in ways},
        "arithmetic_per_pair": {name: round(value, 1) for name, value in arithmetic.items()},
        "matrix_operations_per_second": {name: round(value) for name, value in machine.items()},
        "share_of_matrix_rate": {
            name: round(arithmetic["pair"] * speed / machine["rate"], 3) for name, speed in speeds.items()
        },
        "settings": {
            "rounds": arguments.rounds,
            "steps": arguments.steps,
            "pairs_a_step": PAIRS_A_STEP,
            "threads": arguments.threads,
        },
    }
    arguments.result.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    print(json.dumps(result, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main()
