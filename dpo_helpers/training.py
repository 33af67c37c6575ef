"""Turns our configuration and rows into TRL's SFTTrainer and DPOTrainer, and runs them; it decides nothing that TRL decides."""

from pathlib import Path

from dpo_helpers.config import RunConfig
from dpo_helpers.environment import Machine
from dpo_helpers.modeling import check_trainable_precision, load_base_model, make_lora_config
from dpo_helpers.preferences import strip_question

ANSWER_SIDES = ("chosen", "rejected")


def format_row(row: dict, has_chat_template: bool) -> dict:
    """Return prompt, chosen and rejected as TRL reads them: plain text, or messages where the tokenizer has a template."""
    if not has_chat_template:
        return {name: row[name] for name in ("prompt", *ANSWER_SIDES)}
    answers = {side: [{"role": "assistant", "content": row[side]}] for side in ANSWER_SIDES}
    return {"prompt": [{"role": "user", "content": strip_question(row["prompt"])}], **answers}


def make_dataset(rows: list[dict], tokenizer):
    from datasets import Dataset

    return Dataset.from_list([format_row(row, bool(tokenizer.chat_template)) for row in rows])


def sample_curve_rows(held_out_rows: list[dict], count: int = 40) -> list[dict]:
    """Pick evenly spaced rows for the curve during training; the figures of the run come from all of them afterwards."""
    step = max(1.0, len(held_out_rows) / count)
    return [held_out_rows[int(i * step)] for i in range(min(count, len(held_out_rows)))]


def _shared_arguments(config: RunConfig, folder: Path, machine: Machine) -> dict:
    """What both stages hand to transformers' TrainingArguments."""
    return {
        "output_dir": str(folder),
        "seed": config.seed,
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "max_length": config.max_length,
        "max_grad_norm": config.max_grad_norm,
        "logging_steps": config.logging_steps,
        "logging_first_step": True,
        "save_strategy": "no",
        "report_to": config.report_to,
        "bf16": machine.precision == "bf16",
        "fp16": machine.precision == "fp16",
        "use_cpu": machine.device == "cpu",
        "gradient_checkpointing": False,  # at 128 tokens it costs a forward pass and saves little
        "dataloader_pin_memory": machine.device == "cuda",
        "disable_tqdm": False,  # else quiet_libraries would turn the progress table into lines of raw numbers
    }


def train_sft(config: RunConfig, train_rows: list[dict], folder, machine: Machine) -> tuple[Path | None, list[dict]]:
    """Teach the base model the chosen answers; return (folder of the warmed-up adapter, log history).

    The loss is the mean negative log-likelihood of the answers' tokens alone. With `sft_epochs` 0 there is no warm-up:
    (None, []).
    """
    if config.sft_epochs == 0:
        print("SFT_EPOCHS が 0 なので、教師あり学習は行いません。")
        return None, []
    from trl import SFTConfig, SFTTrainer

    base, tokenizer = load_base_model(config)
    # SFTTrainer reads `completion` beside a prompt, as text or as messages
    data = make_dataset(train_rows, tokenizer).remove_columns("rejected").rename_column("chosen", "completion")
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(
            num_train_epochs=config.sft_epochs,
            learning_rate=config.sft_learning_rate,
            **_shared_arguments(config, Path(folder) / "sft", machine),
        ),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=make_lora_config(config, base),
    )
    check_trainable_precision(trainer.model)
    trainer.train()
    adapter = Path(folder) / "sft" / "adapter"
    trainer.model.save_pretrained(adapter)
    return adapter, trainer.state.log_history


def build_dpo_trainer(
    config: RunConfig, train_rows: list[dict], curve_rows: list[dict], folder, machine: Machine, warmed_up: Path | None = None
):
    """Return a DPOTrainer (Rafailov et al. 2023) that trains one LoRA adapter named `default` on a freshly loaded base.

    Without a warm-up the adapter is new, and the base itself is the reference. With the folder of a warmed-up adapter it
    goes on from there, and TRL keeps a frozen copy named `ref` as the reference. `curve_rows` are held-out rows that are
    evaluated every `checkpoint_steps` for the plots.
    """
    from peft import PeftModel
    from trl import DPOConfig, DPOTrainer

    model, tokenizer = load_base_model(config)
    lora = make_lora_config(config, model)
    if warmed_up is not None:
        model, lora = PeftModel.from_pretrained(model, warmed_up, is_trainable=True), None
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            num_train_epochs=config.num_train_epochs,
            learning_rate=config.learning_rate,
            beta=config.beta,
            loss_type=[config.loss_type],
            eval_strategy="steps",
            eval_steps=config.checkpoint_steps,
            eval_on_start=True,
            per_device_eval_batch_size=8,
            **_shared_arguments(config, Path(folder) / "dpo", machine),
        ),
        train_dataset=make_dataset(train_rows, tokenizer),
        eval_dataset=make_dataset(curve_rows, tokenizer),
        processing_class=tokenizer,
        peft_config=lora,
    )
    check_trainable_precision(trainer.model)
    return trainer


def evaluate_curve_rows(trainer) -> dict:
    """Return what the trainer logs of its held-out sample now: eval_loss, eval_rewards/margins and so on.

    It is read from the log, because TRL 0.29 returns the loss alone from evaluate().
    """
    trainer.evaluate()
    return trainer.state.log_history[-1]


def train_dpo(trainer) -> None:
    """Train once; a trainer that has trained already is left alone, so that a cell run twice does no harm."""
    if trainer.state.global_step > 0:
        print("この学習は終わっています。最初からやり直すには、DPO の準備のセルから実行してください。")
        return
    trainer.train()
