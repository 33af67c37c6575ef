"""What the trainer calls while it trains: keep checkpoints, stop at broken numbers, stop when asked to.

Imported only by the functions that train, because it needs transformers at once.
"""

import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import gather
from transformers import TrainerCallback

from dpo_helpers.config import RunConfig
from dpo_helpers.errors import UserError
from dpo_helpers.keep.run import Run
from dpo_helpers.model.adapters import find_different_adapters

SKIPPED_IN_A_ROW = 20  # under fp16 the scaler halves its scale at each overflow, 65536 → 1 takes 16 steps


class BrokenNumbers(Exception):
    """A gradient is NaN or infinite; `step` counts the optimizer steps that were still good."""

    def __init__(self, step: int):
        super().__init__(step)
        self.step = step


class KeepCheckpoints(TrainerCallback):
    """Completes every checkpoint that the trainer wrote, and compares the adapters with the one that was
    loaded.
    """

    def __init__(self, run: Run, config: RunConfig, stage: str, loaded: Path | None):
        self.run, self.config, self.stage, self.loaded = run, config, stage, loaded

    def on_train_begin(self, args, state, control, model=None, **_):
        if self.loaded is not None and (different := find_different_adapters(model, self.loaded)):
            raise UserError(
                f"チェックポイント {self.loaded.name} を読み込みましたが、"
                f"メモリの重み（{', '.join(different)}）が"
                "ファイルと一致しません。続けると学習が壊れるので止めました。"
                "ランタイムを再起動して、最初のセルから実行してください。"
            )
        self.run.check_ready(self.config, model)

    def on_step_end(self, args, state, control, **_):
        self.run.progress.steps_executed[self.stage] += 1
        self.run.check_owner()
        if control.should_save:
            control.should_log = (
                True  # else the losses since the last log line would be lost to the resumed log
            )

    def on_save(self, args, state, control, **_):
        self.run.wait()  # every process has its own random state in the checkpoint
        if self.run.leads:
            made = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self.run.keep_checkpoint(self.stage, made, state.global_step, state.max_steps)
        self.run.wait()  # nobody looks for checkpoints while they are renamed and rotated


class WatchNumbers(TrainerCallback):
    """Raises BrokenNumbers before an optimizer step would put NaN or infinity into the weights.

    A loss that is NaN or infinite shows in the gradients. Under fp16 single overflows are normal, and the
    scaler skips them.
    """

    def __init__(self, precision: str):
        self.allowed = SKIPPED_IN_A_ROW if precision == "fp16" else 0
        self.broken = 0

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        norms = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
        is_broken = gather(~norms.isfinite().all()[None]).any()  # all processes stop, or none
        self.broken = self.broken + 1 if is_broken else 0
        if self.broken > self.allowed:
            raise BrokenNumbers(state.global_step)


class StopWhenAsked(TrainerCallback):
    """Ends the training after the step in which the stop button was pressed, with a checkpoint of that
    step.
    """

    def __init__(self, asked: threading.Event):
        self.asked = asked

    def on_step_end(self, args, state, control, **_):
        if self.asked.is_set():
            control.should_save = control.should_log = control.should_training_stop = True


@contextmanager
def watch_stop_button(asked: threading.Event):
    """Let the first SIGINT (the stop button, Ctrl-C) only set `asked`; a second one interrupts at once."""

    def on_signal(number, frame):
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        print(
            "停止します。今のステップが終わり、チェックポイントを保存するまで少し待ってください"
            "（もう一度押すとすぐに止まります）。"
        )

    if (
        threading.current_thread() is not threading.main_thread()
    ):  # only the main thread may set signal handlers
        yield
        return
    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
