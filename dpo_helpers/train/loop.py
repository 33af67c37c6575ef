"""Trains one stage to its end whatever comes in between: a checkpoint to go on from, too little memory,
NaN, the stop button.
"""

import shutil
import threading
import traceback

from dpo_helpers.config import TrainingStopped, UserError
from dpo_helpers.judge.monitoring import build_metrics
from dpo_helpers.judge.verdict import judge
from dpo_helpers.keep.checkpoints import load_adapters
from dpo_helpers.keep.run import PHASES, Run
from dpo_helpers.keep.storage import save_stopped
from dpo_helpers.machine import clear_memory

FULL_DISK_BYTES = (
    20_000_000  # with less than a small checkpoint left, a failed write is taken for a full disk
)


def train_stage(run: Run, stage: str, build, trainer=None):
    """Return the trainer, made by `build(run)` unless given, that trained `stage` to its end.

    Raises TrainingStopped for NaN and the stop button, after saving what there is, and UserError where memory
    runs out at a micro-batch of one.
    """
    import torch

    from dpo_helpers.train.callbacks import BrokenNumbers

    while True:
        trainer = trainer or build(run)
        try:
            finished = _attempt(run, stage, trainer)
        except torch.OutOfMemoryError as error:
            in_evaluation = any(
                frame.name == "evaluation_loop" for frame in traceback.extract_tb(error.__traceback__)
            )
        except BrokenNumbers as broken:
            raise _stop(run, stage, make_whole(run, stage, trainer, build), "nan", broken.step) from None
        except UserError:
            raise
        except Exception as error:  # safetensors, torch and Python each have their own for a full disk
            if shutil.disk_usage(run.folder).free > FULL_DISK_BYTES:
                raise
            raise UserError(
                f"このマシンのディスクがいっぱいで、{run.folder} にチェックポイントを書けませんで"
                "した。これまでのものは残っています。\n"
                "不要なファイルを消してから、もう一度同じように実行すると、続きから始まります。"
            ) from error
        except KeyboardInterrupt:
            raise _stop(run, stage, trainer, "interrupted", trainer.state.global_step) from None
        else:
            trainer = make_whole(run, stage, trainer, build)
            if finished:
                return trainer
            raise _stop(run, stage, trainer, "interrupted", trainer.state.global_step)
        shrink_batches(run, in_evaluation)
        trainer.optimizer = None
        trainer.model.to("cpu")  # whoever else still holds this trainer must not hold its GPU memory
        trainer = None
        clear_memory()


def _attempt(run: Run, stage: str, trainer) -> bool:
    """Train from the newest checkpoint of this stage, or from the start; return whether the end was
    reached.
    """
    from transformers import TrainerState

    from dpo_helpers.train.callbacks import KeepCheckpoints, StopWhenAsked, WatchNumbers, watch_stop_button
    from dpo_helpers.train.live_view import LiveView

    checkpoint, asked = run.newest(stage), threading.Event()
    if checkpoint:
        load_adapters(trainer.model, checkpoint.path)
        state = TrainerState.load_from_json(str(checkpoint.path / "trainer_state.json"))
        if checkpoint.ends_its_stage:
            print(f"この段階の学習は終わっています（ステップ {checkpoint.step} / {state.max_steps}）。")
            trainer.state = state
            return True
        # TRL keeps this count in memory alone; from zero, the resumed log would not go on where it was
        trainer._total_train_tokens = [
            entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry
        ][-1]
        run.resumed_at.append(checkpoint.step)
        run.resumed_stages.append(stage)
        print(f"ステップ {checkpoint.step} / {checkpoint.progress['max_steps']} から再開します。")
    if run.leads:  # a half-written checkpoint of a killed process would mix with ours
        shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
    run.wait()
    view = LiveView(stage, run.config.effective_batch_size * run.process_count, run.machine.device)
    run.clock.carried = checkpoint.progress["seconds"] if checkpoint else {}
    for callback in (
        KeepCheckpoints(run, stage, checkpoint and checkpoint.path),
        WatchNumbers(run.machine.precision),
        StopWhenAsked(asked),
        view,
    ):
        trainer.add_callback(callback)
    try:
        with run.clock(PHASES[stage]), watch_stop_button(asked):
            trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
    finally:
        view.finish()  # the trainer ends nothing where it was interrupted
    return trainer.state.global_step >= trainer.state.max_steps


def make_whole(run: Run, stage: str, trainer, build):
    """Return a trainer whose model one process alone can save and ask: for a sharded one (FSDP) that of
    the newest checkpoint.
    """
    if not trainer.is_fsdp_enabled:
        return trainer
    whole, checkpoint = build(run), run.newest(stage)
    if checkpoint:
        load_adapters(whole.model, checkpoint.path)
    whole.state = trainer.state
    return whole


def shrink_batches(run: Run, in_evaluation: bool) -> None:
    """Halve what is computed at once, without changing the pairs per optimizer step, or say what else can
    be done.
    """
    if in_evaluation and run.eval_batch > 1 and run.process_count == 1:
        print(
            f"メモリーが足りないので、評価で一度に計算する行を {run.eval_batch} から "
            f"{run.eval_batch // 2} に減らして続けます。"
        )
        run.eval_batch //= 2
        return
    if run.process_count > 1:
        raise UserError(
            "メモリーが足りません。複数のプロセスでは、自動で減らすことができません。"
            "--set per_device_train_batch_size を小さくし、"
            "その分 --set gradient_accumulation_steps を大きくして、別の --run-dir "
            "で実行してください（1 なら、もっと小さいモデルを）。"
        )
    if run.micro_batch == 1 or in_evaluation:
        raise UserError(
            "一度に計算する組を 1 まで減らしても、メモリーが足りません。次のどれかを試してください。\n"
            "・「ランタイム → ランタイムを再起動」で、ほかのモデルが使っているメモリーを空ける\n"
            "・MAX_LENGTH か LORA_RANK を小さくする、または MODEL_NAME をもっと小さいモデルに"
            "する（RUN_DIR は別の名前に）\n"
            "・メモリーの多い GPU のランタイムを選ぶ"
        )
    before, effective = (run.micro_batch, run.accumulation), run.config.effective_batch_size
    run.micro_batch = max(
        size
        for size in range(1, run.micro_batch)
        if effective % size == 0 and size <= max(1, run.micro_batch // 2)
    )
    print(
        f"メモリーが足りないので、一度に計算する組を {before[0]} から {run.micro_batch} "
        f"に減らし、ためる回数を {before[1]} から "
        f"{run.accumulation} に増やして続けます。1 回の更新に使うのは {effective} "
        "組のままなので、結果は変わりません。"
    )


def _stop(run: Run, stage: str, trainer, reason: str, step: int) -> TrainingStopped:
    """Save the adapter, the log and the plots so far, and describe in Japanese what happened and how to go
    on.
    """
    metrics = {**build_metrics(run, trainer), "stopped": {"reason": reason, "step": step, "stage": stage}}
    metrics["verdict"] = judge(metrics, [] if stage == "sft" else trainer.state.log_history)
    if run.leads:
        save_stopped(run, stage, trainer, metrics)
    if run.mirror:
        run.mirror.finish()
    checkpoint = run.newest()
    last = (
        f"最後のチェックポイントは {checkpoint.path.name} です。"
        if checkpoint
        else "チェックポイントはまだありません。"
    )
    if reason == "nan":
        text = (
            f"ステップ {step} の次で勾配が NaN か無限大になったので、"
            f"重みが壊れる前に学習を止めました。{last}\n"
            "LEARNING_RATE か LORA_SCALE を 2 分の 1 から 10 分の 1 に下げ、"
            "RUN_DIR に別の名前を書いて、設定のセルから実行してください。"
        )
    else:
        text = (
            f"ステップ {step} で停止しました。{last}ここまでの重み、記録、"
            f"グラフは {run.folder} に保存しました。\n"
            "続けるには、もう一度同じように実行してください（RESUME は「自動」のまま）。"
        )
    return TrainingStopped(text, reason, step)
