"""The two stages of a run as a cell or a terminal calls them, and what stands in metrics.json of the
training.

Where a stage ended early, what there is of it is saved, and the reason and the way to go on are told.
"""

import shutil
from importlib.metadata import version
from pathlib import Path

from dpo_helpers.config import RunConfig
from dpo_helpers.errors import TrainingStopped
from dpo_helpers.judge.history import summarize_training
from dpo_helpers.judge.verdict import judge
from dpo_helpers.keep.result import save_run
from dpo_helpers.keep.run import Run
from dpo_helpers.machine import Machine, measure_peak_memory
from dpo_helpers.model.load import count_parameters
from dpo_helpers.train.loop import Outcome, train_stage
from dpo_helpers.train.plots import plot_training
from dpo_helpers.train.trainers import build_dpo_trainer, build_sft_trainer

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")


def train_sft(run: Run, config: RunConfig, machine: Machine, train_rows: list[dict]) -> Path | None:
    """Teach the base model the chosen answers, or go on where that was; return the warmed-up adapter's
    folder.

    The loss is the mean negative log-likelihood of the answers' tokens alone; `run.progress.sft_log` holds
    the log history. With `sft_epochs` 0 there is no warm-up: None.
    """
    if config.sft_epochs == 0:
        print("SFT_EPOCHS が 0 なので、教師あり学習は行いません。")
        return None
    adapter, checkpoint = run.checkpoints / "warmed-up", run.newest()
    if checkpoint and checkpoint.stage == "dpo":
        print("教師あり学習は終わっているので、その結果を使います。")
        if run.leads:
            shutil.copytree(checkpoint.path / "ref", adapter, dirs_exist_ok=True)
        run.wait()
        return adapter
    outcome = train_stage(
        run, "sft", config, machine, lambda: build_sft_trainer(run, config, machine, train_rows)
    )
    if outcome.ending != "finished":
        raise stop_run(run, "sft", config, machine, train_rows, outcome)
    run.progress.sft_log = outcome.trainer.state.log_history
    if run.leads:
        outcome.trainer.model.save_pretrained(adapter)
    run.wait()
    return adapter


def train_dpo(
    run: Run, config: RunConfig, machine: Machine, train_rows, held_out_rows, trainer, warmed_up=None
):
    """Train to the end, from the newest checkpoint if there is one; return the trainer that did it.

    That is another one than was given when memory ran out. A trainer that has trained already is left alone,
    so that a cell run twice does no harm.
    """
    if trainer.state.global_step >= trainer.state.max_steps > 0:
        print(
            "この学習は終わっています。"
            "最初からやり直すには RESUME を「最初から」にして、そのセルから実行してください。"
        )
        return trainer

    def build():
        return build_dpo_trainer(run, config, machine, train_rows, held_out_rows, warmed_up)

    stopped_before = trainer.state.global_step > 0  # its optimizer and adapters may be anywhere
    outcome = train_stage(run, "dpo", config, machine, build, None if stopped_before else trainer)
    if outcome.ending != "finished":
        raise stop_run(run, "dpo", config, machine, train_rows, outcome)
    return outcome.trainer


def build_metrics(run: Run, config: RunConfig, machine: Machine, train_rows, trainer) -> dict:
    """Put together what metrics.json says of the training, in nats, bytes and seconds; judge.measure adds the
    rest.

    `resumed_at` are the steps that interrupted processes went on from, `steps_executed` the optimizer steps
    of this process.
    """
    trainable, total = count_parameters(trainer.model)
    seconds, steps, count = run.clock.seconds, trainer.state.global_step, len(train_rows)
    pairs = min(
        steps * config.effective_batch_size * run.process_count, round(count * config.num_train_epochs)
    )
    phases = ("setup", "data", "sft", "training", "evaluation", "saving")
    return {
        **summarize_training(trainer.state.log_history),
        "trainable_parameters": trainable,
        "total_parameters": total,
        "training_rows": count,
        "steps": steps,
        "resumed_at": run.progress.resumed_at,
        "resumed_stages": run.progress.resumed_stages,
        "steps_executed": run.progress.steps_executed,
        "pairs_per_second": round(pairs / seconds["training"], 3) if seconds.get("training") else None,
        "seconds": {phase: seconds.get(phase, 0.0) for phase in phases},
        "peak_memory_bytes": measure_peak_memory(machine.device),
        "device": machine.name,
        "processes": run.process_count,
        "precision": machine.precision,
        "versions": {name: version(name) for name in PACKAGES},
    }


def save_result(run: Run, config: RunConfig, train_rows, held_out_rows, trainer, metrics: dict) -> list[str]:
    """Save a finished run with its pictures; return the names of the files."""
    run.check_result(trainer, train_rows, held_out_rows)
    log = trainer.state.log_history
    return save_run(
        run,
        trainer,
        metrics,
        logs=(log, run.progress.sft_log),
        rows=(train_rows, held_out_rows),
        draw=lambda path: plot_training(log, path, config.beta),
    )


def stop_run(run: Run, stage: str, config, machine, train_rows, outcome: Outcome) -> TrainingStopped:
    """Save the adapter, the log and the plots so far; return what happened and how to go on, to be raised."""
    trainer, step = outcome.trainer, outcome.step
    stopped = {"reason": outcome.ending, "step": step, "stage": stage}
    metrics = build_metrics(run, config, machine, train_rows, trainer) | {"stopped": stopped}
    log = trainer.state.log_history
    logs = ([], log) if stage == "sft" else (log, run.progress.sft_log)
    metrics["verdict"] = judge(metrics, logs[0])
    if run.leads:
        save_run(run, trainer, metrics, logs, draw=lambda path: plot_training(logs[0], path, config.beta))
    if run.mirror:
        run.mirror.finish()
    checkpoint = run.newest()
    last = (
        f"最後のチェックポイントは {checkpoint.path.name} です。"
        if checkpoint
        else "チェックポイントはまだありません。"
    )
    if outcome.ending == "nan":
        text = (
            f"ステップ {step} の次で勾配が NaN か無限大になったので、"
            f"重みが壊れる前に学習を止めました。{last}\n"
            "LEARNING_RATE か lora_scale を 2 分の 1 から 10 分の 1 に下げ、RUN_NAME に別の名前を書いて、"
            "設定のセルから実行してください。"
        )
    else:
        text = (
            f"ステップ {step} で停止しました。{last}ここまでの重み、記録、"
            f"グラフは {run.folder} に保存しました。\n"
            "続けるには、もう一度同じように実行してください（RESUME は「自動」のまま）。"
        )
    return TrainingStopped(text, outcome.ending, step)
