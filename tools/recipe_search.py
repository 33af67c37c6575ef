"""Measure alternative recipes on a local, really pretrained model: 200 training and 60 held-out rows each.

    python tools/recipe_search.py MODEL_FOLDER RESULTS.jsonl [--minutes 45]

Every finished setting is one JSON line; run again and only the missing ones run. The last thing printed is a Markdown table.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from dpo_helpers.answer_quality import check_answer
from dpo_helpers.config import RunConfig
from dpo_helpers.environment import find_machine
from dpo_helpers.evaluation import score_rows, summarize_scores
from dpo_helpers.inference import generate_response, use_stage
from dpo_helpers.monitoring import summarize_training
from dpo_helpers.preferences import generate_preferences, split_rows, strip_question
from dpo_helpers.run import open_run
from dpo_helpers.training import build_dpo_trainer, train_dpo, train_sft

# What each row of the table changes against the defaults of RunConfig. The seed's values (5e-6, one epoch) are in every row.
SETTINGS = {
    "lora_scale 16, sft_epochs 2 (default)": {},
    "lora_scale 2, lora_targets default, sft_epochs 0": {"lora_scale": 2, "lora_targets": "default", "sft_epochs": 0},
    "lora_scale 64, sft_epochs 0": {"lora_scale": 64, "sft_epochs": 0},
    "lora_scale 16, sft_epochs 0": {"lora_scale": 16, "sft_epochs": 0},
    "lora_scale 32, sft_epochs 2, sft_learning_rate 5e-5": {"lora_scale": 32, "sft_learning_rate": 5e-5},
}
TRAINING_ROWS, HELD_OUT_ROWS = 200, 60


def measure(model_folder: str, changes: dict) -> dict:
    config = RunConfig(
        model_name=model_folder,
        num_samples=300,
        logging_steps=5,
        checkpoint_steps=1000,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        **changes,
    )  # the same losses as 1 × 4, sooner
    train_rows, held_out_rows = split_rows(generate_preferences(config.num_samples, config.seed), config.held_out_fraction, config.seed)
    train_rows, held_out_rows = train_rows[:TRAINING_ROWS], held_out_rows[:HELD_OUT_ROWS]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = open_run(config, folder, find_machine("cpu"))
        run.use_rows(train_rows, held_out_rows)
        warmed_up = train_sft(run)
        sft_seconds = time.perf_counter() - start
        trainer = train_dpo(run, build_dpo_trainer(run, warmed_up), warmed_up)
        run.close()
    seconds = time.perf_counter() - start
    tokenizer = trainer.processing_class
    scores = score_rows(trainer.model, tokenizer, held_out_rows, config.max_length)
    result = {
        **summarize_training(trainer.state.log_history),
        "held_out": summarize_scores(scores, config.beta),
        "by_kind": {
            kind: summarize_scores([s for s, row in zip(scores, held_out_rows, strict=True) if row["rejection_kind"] == kind], config.beta)
            for kind in sorted({row["rejection_kind"] for row in held_out_rows})
        },
        "seconds": round(seconds),
        "sft_seconds": round(sft_seconds),
        "sft_loss": [entry["loss"] for entry in run.sft_log if "loss" in entry],
        "train_loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }
    asked = held_out_rows[:10]
    questions = [strip_question(row["prompt"]) for row in asked]
    for stage in ("base", "reference", "policy"):
        with use_stage(trainer.model, stage):
            answers = generate_response(trainer.model, tokenizer, questions, max_new_tokens=60)
        checks = [check_answer(answer, row["concept"]) for answer, row in zip(answers, asked, strict=True)]
        result[stage] = {
            "answers": dict(zip(questions, answers, strict=True)),
            **{name: sum(check[name] for check in checks) for name in ("ends", "names", "clean")},
        }
    return result


def print_table(lines: list[dict]) -> None:
    print("| setting | final train loss | held-out loss | accuracy | margin | ends 。 | names | clean | s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for line in lines:
        held, policy = line["held_out"], line["policy"]
        print(
            f"| {line['setting']} | {line['final_train_loss']:.3f} | {held['loss']:.3f} | {held['accuracy']:.2f} | {held['margin']:.2f} "
            f"| {policy['ends']}/10 | {policy['names']}/10 | {policy['clean']}/10 | {line['seconds']} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("results", type=Path)
    parser.add_argument("--minutes", type=float, default=45, help="start no further setting after this many minutes")
    arguments = parser.parse_args()
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in arguments.results.read_text().splitlines()] if arguments.results.exists() else []
    start = time.monotonic()
    for name, changes in SETTINGS.items():
        if any(line["setting"] == name for line in lines) or time.monotonic() - start > 60 * arguments.minutes:
            continue
        print(f"--- {name}", flush=True)
        line = {"setting": name, "changes": changes, **measure(arguments.model, changes)}
        with open(arguments.results, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        lines.append(line)
    print_table(lines)


if __name__ == "__main__":
    main()
