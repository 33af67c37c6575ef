"""Turns a run's configuration and rows into TRL's SFTTrainer and DPOTrainer; the training itself goes
through train_stage.
"""

from pathlib import Path

from dpo_helpers.config import RunConfig
from dpo_helpers.data.prompt import SIDES
from dpo_helpers.data.tokens import format_row
from dpo_helpers.errors import UserError
from dpo_helpers.keep.run import Run
from dpo_helpers.machine import Machine, halve_on_out_of_memory
from dpo_helpers.model.load import check_trainable_precision, load_base_model, make_lora_config
from dpo_helpers.model.quantization import restore_adapters
from dpo_helpers.train.checks import check_training

# What these losses need beside their name: TRL's robust loss without smoothing is the sigmoid one, and
# exo_pair raises.
LOSS_ARGUMENTS = {"robust": {"label_smoothing": 0.1}, "exo_pair": {"label_smoothing": 1e-3}}


def make_dataset(rows: list[dict], tokenizer, references: list[dict] | None = None):
    """Return rows as TRL reads them; with `references` (score_role's of "reference") the reference is not run
    again.

    TRL's collator hands such columns on, and the fast trainer takes them.
    """
    from datasets import Dataset

    data = [format_row(row, bool(tokenizer.chat_template)) for row in rows]
    if references:
        columns = {side: f"reference_{side}" for side in SIDES}
        data = [
            line | {f"ref_{side}_logps": found[column] for side, column in columns.items()}
            for line, found in zip(data, references, strict=True)
        ]
    return Dataset.from_list(data)


def sample_curve_rows(held_out_rows: list[dict], count: int = 40) -> list[dict]:
    """Pick evenly spaced rows for the curve during training; the figures of the run come from all of them
    afterwards.
    """
    step = max(1.0, len(held_out_rows) / count)
    return [held_out_rows[int(i * step)] for i in range(min(count, len(held_out_rows)))]


def make_shared_arguments(config: RunConfig, machine: Machine, output_dir, micro_batch: int) -> dict:
    """What both stages hand to transformers' TrainingArguments."""
    return {
        "output_dir": str(output_dir),
        "seed": config.seed,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": config.effective_batch_size // micro_batch,
        "max_length": config.max_length,
        "max_grad_norm": config.max_grad_norm,
        "logging_steps": config.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # a broken loss must be seen
        "save_strategy": "steps",
        "save_steps": config.checkpoint_steps,
        "report_to": config.report_to,
        "bf16": machine.precision == "bf16",
        "fp16": machine.precision == "fp16",
        "use_cpu": machine.device == "cpu",
        "gradient_checkpointing": False,  # at 128 tokens it costs a forward pass and saves little
        # every adapter weight takes part in every step; else DDP would search for others
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": machine.device == "cuda",
        "disable_tqdm": False,  # else quiet_libraries would turn the progress table into lines of raw numbers
    }


def _shared_arguments(run: Run, config: RunConfig, machine: Machine, stage: str) -> dict:
    return make_shared_arguments(
        config, machine, run.checkpoints / f"writing-{stage}", run.progress.micro_batch
    )


def build_sft_trainer(run: Run, config: RunConfig, machine: Machine, train_rows: list[dict]):
    """Return an SFTTrainer on a freshly loaded base for the run's rows."""
    base, tokenizer = load_base_model(config, machine, run.base)
    run.check_base(base)
    check_training(base, tokenizer, train_rows, config)
    return make_sft_trainer(
        config, base, tokenizer, train_rows, _shared_arguments(run, config, machine, "sft")
    )


def make_sft_trainer(config: RunConfig, base, tokenizer, rows: list[dict], arguments: dict):
    """Return an SFTTrainer that puts a new adapter on `base`; `arguments` go to SFTConfig."""
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    set_seed(
        config.seed
    )  # before the adapter is made: TRL 0.29 would draw it from wherever the caller's state is
    # SFTTrainer reads `completion` beside a prompt, as text or as messages
    data = make_dataset(rows, tokenizer).remove_columns("rejected").rename_column("chosen", "completion")
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(
            num_train_epochs=config.sft_epochs, learning_rate=config.sft_learning_rate, **arguments
        ),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=make_lora_config(config, base),
    )
    if config.quantization == "4bit":
        restore_adapters(trainer.model, None)
    return _finish_trainer(trainer)


def _finish_trainer(trainer):
    from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

    trainer.remove_callback(
        DEFAULT_PROGRESS_CALLBACK
    )  # the live view stands in its place, and a look before the training needs none
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise UserError(
            "重みを分けて持つ学習（FSDP、DeepSpeed）には対応していません。"
            "accelerate launch --multi_gpu で、GPU ごとにモデル全体を置く学習（DDP）を使ってください。"
        )
    check_trainable_precision(trainer.model)
    return trainer


def choose_trainer(config):
    """Return the trainer class that the configuration asks for, and say where it cannot be the fast one."""
    if config.trains_fast:
        from dpo_helpers.train.fast import FastDPOTrainer as DPOTrainer
    else:
        from trl import DPOTrainer

        if config.trainer == "fast":
            print(
                "trainer の fast は、loss_type が sigmoid か sigmoid+sft のときだけなので、"
                f"{config.loss_type} は "
                "TRL の標準の計算で学習します。"
            )
    return DPOTrainer


def build_dpo_trainer(
    run: Run, config: RunConfig, machine: Machine, train_rows, held_out_rows, warmed_up=None
):
    """Return a DPOTrainer on a freshly loaded base, as make_dpo_trainer says, for the run's rows.

    A sample of the held-out rows is evaluated every `checkpoint_steps` for the plots.
    """
    model, tokenizer = load_base_model(config, machine, run.base)
    run.check_base(model)
    check_training(model, tokenizer, train_rows, config)
    arguments = {
        **_shared_arguments(run, config, machine, "dpo"),
        "eval_strategy": "steps",
        "eval_steps": config.checkpoint_steps,
        "eval_on_start": run.newest("dpo") is None,  # a resumed log has that line already
        # 40 rows then fill every round, none is doubled
        "per_device_eval_batch_size": max(1, run.progress.eval_batch // run.process_count),
    }
    curve_rows = make_dataset(sample_curve_rows(held_out_rows), tokenizer)
    data = make_dataset(train_rows, tokenizer)
    return make_dpo_trainer(config, model, tokenizer, data, arguments, warmed_up, eval_dataset=curve_rows)


def make_dpo_trainer(
    config: RunConfig, base, tokenizer, data, arguments: dict, warmed_up: Path | None = None, **options
):
    """Return a DPOTrainer (Rafailov et al. 2023) that trains one LoRA adapter named `default` on `base`.

    Without a warm-up the adapter is new, and the base itself is the reference. With the folder of a warmed-up
    adapter it goes on from there, and TRL keeps a frozen copy named `ref` as the reference. `arguments` go to
    DPOConfig, `options` to the trainer.
    """
    from peft import PeftModel
    from transformers import set_seed
    from trl import DPOConfig

    set_seed(config.seed)  # as in the warm-up
    model, lora = base, make_lora_config(config, base)
    if warmed_up is not None:
        model, lora = PeftModel.from_pretrained(base, warmed_up, is_trainable=True), None
    trainer = choose_trainer(config)(
        model=model,
        args=DPOConfig(
            num_train_epochs=config.num_train_epochs,
            learning_rate=config.learning_rate,
            beta=config.beta,
            loss_type=config.loss_type.split("+"),  # TRL adds up the losses of a list
            loss_weights=[1.0, config.sft_weight] if config.loss_type.endswith("+sft") else None,
            **LOSS_ARGUMENTS.get(config.loss_type, {}),
            **arguments,
        ),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=lora,
        **options,
    )
    if config.quantization == "4bit":
        restore_adapters(trainer.model, warmed_up)
    return _finish_trainer(trainer)


def evaluate_curve_rows(trainer) -> dict:
    """Return what the trainer logs of its held-out sample now: eval_loss, eval_rewards/margins and so on.

    It is read from the log, because TRL 0.29 returns the loss alone from evaluate().
    """

    def measure(batch_size: int) -> dict:
        trainer.args.per_device_eval_batch_size = batch_size
        trainer.evaluate()
        return trainer.state.log_history[-1]

    return halve_on_out_of_memory(measure, trainer.args.per_device_eval_batch_size, "評価")
