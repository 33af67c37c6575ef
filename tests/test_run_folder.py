"""What a saved run promises to a stranger: every figure can be recomputed, and the adapter answers as the
trained one did.
"""

import json
import math
import subprocess
import sys

import pytest

from dpo_helpers.config import RunConfig
from dpo_helpers.data.prompt import PROMPT_TEMPLATE
from dpo_helpers.keep.result import load_run
from dpo_helpers.model.answer import generate_response

pytestmark = pytest.mark.versions

# Plain transformers and PEFT, on purpose without dpo_helpers: this is what the README's reader has.
RECOMPUTE = """
import json, sys, torch
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

run = Path(sys.argv[1])
base = json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"]
tokenizer = AutoTokenizer.from_pretrained(run)
rows = [json.loads(line) for line in (run / "held_out.jsonl").read_text().splitlines()]

def load(folder):
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(loaded, folder).eval()

def log_prob(model, prompt, answer):
    start = len(tokenizer(prompt)["input_ids"])
    ids = torch.tensor([tokenizer(prompt + answer + tokenizer.eos_token)["input_ids"][:128]])
    with torch.no_grad():
        steps = model(ids).logits[0, :-1].log_softmax(-1)
    return steps.gather(1, ids[0, 1:, None])[start - 1:, 0].sum().item()

policy, reference = load(run), load(run / "reference")
each = [(model, side) for model in (policy, reference) for side in ("chosen", "rejected")]
table = [[log_prob(model, row["prompt"], row[side]) for model, side in each] for row in rows]
asked = [row["prompt"] for row in rows[:5]]
inputs = tokenizer(asked, return_tensors="pt", padding=True, padding_side="left")
ids = policy.generate(**inputs, max_new_tokens=60, do_sample=False, pad_token_id=tokenizer.eos_token_id)
answers = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
print(json.dumps({"log_probs": table, "answers": answers}))
"""


@pytest.fixture(scope="module")
def recomputed(finished_run):
    done = subprocess.run(
        [sys.executable, "-c", RECOMPUTE, str(finished_run[0])], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_the_folder_is_complete(finished_run):
    folder, _ = finished_run
    names = [
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "reference/adapter_model.safetensors",
        "train.jsonl",
        "held_out.jsonl",
        "run_config.json",
        "metrics.json",
        "log_history.json",
        "training.png",
        "training.svg",
    ]
    assert [name for name in names if not (folder / name).is_file()] == []


def test_the_held_out_figures_can_be_recomputed_from_the_folder_alone(finished_run, recomputed):
    _, metrics = finished_run
    margins = [0.1 * ((pc - rc) - (pr - rr)) for pc, pr, rc, rr in recomputed["log_probs"]]
    assert len(margins) == metrics["held_out"]["rows"] == 30
    assert sum(math.log1p(math.exp(-m)) for m in margins) / len(margins) == pytest.approx(
        metrics["held_out"]["loss"], abs=0.01
    )
    assert sum(m > 0 for m in margins) / len(margins) == pytest.approx(
        metrics["held_out"]["accuracy"], abs=0.01
    )


def test_a_new_process_gives_the_same_log_probs_and_answers_as_the_loaded_run(finished_run, recomputed):
    from dpo_helpers.judge.scores import score_answers

    model, tokenizer, config = load_run(finished_run[0])
    rows = [json.loads(line) for line in (finished_run[0] / "held_out.jsonl").read_text().splitlines()]
    scores = score_answers(
        model.eval(),
        tokenizer,
        [(row["prompt"], row["chosen"]) for row in rows],
        config.max_length,
        batch_size=1,
    )
    lengths = [len(tokenizer(row["chosen"])["input_ids"]) + 1 for row in rows]  # EOS included
    for score, line, tokens in zip(scores, recomputed["log_probs"], lengths, strict=True):
        assert score / tokens == pytest.approx(line[0] / tokens, abs=1e-5)
    answers = generate_response(model, tokenizer, [row["prompt"] for row in rows[:5]], max_new_tokens=60)
    assert answers == [answer.strip() for answer in recomputed["answers"]]


def test_the_saved_adapter_is_the_trained_one(tiny_models, rows, start_run):
    from dpo_helpers.judge.scores import score_rows
    from dpo_helpers.keep.result import save_model
    from dpo_helpers.train.trainers import build_dpo_trainer, train_dpo

    config = RunConfig(model_name=str(tiny_models["gpt2"]), learning_rate=1e-3, sft_epochs=0)
    run = start_run(config, rows[:16], rows[16:24])
    trainer = train_dpo(run, build_dpo_trainer(run))
    trained = score_rows(trainer.model, trainer.processing_class, rows[:8], 128)
    save_model(run.folder, trainer.model, trainer.processing_class)
    model, tokenizer, _ = load_run(run.folder)
    for before, after in zip(trained, score_rows(model, tokenizer, rows[:8], 128), strict=True):
        assert after == pytest.approx(before, abs=1e-5)
    questions = [row["prompt"] for row in rows[:5]]
    assert generate_response(model, tokenizer, questions) == generate_response(
        trainer.model, tokenizer, questions
    )
    assert not (run.folder / "reference").exists()


def test_no_concept_is_on_both_sides_of_the_saved_rows(finished_run):
    sides = [
        [json.loads(line) for line in (finished_run[0] / name).read_text().splitlines()]
        for name in ("train.jsonl", "held_out.jsonl")
    ]
    training, held_out = ({row["concept"] for row in side} for side in sides)
    assert len(sides[0]) + len(sides[1]) == 150 and training and held_out and not training & held_out


def test_the_metrics_say_what_was_measured(finished_run):
    folder, metrics = finished_run
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert metrics["first_loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert metrics["steps"] == metrics["training_rows"] // 4 == 30
    assert 0 < metrics["trainable_parameters"] < metrics["total_parameters"]
    assert set(metrics["seconds"]) == {"setup", "data", "sft", "training", "evaluation", "saving"}
    assert metrics["pairs_per_second"] == pytest.approx(120 / metrics["seconds"]["training"], rel=0.01)
    assert metrics["precision"] == "fp32" and metrics["versions"]["trl"]


def test_the_log_is_transformers_own(finished_run):
    log = json.loads((finished_run[0] / "log_history.json").read_text())
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 5, 10, 15, 20, 25, 30]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [0, 10, 20, 30]


def test_the_prompt_in_the_readmes_example_is_the_projects():
    assert PROMPT_TEMPLATE == "質問: {question}\n回答:\n"
