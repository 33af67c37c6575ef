"""Shows curves and a line of text in one display that changes in place, within a budget of time; it knows
no trainer.
"""

import math
import sys
import time
import traceback
from pathlib import Path

from dpo_helpers.keep.run import STAGE_NAMES
from dpo_helpers.machine import measure_peak_memory
from dpo_helpers.train.curves import read_curve
from dpo_helpers.train.live_svg import draw_html

SECONDS_BETWEEN = 2.0
SHORT, SHORT_BUDGET, SHARE = (
    300.0,
    1.5,
    0.02,
)  # seconds; below SHORT a training pays SHORT_BUDGET in all, above it SHARE
SECONDS_BETWEEN_LINES = 10.0  # where there is no display


class Budget:
    """Says when the next redraw can be paid for, from the measured seconds of those before; the last one
    is kept in reserve.
    """

    def __init__(self, clock):
        self.clock, self.begun = clock, clock()
        self.spent, self.cost, self.last = 0.0, 0.0, -math.inf

    def allows(self) -> bool:
        now = self.clock()
        is_short = now - self.begun < SHORT
        allowance, share = (
            (SHORT_BUDGET, SHORT_BUDGET / SHORT) if is_short else (SHARE * (now - self.begun), SHARE)
        )
        between = max(
            SECONDS_BETWEEN, self.cost / share
        )  # the gap spreads an expensive drawing's budget over the time
        return (
            now - self.last >= between and self.spent + 3 * self.cost <= allowance
        )  # this one, and twice for the last

    def pay(self, started: float) -> None:
        self.last = self.clock()
        self.cost = self.last - started
        self.spent += self.cost


class LiveDisplay:
    """One display for one training; whatever goes wrong while it draws, the training goes on.

    `display` is IPython's or one that behaves so; None finds it, and where there is none, lines of text are
    printed.
    """

    def __init__(self, stage: str, pairs_per_step: int, device: str, display=None, clock=time.perf_counter):
        self.stage, self.pairs_per_step, self.device, self.clock = stage, pairs_per_step, device, clock
        self.display = display or find_display()
        self.handle, self.running, self.lines_to_print, self.failed = None, False, 0, False

    def begin(self, step: int, last_step: int, log_history: list[dict], beta: float | None = None) -> None:
        """Show the log of a resumed training at once, or empty panels."""
        self.budget, self.beta, self.running = Budget(self.clock), beta, True
        self.first_step, self.first_end = step, None
        self.step, self.last_step, self.log, self.note = step, last_step, log_history, "準備中"
        self._show_safely()

    def update(self, step: int, log_history: list[dict], note: str = "") -> None:
        """Take the trainer's state and show it where that can be paid for; `note` says what the trainer
        does in between.
        """
        if not self.running:
            return
        if self.first_end is None and step > self.first_step:
            self.first_step, self.first_end = (
                step,
                self.clock(),
            )  # the first step warms up: the speed counts from its end
        self.step, self.log, self.note = step, log_history, note
        if self.display is None:
            if (
                len(log_history) > self.lines_to_print
                and self.clock() - self.budget.last >= SECONDS_BETWEEN_LINES
            ):
                self._show_safely()
        elif self.budget.allows():
            self._show_safely()

    def finish(self) -> None:
        """Show the end, whatever was spent; a second call does nothing."""
        if self.running:
            took = format_seconds(self.clock() - self.budget.begun)
            self.note = (
                f"終わりました（{took}）" if self.step >= self.last_step else f"途中で止まりました（{took}）"
            )
            self._show_safely()
            self.running = False

    def describe(self) -> str:
        """Return the line of text: stage, step, speed, time left, memory, and the last losses."""
        parts = [f"{STAGE_NAMES[self.stage]}：ステップ {self.step} / {self.last_step}"]
        done = self.step - self.first_step
        if self.first_end is not None and done:
            speed = done / max(self.clock() - self.first_end, 1e-9)
            parts.append(f"{speed:.2f} ステップ/秒（{speed * self.pairs_per_step:.2f} 組/秒）")
            if self.step < self.last_step:
                parts.append(f"残り約 {format_seconds((self.last_step - self.step) / speed)}")
        parts.append(f"メモリー（最大）{measure_peak_memory(self.device) / 1e9:.1f} GB")
        losses = [
            (name, read_curve(self.log, key)[1])
            for name, key in (("損失", "loss"), ("評価用の損失", "eval_loss"))
        ]
        parts += [f"{name} {values[-1]:.3f}" for name, values in losses if values]
        return "　".join([*parts, self.note] if self.note else parts)

    def _show_safely(self) -> None:
        started = self.clock()
        try:
            self._show()
        except (
            Exception
        ) as error:  # a bug of ours, or a frontend that went away: neither may cost the user the training
            if not self.failed:
                place = traceback.extract_tb(error.__traceback__)[-1]
                print(
                    f"⚠️ 学習の様子を表示できませんでした（{type(error).__name__}: {error}、"
                    f"{Path(place.filename).name} の {place.lineno} 行目）。"
                    "学習は続けます。この先は、文字だけで知らせます。"
                )
            self.running = self.running and not self.failed
            self.display, self.failed = None, True
        self.budget.pay(started)

    def _show(self) -> None:
        text = self.describe()
        if self.display is None:
            print(text)
            self.lines_to_print = len(self.log)
            return
        data = {
            "text/plain": text,
            "text/html": draw_html(text, self.stage, self.log, self.step, self.last_step, self.beta),
        }
        if self.handle is None:
            self.handle = self.display(data, raw=True, display_id=True)
        else:
            self.handle.update(data, raw=True)


def format_seconds(seconds: float) -> str:
    """Return a duration in Japanese, as exact as a reader needs it."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} 時間 {minutes % 60} 分"
    return f"{minutes} 分 {rest} 秒" if minutes else f"{rest} 秒"


def find_display():
    """Return IPython's display in a notebook's kernel, else None: a terminal cannot change what it has
    printed.
    """
    if "IPython" not in sys.modules:
        return None
    from IPython import get_ipython
    from IPython.display import display

    return display if getattr(get_ipython(), "kernel", None) is not None else None
