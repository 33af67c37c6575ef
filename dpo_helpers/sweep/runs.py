"""Trains and measures one setting after another; what runs share (base, warm-up, tokens, reference) is
computed once.
"""

import copy
import random
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

from dpo_helpers.config import RunConfig
from dpo_helpers.errors import UserError

DATA_KINDS = ("generated", "longer", "refusal")
REFUSAL = "わかりません。"
SHOWN_ANSWERS = 3  # kept in the record, to be read
# What only DPO reads, and what only LoRA and the warm-up read: without a warm-up the reference is the base
# itself.
DPO_KNOBS = (
    "num_train_epochs",
    "learning_rate",
    "beta",
    "loss_type",
    "logging_steps",
    "checkpoint_steps",
    "report_to",
)
ADAPTER_KNOBS = ("max_grad_norm", "lora_rank", "lora_scale", "lora_targets", "sft_learning_rate")


@dataclass(frozen=True)
class Variation:
    """What a run changes in its rows, beside RunConfig. The held-out rows are honest in every case.

    data: "generated", or easy rows: "longer" (chosen is always the longer one), "refusal" (rejected is always
    the same). label_noise: share of training rows with chosen and rejected exchanged. training_rows: how many
    are used, 0 for all. data_file: a file of one's own instead of generated rows.
    """

    data: str = "generated"
    label_noise: float = 0.0
    training_rows: int = 0
    data_file: str = ""

    def __post_init__(self):
        problems = []
        if self.data not in DATA_KINDS:
            problems.append(f"  data = {self.data!r}：{', '.join(DATA_KINDS)} のどれかにしてください。")
        if (
            isinstance(self.label_noise, bool)
            or not isinstance(self.label_noise, (int, float))
            or not 0 <= self.label_noise <= 0.5
        ):
            problems.append(f"  label_noise = {self.label_noise!r}：0 以上 0.5 以下の数にしてください。")
        if (
            isinstance(self.training_rows, bool)
            or not isinstance(self.training_rows, int)
            or self.training_rows < 0
        ):
            problems.append(
                f"  training_rows = {self.training_rows!r}：0（すべて）以上の整数にしてください。"
            )
        if not isinstance(self.data_file, str) or (self.data_file and not Path(self.data_file).is_file()):
            problems.append(
                f"  data_file = {self.data_file!r}：ファイルが見つかりません。パスを確かめてください。"
            )
        elif self.data_file and self.data != "generated":
            problems.append("  data と data_file は一緒に使えません。どちらか一つにしてください。")
        if problems:
            raise UserError("実験の設定に誤りがあります。次の値を直してください。\n" + "\n".join(problems))
        object.__setattr__(self, "label_noise", float(self.label_noise))


VARIATION_NAMES = tuple(item.name for item in fields(Variation))


def make_easy(rows: list[dict], kind: str) -> list[dict]:
    """Return rows that a rule without understanding tells apart: of the longer answers, or against one
    refusal.
    """
    if kind == "longer":
        return [row for row in rows if len(row["chosen"]) > len(row["rejected"])]
    return [{**row, "rejected": REFUSAL} for row in rows]


def flip_labels(rows: list[dict], share: float, seed: int) -> list[dict]:
    """Exchange chosen and rejected in exactly round(share * rows) rows, picked at random and the same for
    the same seed.
    """
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
    from dpo_helpers.data.generate import split_rows
    from dpo_helpers.data.own_rows import collect_rows

    training, held_out = split_rows(
        collect_rows(config, tokenizer, variation.data_file), config.held_out_fraction, config.seed
    )
    easy = []
    if variation.data != "generated":
        twice = config.replace(
            {"num_samples": 2 * config.num_samples}
        )  # half of them have the longer chosen answer
        rows = make_easy(list(collect_rows(twice, tokenizer)), variation.data)[: config.num_samples]
        training, easy = split_rows(rows, config.held_out_fraction, config.seed)
    if variation.training_rows > len(training):
        raise UserError(
            f"学習用の行は {len(training)} 行しかありません（training_rows = "
            f"{variation.training_rows}）。NUM_SAMPLES を増やしてください。"
        )
    training = training[: variation.training_rows or None]
    return flip_labels(training, variation.label_noise, config.seed), list(held_out), easy


def copy_model(base):
    """Return new modules over the base's own tensors.

    LoRA wraps modules and TRL patches their methods: those are a run's own. The tensors are frozen, so nobody
    changes them.
    """
    return copy.deepcopy(base, {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())})


class Shared(NamedTuple):
    """What runs with the same rows, warm-up and token settings share. `tokens` also holds TRL's reference
    log-probs.
    """

    first_row: object
    tokens: object
    warmed_up: Path | None
    held_out: list[dict]
    held_out_reference: list[dict]
    easy: list[dict]
    easy_reference: list[dict]


class Workshop:
    """Trains runs one by one. It holds one base model at a time, and of that what the runs on it share."""

    def __init__(self, machine, answers: int = 20):
        self.machine, self.answers = machine, answers
        self._base_name, self._base, self._tokenizer, self._shared = None, None, None, {}
        self._folder = tempfile.TemporaryDirectory(prefix="dpo_experiments_")

    def measure(self, config: RunConfig, variation: Variation) -> dict:
        """Train one setting and return its metrics; raises callbacks.BrokenNumbers where the gradients
        become NaN or infinite.
        """
        from dpo_helpers.judge.monitoring import summarize_training
        from dpo_helpers.machine import Stopwatch, clear_memory
        from dpo_helpers.train.trainers import make_dpo_trainer

        clock = Stopwatch()
        with clock("setup"):
            self.use_base(config)
        with clock("shared"):
            shared = self.prepare(config, variation)
        trainer = make_dpo_trainer(
            config,
            copy_model(self._base),
            self._tokenizer,
            shared.first_row,
            self._arguments(config),
            shared.warmed_up,
        )
        trainer.train_dataset, trainer.precompute_ref_logps = (
            shared.tokens,
            True,
        )  # the row above was a stand-in, cheap to prepare
        with clock("training"):
            self._train(trainer)
        with clock("evaluation"):
            metrics = self._evaluate(trainer.model, config, shared)
        with clock("answers"):
            metrics |= self._measure_answers(trainer.model, config, shared.held_out) if self.answers else {}
        metrics |= {
            **summarize_training(trainer.state.log_history),
            "steps": trainer.state.global_step,
            "training_rows": len(shared.tokens),
            "parameters": sum(
                p.numel() for name, p in trainer.model.named_parameters() if "lora_" not in name
            ),
            "memory_gb": round(self._measure_memory() / 1e9, 3),
            "seconds": dict(clock.seconds),
        }
        trainer.accelerator.free_memory()
        del trainer
        clear_memory()
        return metrics

    def use_base(self, config: RunConfig) -> None:
        """Load this run's base model, and let go of another one, unless it is loaded already."""
        from dpo_helpers.keep.run import find_own_base
        from dpo_helpers.model.load import load_base_model

        name = str(find_own_base(config) or config.model_name)
        if name != self._base_name:
            self._base, self._shared, self._base_name = None, {}, None
            base, self._tokenizer = load_base_model(config)
            self._base, self._base_name = base.to(self.machine.device).requires_grad_(False), name

    def prepare(self, config: RunConfig, variation: Variation) -> Shared:
        """Return what this run shares with others on the same base, computed unless an earlier run needed
        the same.
        """
        defaults = RunConfig().as_dict()
        unread = DPO_KNOBS + (ADAPTER_KNOBS if config.sft_epochs == 0 else ())
        common = config.replace({knob: defaults[knob] for knob in unread})
        if (common, variation) not in self._shared:
            self._shared[common, variation] = self._prepare(common, variation)
        return self._shared[common, variation]

    def _prepare(self, config: RunConfig, variation: Variation) -> Shared:
        from dpo_helpers.judge.scores import score_role
        from dpo_helpers.train.trainers import make_dataset, make_dpo_trainer, make_sft_trainer

        training, held_out, easy = make_rows(config, variation, self._tokenizer)
        data, warmed_up = make_dataset(training, self._tokenizer), None
        if config.sft_epochs > 0:
            trainer = make_sft_trainer(
                config, copy_model(self._base), self._tokenizer, training, self._arguments(config)
            )
            self._train(trainer)
            warmed_up = Path(self._folder.name) / f"warmed-up-{len(self._shared)}"
            trainer.model.save_pretrained(warmed_up)
        arguments = {**self._arguments(config), "precompute_ref_log_probs": True}
        trainer = make_dpo_trainer(
            config, copy_model(self._base), self._tokenizer, data, arguments, warmed_up
        )
        scores = [
            score_role(trainer.model, self._tokenizer, rows, config.max_length, "reference")
            for rows in (held_out, easy)
        ]
        return Shared(
            data.select([0]), trainer.train_dataset, warmed_up, held_out, scores[0], easy, scores[1]
        )

    def _arguments(self, config: RunConfig) -> dict:
        """The main path's arguments without checkpoints, curves and reports: a run takes seconds and is
        recorded whole or not.
        """
        from dpo_helpers.train.trainers import make_shared_arguments

        own = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
        return (
            make_shared_arguments(config, self.machine, self._folder.name, config.per_device_train_batch_size)
            | own
        )

    def _train(self, trainer) -> None:
        from transformers import PrinterCallback

        from dpo_helpers.train.callbacks import WatchNumbers

        if self.machine.device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
        trainer.remove_callback(PrinterCallback)  # without a progress bar it would print every logged line
        trainer.add_callback(WatchNumbers(self.machine.precision))
        trainer.train()

    def _evaluate(self, model, config: RunConfig, shared: Shared) -> dict:
        """Summarize the held-out rows. To compare runs of different beta: `log_ratio` is the margin without
        it (nats), and `default_beta_loss` the loss with RunConfig's.
        """
        from dpo_helpers.judge.scores import score_role, summarize_scores

        metrics = {}
        for name, rows, reference in (
            ("held_out", shared.held_out, shared.held_out_reference),
            ("easy_held_out", shared.easy, shared.easy_reference),
        ):
            if rows:
                policy = score_role(model, self._tokenizer, rows, config.max_length, "policy")
                scores = [p | r for p, r in zip(policy, reference, strict=True)]
                metrics[name] = summarize_scores(scores, config.beta)
                metrics[name]["log_ratio"] = metrics[name]["margin"] / config.beta
                metrics[name]["default_beta_loss"] = summarize_scores(scores, RunConfig().beta)["loss"]
        return metrics

    def _measure_answers(self, model, config: RunConfig, rows: list[dict]) -> dict:
        """Let the policy answer a few held-out questions greedily; `distance` is that from its reference
        (nats per token).
        """
        from dpo_helpers.data.generate import strip_question
        from dpo_helpers.data.look import pick_rows
        from dpo_helpers.judge.answers import measure_answers, measure_reference_distance
        from dpo_helpers.model.answer import generate_response

        asked, limit = pick_rows(rows, self.answers, config.seed), config.max_length // 2
        questions = [strip_question(row["prompt"]) for row in asked]
        answers = generate_response(model, self._tokenizer, questions, max_new_tokens=limit)
        cut = [len(self._tokenizer(text, add_special_tokens=False)["input_ids"]) >= limit for text in answers]
        pairs = list(zip([row["prompt"] for row in asked], answers, strict=True))
        return {
            "answers": measure_answers(answers, [row["chosen"] for row in asked], cut),
            "distance": measure_reference_distance(model, self._tokenizer, pairs, config.max_length),
            "shown": [{"question": q, "answer": a} for q, a in zip(questions, answers, strict=True)][
                :SHOWN_ANSWERS
            ],
        }

    def _measure_memory(self) -> int:
        """Return bytes: the GPU's peak in this run, or what the whole process holds now (its peak would be
        an earlier run's).
        """
        if self.machine.device == "cuda":
            from dpo_helpers.machine import measure_peak_memory

            return measure_peak_memory("cuda")
        import psutil

        return psutil.Process().memory_info().rss
