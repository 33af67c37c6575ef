"""Shows a training while it runs: curves and a line of text in one display that changes in place.

Imported only by the functions that train, because it needs transformers at once. A redraw takes milliseconds:
the picture is an SVG, and its letters are the browser's, which has a Japanese font where its reader reads
Japanese.
"""

import math
import sys
import time
from html import escape

from transformers import TrainerCallback

from dpo_helpers.keep.run import STAGE_NAMES
from dpo_helpers.machine import format_seconds, measure_peak_memory
from dpo_helpers.train.plots import GREY, Panel, make_panels, read_curve

SECONDS_BETWEEN = 2.0  # two redraws
SECONDS_BETWEEN_LINES = 10.0  # where there is no display
POINTS = 300  # of one line; a screen does not show more
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 380, 310, 66, 16, 64, 44  # of one panel and its margins


class LiveView(TrainerCallback):
    """Shows the log, the step and the speed of the trainer it is added to, in place of the trainer's own
    table.

    `display` is IPython's or one that behaves so; None finds it, and where there is none, lines of text are
    printed. Whatever goes wrong while it draws, the training goes on.
    """

    def __init__(self, stage: str, pairs_per_step: int, device: str, display=None, clock=time.perf_counter):
        self.stage, self.pairs_per_step, self.device, self.clock = stage, pairs_per_step, device, clock
        self.display, self.handle, self.failed = display or find_display(), None, False
        self.running, self.shown_at, self.lines_shown, self.note = False, -math.inf, 0, "準備中"

    def on_train_begin(self, args, state, control, **_):
        self.beta = args.beta if self.stage == "dpo" else None
        self.begun, self.first_step, self.first_end, self.running = (
            self.clock(),
            state.global_step,
            None,
            True,
        )
        self._take(state)
        self._show_safely()

    def on_step_end(self, args, state, control, **_):
        self._update(state, "")

    def on_prediction_step(self, args, state, control, **_):
        self._update(state, "評価中")

    def on_log(self, args, state, control, **_):
        self._update(state, "")

    def on_train_end(self, args, state, control, **_):
        self.finish()

    def finish(self) -> None:
        """Show the end; a training that ends with an exception ends the view so, and a second call does
        nothing.
        """
        if self.running:
            took = format_seconds(self.clock() - self.begun)
            ended = self.step >= self.last_step
            self.note = f"終わりました（{took}）" if ended else f"途中で止まりました（{took}）"
            self._show_safely()
            self.running = False

    def _take(self, state) -> None:
        self.step, self.last_step, self.log = state.global_step, state.max_steps, state.log_history

    def _update(self, state, note: str) -> None:
        if not self.running:
            return
        if self.first_end is None and state.global_step > self.first_step:
            # the first step warms up: the speed counts from its end
            self.first_step, self.first_end = state.global_step, self.clock()
        self._take(state)
        self.note, waited = note, self.clock() - self.shown_at
        if self.display is None:
            if len(self.log) > self.lines_shown and waited >= SECONDS_BETWEEN_LINES:
                self._show_safely()
        elif waited >= SECONDS_BETWEEN:
            self._show_safely()

    def describe(self) -> str:
        """Return the line of text: stage, step, speed, time left, memory, and the last losses."""
        parts = [f"{STAGE_NAMES[self.stage]}：ステップ {self.step} / {self.last_step}"]
        done = self.step - self.first_step
        if self.first_end is not None and done:
            speed = done / max(self.clock() - self.first_end, 1e-9)
            parts.append(f"{speed:.2f} ステップ/秒（{speed * self.pairs_per_step:.2f} ペア/秒）")
            if self.step < self.last_step:
                parts.append(f"残り約 {format_seconds((self.last_step - self.step) / speed)}")
        parts.append(f"メモリ（最大）{measure_peak_memory(self.device) / 1e9:.1f} GB")
        losses = [
            (name, read_curve(self.log, key)[1])
            for name, key in (("損失", "loss"), ("評価用の損失", "eval_loss"))
        ]
        parts += [f"{name} {values[-1]:.3f}" for name, values in losses if values]
        return "　".join([*parts, self.note] if self.note else parts)

    def _show_safely(self) -> None:
        try:
            self._show()
        except (
            Exception
        ) as error:  # a frontend that went away, or a bug of ours: neither may cost the training
            if not self.failed:
                print(
                    f"⚠️ 学習の様子を表示できませんでした（{type(error).__name__}: {error}）。"
                    "学習は続けます。この先は、文字だけで知らせます。"
                )
            self.running = self.running and not self.failed
            self.display, self.failed = None, True
        self.shown_at, self.lines_shown = self.clock(), len(self.log)

    def _show(self) -> None:
        text = self.describe()
        if self.display is None:
            print(text)
            return
        html = draw_html(text, self.stage, self.log, self.step, self.last_step, self.beta)
        data = {"text/plain": text, "text/html": html}
        if self.handle is None:
            self.handle = self.display(data, raw=True, display_id=True)
        else:
            self.handle.update(data, raw=True)


def find_display():
    """Return IPython's display in a notebook's kernel, else None: a terminal cannot change what it has
    printed.
    """
    if "IPython" not in sys.modules:
        return None
    from IPython import get_ipython
    from IPython.display import display

    return display if getattr(get_ipython(), "kernel", None) is not None else None


def draw_html(
    text: str, stage: str, log_history: list[dict], step: int, last_step: int, beta: float | None = None
) -> str:
    """Return a progress bar, the text, and the panels of a stage; it shrinks with the page."""
    panels = make_panels(stage, beta)
    width, height = min(2, len(panels)) * WIDTH, math.ceil(len(panels) / 2) * HEIGHT
    drawn = "".join(
        f'<g transform="translate({i % 2 * WIDTH},{i // 2 * HEIGHT})'
        f'">{draw_panel(panel, log_history, last_step, beta)}</g>'
        for i, panel in enumerate(panels)
    )
    return (
        f'<div><progress value="{step}" max="{max(1, last_step)}" '
        f'style="width:100%;max-width:{width}px"></progress>'
        f'<div>{escape(text)}</div><svg viewBox="0 0 {width} {height}" '
        f'style="width:100%;max-width:{width}px;background:white" '
        f'font-family="sans-serif" fill="black" role="img" aria-label="学習の曲線">{drawn}</svg></div>'
    )


def draw_panel(panel: Panel, log_history: list[dict], last_step: int, beta: float | None) -> str:
    """Return one panel as SVG elements, WIDTH × HEIGHT."""
    curves = [(curve, *thin_out(*read_curve(log_history, curve.key, beta))) for curve in panel.curves]
    known = [value for _, _, values in curves for value in values if not math.isnan(value)]
    known += [panel.level] if panel.level is not None else []
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    pad = 0.06 * (high - low) or 0.5
    low, high, last_step = low - pad, high + pad, max(1, last_step)

    def x(step):
        return round(LEFT + step / last_step * (WIDTH - LEFT - RIGHT), 1)

    def y(value):
        return round(TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    def write(text, at, **options):
        attributes = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in options.items())
        return f'<text x="{at[0]}" y="{at[1]}"{attributes}>{escape(text)}</text>'

    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts = [
        write(panel.title, ((LEFT + WIDTH - RIGHT) / 2, 18), font_size=17, text_anchor="middle"),
        write("ステップ", ((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6), font_size=15, text_anchor="middle"),
        write(
            panel.axis, (14, middle), font_size=15, text_anchor="middle", transform=f"rotate(-90 14 {middle})"
        ),
        f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" '
        f'height="{HEIGHT - TOP - BOTTOM}" fill="none" stroke="#aaa"/>',
        *(
            write(tick, (LEFT - 5, y(float(tick)) + 5), font_size=14, text_anchor="end")
            for tick in find_ticks(low, high)
        ),
        *(
            write(tick, (x(float(tick)), HEIGHT - BOTTOM + 17), font_size=14, text_anchor="middle")
            for tick in find_ticks(0, last_step, smallest=1)
        ),
    ]
    legend = [
        (f"{'●■'['os'.index(curve.marker)] if curve.marker else '―'} {curve.label}", curve.color)
        for curve in panel.curves
    ]
    if panel.level is not None:
        parts.append(
            f'<path d="M{LEFT} {y(panel.level)}H{WIDTH - RIGHT}" stroke="{GREY}" stroke-dasharray="2 3"/>'
        )
        legend += [(f"··· {panel.level_label}", GREY)] if panel.level_label else []
    for i, (label, color) in enumerate(legend):
        parts.append(write(label, (LEFT + i % 2 * 162, 38 + i // 2 * 17), font_size=14, fill=color))
    for curve, steps, values in curves:
        points = [
            (x(step), None if math.isnan(value) else y(value))
            for step, value in zip(steps, values, strict=True)
        ]
        line = "".join(
            f"L{at} {height}" if i and points[i - 1][1] is not None else f"M{at} {height}h0"
            for i, (at, height) in enumerate(points)
            if height is not None
        )
        dashes = ' stroke-dasharray="7 4"' if curve.marker else ""
        parts.append(
            f'<path d="{line}" fill="none" stroke="{curve.color}" stroke-width="2"{dashes} '
            'stroke-linejoin="round"/>'
        )
        # a dot is a line of no length with a wide end; a lone training value would be invisible without one
        dots = "".join(f"M{at} {height}h0" for at, height in points if height is not None)
        width, cap = (8, "square" if curve.marker == "s" else "round") if curve.marker else (3, "round")
        parts.append(
            f'<path d="{dots}" stroke="{curve.color}" stroke-width="{width}" stroke-linecap="{cap}"/>'
        )
    return "".join(parts)


def thin_out(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """Keep at most POINTS evenly spaced points, the newest among them."""
    every = math.ceil(len(steps) / POINTS) or 1
    return steps[::-every][::-1], values[::-every][::-1]


def find_ticks(low: float, high: float, smallest: float = 0.0) -> list[str]:
    """Return up to six round numbers between two values, as text; `smallest` is the least distance between
    two of them.
    """
    rough = max(smallest, (high - low) / 4)
    size = 10.0 ** math.floor(math.log10(rough))
    size *= next(factor for factor in (1, 2, 5, 10) if factor * size >= rough * 0.999)
    return [f"{number * size:.6g}" for number in range(math.ceil(low / size), math.floor(high / size) + 1)]
