"""Hands a trainer's state to the live display while it trains.

Imported only by the functions that train, because it needs transformers at once.
"""

import time

from transformers import TrainerCallback

from dpo_helpers.train.live_display import LiveDisplay


class LiveView(TrainerCallback):
    """Shows the log, the step and the speed of the trainer it is added to, in place of the trainer's own
    progress table.

    `stage` is "sft" or "dpo". A training that ends with an exception ends the view by `finish`.
    """

    def __init__(
        self, stage: str, total_pairs_per_step: int, device: str, display=None, clock=time.perf_counter
    ):
        self.shown = LiveDisplay(stage, total_pairs_per_step, device, display, clock)
        self.finish = self.shown.finish

    def on_train_begin(self, args, state, control, **_):
        beta = args.beta if self.shown.stage == "dpo" else None
        self.shown.begin(state.global_step, state.max_steps, state.log_history, beta)

    def on_step_end(self, args, state, control, **_):
        self.shown.update(state.global_step, state.log_history)

    def on_prediction_step(self, args, state, control, **_):
        self.shown.update(state.global_step, state.log_history, "評価中")

    def on_log(self, args, state, control, **_):
        self.shown.update(state.global_step, state.log_history)

    def on_train_end(self, args, state, control, **_):
        self.finish()
