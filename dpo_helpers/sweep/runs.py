"""Trains and measures one setting after another; what runs share (base, warm-up, reference) is computed
once.
"""

import copy
import random
import tempfile
from pathlib import Path
from typing import NamedTuple

from dpo_helpers.config import RunConfig
from dpo_helpers.data.generate import split_rows
from dpo_helpers.data.look import pick_rows
from dpo_helpers.data.own_rows import collect_rows
from dpo_helpers.data.prompt import strip_question
from dpo_helpers.errors import UserError
from dpo_helpers.judge.answers import check_answers, write_answers
from dpo_helpers.judge.history import summarize_training
from dpo_helpers.judge.measure import summarize_writing
from dpo_helpers.judge.scores import measure_reference_distance, score_role, summarize_scores
from dpo_helpers.machine import Machine, Stopwatch, clear_memory, measure_peak_memory
from dpo_helpers.model.load import count_parameters, load_base_model
from dpo_helpers.sweep.plan import Variation
from dpo_helpers.train.trainers import make_dataset, make_dpo_trainer, make_sft_trainer, make_shared_arguments

REFUSAL = "わかりません。"
SHOWN = 3  # answers that are kept in the record, to be read
# What only DPO reads, and what only LoRA and the warm-up read: without a warm-up the reference is the base
# itself.
DPO_KNOBS = (
    "num_train_epochs",
    "learning_rate",
    "beta",
    "loss_type",
    "sft_weight",
    "logging_steps",
    "checkpoint_steps",
    "report_to",
)
ADAPTER_KNOBS = ("max_grad_norm", "lora_rank", "lora_scale", "lora_targets", "sft_learning_rate")


def make_easy(rows: list[dict], kind: str) -> list[dict]:
    """Return rows that a rule without understanding tells apart: of the longer answers, or against one
    refusal.
    """
    if kind == "longer":
        return [row for row in rows if len(row["chosen"]) > len(row["rejected"])]
    return [{**row, "rejected": REFUSAL} for row in rows]


def flip_labels(rows: list[dict], share: float, seed: int) -> list[dict]:
    """Exchange chosen and rejected in exactly round(share * rows) rows, the same ones for the same seed."""
    picked = set(random.Random(f"{seed}/label noise").sample(range(len(rows)), round(share * len(rows))))
    return [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if i in picked else row
        for i, row in enumerate(rows)
    ]


def make_rows(
    config: RunConfig, variation: Variation, tokenizer
) -> tuple[list[dict], list[dict], list[dict]]:
    """Return (training rows, honest held-out rows, easy held-out rows: none unless the training rows are
    easy).
    """
    rows = collect_rows(config, tokenizer, variation.data_file)
    training, held_out = split_rows(rows, config.held_out_fraction, config.seed)
    easy = []
    if variation.data != "generated":
        training, easy = make_easy(training, variation.data), make_easy(held_out, variation.data)
    if variation.training_rows > len(training):
        raise UserError(
            f"学習用の行は {len(training)} 行しかありません（training_rows = {variation.training_rows}）。"
            "NUM_SAMPLES を増やしてください。"
        )
    training = training[: variation.training_rows or None]
    return flip_labels(training, variation.label_noise, config.seed), held_out, easy


def copy_model(base):
    """Return new modules over the base's own tensors.

    LoRA wraps modules and TRL patches their methods: those are a run's own. The tensors are frozen, so nobody
    changes them.
    """
    return copy.deepcopy(base, {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())})


class Shared(NamedTuple):
    """What runs with the same rows, warm-up and token settings share; references are log-probs in nats."""

    training: list[dict]
    training_reference: list[dict]
    warmed_up: Path | None
    held_out: list[dict]
    held_out_reference: list[dict]
    easy: list[dict]
    easy_reference: list[dict]


class Workshop:
    """Trains runs one by one. It holds one base model at a time, and of that what the runs on it share.

    `questions` of each run are answered: half of them new concepts, half new wordings.
    """

    def __init__(self, machine: Machine, questions: int = 100):
        self.machine, self.questions = machine, questions
        self._folder = tempfile.TemporaryDirectory()
        self._base, self._tokenizer, self._base_name, self._shared = None, None, None, {}

    def measure(self, config: RunConfig, variation: Variation) -> dict:
        """Train one run as the main notebook would, and return its figures."""
        clock = Stopwatch()
        with clock("shared"):
            self._use_base(config)
            shared = self._prepare(config, variation)
        data = make_dataset(shared.training, self._tokenizer, shared.training_reference)
        base, arguments = copy_model(self._base), self._arguments(config)
        trainer = make_dpo_trainer(config, base, self._tokenizer, data, arguments, shared.warmed_up)
        with clock("training"):
            self._train(trainer)
        with clock("evaluation"):
            metrics = self._evaluate(trainer.model, config, shared)
        metrics |= {
            **summarize_training(trainer.state.log_history),
            "steps": trainer.state.global_step,
            "training_rows": len(shared.training),
            "parameters": count_parameters(trainer.model)[1],
            "memory_gb": round(measure_peak_memory(self.machine.device) / 1e9, 3),
            "seconds": dict(clock.seconds),
        }
        trainer.accelerator.free_memory()
        del trainer
        clear_memory()
        return metrics

    def _use_base(self, config: RunConfig) -> None:
        """Load this run's base model, and let go of another one, unless it is loaded already."""
        if config.model_name != self._base_name:
            self._base, self._shared, self._base_name = None, {}, None
            base, self._tokenizer = load_base_model(config, self.machine)
            self._base, self._base_name = (
                base.to(self.machine.device).requires_grad_(False),
                config.model_name,
            )

    def _prepare(self, config: RunConfig, variation: Variation) -> Shared:
        """Return what this run shares with others on the same base, computed unless an earlier run needed
        the same.
        """
        defaults = RunConfig().as_dict()
        unread = DPO_KNOBS + (ADAPTER_KNOBS if config.sft_epochs == 0 else ())
        common = config.replace({knob: defaults[knob] for knob in unread})
        if (common, variation) not in self._shared:
            training, held_out, easy = make_rows(common, variation, self._tokenizer)
            warmed_up = self._warm_up(common, training)
            model = self._make_reference(common, warmed_up)
            parts = []
            for rows in (training, held_out, easy):
                parts.append(
                    score_role(model, self._tokenizer, rows, common.max_length, "reference") if rows else []
                )
            self._shared[common, variation] = Shared(
                training, parts[0], warmed_up, held_out, parts[1], easy, parts[2]
            )
        return self._shared[common, variation]

    def _warm_up(self, config: RunConfig, rows: list[dict]) -> Path | None:
        if config.sft_epochs == 0:
            return None
        trainer = make_sft_trainer(
            config, copy_model(self._base), self._tokenizer, rows, self._arguments(config)
        )
        self._train(trainer)
        folder = Path(self._folder.name) / f"warmed-up-{len(self._shared)}"
        trainer.model.save_pretrained(folder)
        return folder

    def _make_reference(self, config: RunConfig, warmed_up: Path | None):
        """Return a PeftModel whose role "reference" is the model before DPO."""
        from peft import PeftModel, get_peft_model

        from dpo_helpers.model.load import make_lora_config

        base = copy_model(self._base)
        if warmed_up is None:
            return get_peft_model(base, make_lora_config(config, base))
        model = PeftModel.from_pretrained(base, warmed_up)
        model.load_adapter(warmed_up, adapter_name="ref")
        return model

    def _arguments(self, config: RunConfig) -> dict:
        """The main path's arguments without checkpoints and reports: a run takes seconds and is recorded
        whole or not.
        """
        own = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
        size = config.per_device_train_batch_size
        return make_shared_arguments(config, self.machine, self._folder.name, size) | own

    def _train(self, trainer) -> None:
        from transformers import PrinterCallback

        from dpo_helpers.train.callbacks import WatchNumbers

        trainer.remove_callback(PrinterCallback)  # without a progress bar it would print every logged line
        trainer.add_callback(WatchNumbers(self.machine.precision))
        trainer.train()

    def _evaluate(self, model, config: RunConfig, shared: Shared) -> dict:
        """Score the held-out rows against the shared reference, and let the policy answer a part of them."""
        metrics, parts = {}, [("held_out", shared.held_out, shared.held_out_reference)]
        if shared.easy:
            parts.append(("easy_held_out", shared.easy, shared.easy_reference))
        for name, rows, reference in parts:
            policy = score_role(model, self._tokenizer, rows, config.max_length, "policy")
            scores = [p | r for p, r in zip(policy, reference, strict=True)]
            metrics[name] = summarize_scores(scores, config.beta)
            metrics[name]["log_ratio"] = (
                metrics[name]["margin"] / config.beta
            )  # comparable between betas, in nats
        asked = shared.held_out[: self.questions]
        written = write_answers(model, self._tokenizer, asked, config, ["policy"])["policy"]
        everything = [*shared.training, *shared.held_out]
        checks = {way: check_answers(texts, asked, everything) for way, texts in written.items()}
        pairs = [(row["prompt"], text) for row, text in zip(asked, written["greedy"], strict=True)]
        metrics["distance"] = measure_reference_distance(model, self._tokenizer, pairs, config.max_length)
        metrics["writing"] = {
            kind: roles["policy"] for kind, roles in summarize_writing({"policy": checks}, asked).items()
        }
        texts = {row["prompt"]: text for row, text in zip(asked, written["greedy"], strict=True)}
        metrics["shown"] = [
            {"question": strip_question(row["prompt"]), "answer": texts[row["prompt"]]}
            for row in pick_rows(asked, SHOWN, config.seed)
        ]
        return metrics
