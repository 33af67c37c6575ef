"""Trains one stage, "sft" or "dpo", to its end whatever comes in between, and says how it ended.

A checkpoint to go on from, too little memory, NaN and the stop button are handled here; saving, judging and
talking about the end are the caller's.
"""

import shutil
import threading
import traceback
from typing import NamedTuple

from dpo_helpers.config import RunConfig
from dpo_helpers.errors import UserError
from dpo_helpers.files import describe_full_disk, is_full
from dpo_helpers.keep.checkpoints import prepare_resume
from dpo_helpers.keep.run import PHASES, Run
from dpo_helpers.machine import Machine, clear_memory
from dpo_helpers.model.adapters import load_adapters


class Outcome(NamedTuple):
    """How a stage ended: `ending` is "finished", "interrupted" or "nan", `step` the last good optimizer
    step.
    """

    trainer: object
    ending: str
    step: int


def train_stage(run: Run, stage: str, config: RunConfig, machine: Machine, build, trainer=None) -> Outcome:
    """Train `stage` with the trainer that is given, or with one made by `build()`, and return the outcome.

    Where memory runs out a new trainer is built with smaller batches, so the outcome's may be another one.
    Raises UserError where memory runs out at a micro-batch of one.
    """
    import torch

    from dpo_helpers.train.callbacks import BrokenNumbers

    while True:
        trainer = trainer or build()
        try:
            finished = _attempt(run, stage, config, machine, trainer)
            return Outcome(trainer, "finished" if finished else "interrupted", trainer.state.global_step)
        except BrokenNumbers as broken:
            return Outcome(trainer, "nan", broken.step)
        except KeyboardInterrupt:
            return Outcome(trainer, "interrupted", trainer.state.global_step)
        except torch.OutOfMemoryError as error:
            frames = traceback.extract_tb(error.__traceback__)
            in_evaluation = any(frame.name == "evaluation_loop" for frame in frames)
        except UserError:
            raise
        except Exception as error:  # safetensors, torch and Python each have their own for a full disk
            if not is_full(run.folder, error):
                raise
            raise describe_full_disk(run.folder, "チェックポイント") from error
        shrink_batches(run, config, in_evaluation)
        trainer.optimizer = None
        trainer.model.to("cpu")  # whoever else still holds this trainer must not hold its GPU memory
        trainer = None
        clear_memory()


def _attempt(run: Run, stage: str, config: RunConfig, machine: Machine, trainer) -> bool:
    """Train from the newest checkpoint of this stage, or from the start; return whether the end was
    reached.
    """
    from dpo_helpers.train.callbacks import KeepCheckpoints, StopWhenAsked, WatchNumbers, watch_stop_button
    from dpo_helpers.train.live import LiveView

    checkpoint, asked = run.newest(stage), threading.Event()
    if checkpoint and _take_over(run, stage, trainer, checkpoint):
        return True
    if run.leads:  # a half-written checkpoint of a killed process would mix with ours
        shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
    run.wait()
    view = LiveView(stage, config.effective_batch_size * run.process_count, machine.device)
    run.clock.carried = checkpoint.progress["seconds"] if checkpoint else {}
    for callback in (
        KeepCheckpoints(run, config, stage, checkpoint and checkpoint.path),
        WatchNumbers(machine.precision),
        StopWhenAsked(asked),
        view,
    ):
        trainer.add_callback(callback)
    try:
        with run.clock(PHASES[stage]), watch_stop_button(asked):
            start = prepare_resume(checkpoint, machine.precision) if checkpoint else None
            trainer.train(resume_from_checkpoint=start and str(start))
    finally:
        view.finish()  # the trainer ends nothing where it was interrupted
    return trainer.state.global_step >= trainer.state.max_steps


def _take_over(run: Run, stage: str, trainer, checkpoint) -> bool:
    """Put a checkpoint's adapters and counters into the trainer; return whether it is the end of the
    stage.
    """
    from transformers import TrainerState

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
    run.progress.resumed_at.append(checkpoint.step)
    run.progress.resumed_stages.append(stage)
    print(f"ステップ {checkpoint.step} / {checkpoint.progress['max_steps']} から再開します。")
    return False


def shrink_batches(run: Run, config: RunConfig, in_evaluation: bool) -> None:
    """Halve what is computed at once, without changing the pairs per optimizer step, or say what else can
    be done.
    """
    progress, effective = run.progress, config.effective_batch_size
    if in_evaluation and progress.eval_batch > 1 and run.process_count == 1:
        half = progress.eval_batch // 2
        print(
            f"メモリが足りないので、評価で一度に計算する行を {progress.eval_batch} から "
            f"{half} に減らして続けます。"
        )
        progress.eval_batch = half
        return
    if run.process_count > 1:
        raise UserError(
            "メモリが足りません。複数のプロセスでは、自動で減らすことができません。"
            "--set per_device_train_batch_size を小さくし、その分 --set "
            "gradient_accumulation_steps を大きくして、"
            "別の --run-dir で実行してください（1 なら、もっと小さいモデルを）。"
        )
    if progress.micro_batch == 1 or in_evaluation:
        raise UserError(
            "一度に計算するペアを 1 まで減らしても、メモリが足りません。次のどれかを試してください。\n"
            "・「ランタイム → セッションを再起動する」で、ほかのモデルが使っているメモリを空ける\n"
            "・MAX_LENGTH か LORA_RANK を小さくする、または MODEL_NAME をもっと小さいモデルにする"
            "（RUN_NAME は別の名前に）\n"
            "・メモリの多い GPU のランタイムを選ぶ"
        )
    before, limit = progress.micro_batch, progress.micro_batch // 2
    progress.micro_batch = max(size for size in range(1, limit + 1) if effective % size == 0)
    print(
        f"メモリが足りないので、一度に計算するペアを {before} から {progress.micro_batch} に減らし、"
        f"ためる回数を {effective // before} から {effective // progress.micro_batch} に増やして続けます。"
        f"1 回の更新に使うのは {effective} ペアのままなので、結果は変わりません。"
    )
