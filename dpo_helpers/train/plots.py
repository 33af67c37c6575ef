"""Says which curves of a training are shown, in which panels and colours, and draws them as a picture to
keep.

The view during the training draws the same panels by itself (live.py): matplotlib takes half a second for
them.
"""

import io
import math
from pathlib import Path
from typing import NamedTuple

import matplotlib_fontja  # noqa: F401  (imported for its effect: a font with Japanese glyphs)
from matplotlib.figure import Figure

# Colours of Okabe and Ito (2008), distinguishable with any colour vision; chosen and rejected have theirs in
# every plot. A
# held-out curve is dashed and has markers as well, so that it is told apart in grey.
CHOSEN, REJECTED, TRAINING, HELD_OUT, GREY = "#0072B2", "#D55E00", "#000000", "#009E73", "#666666"


class Curve(NamedTuple):
    """One line of a panel: its key in the log, and how it is drawn. `marker` is "" for a training curve."""

    key: str
    label: str
    color: str
    marker: str  # matplotlib's: "o" or "s"


class Panel(NamedTuple):
    """One message: a title that says how to read it, the axis with its unit, a level to compare with (or
    None), the curves.
    """

    title: str
    axis: str
    level: float | None
    level_label: str
    curves: tuple[Curve, ...]


def _both(key: str) -> tuple[Curve, ...]:
    return Curve(key, "学習用", TRAINING, ""), Curve(f"eval_{key}", "評価用", HELD_OUT, "o")


# rewards/… is beta × (log-prob under the policy − under the reference), in nats: the drift of the same
# answers, whereas the
# logps/… of two lines of the training log belong to different rows.
_DRIFT = (
    Curve("rewards/chosen", "良い回答（学習用）", CHOSEN, ""),
    Curve("eval_rewards/chosen", "良い回答（評価用）", CHOSEN, "o"),
    Curve("rewards/rejected", "悪い回答（学習用）", REJECTED, ""),
    Curve("eval_rewards/rejected", "悪い回答（評価用）", REJECTED, "s"),
)


def make_panels(stage: str, beta: float | None = None) -> list[Panel]:
    """Return the panels of a stage, "sft" or "dpo"; without `beta` the drift keeps TRL's unit, beta × nat."""
    if stage == "sft":
        return [Panel("損失：下がるほど、手本に近い", "損失（nat / トークン）", None, "", _both("loss")[:1])]
    drift = "対数確率の変化（nat）" if beta else "β × 対数確率の変化（nat）"
    return [
        Panel("損失：下がるほど良い", "損失", math.log(2), "ln 2（学習前）", _both("loss")),
        Panel(
            "正解率：良い回答を選べた割合", "正解率", 0.5, "0.5（当てずっぽう）", _both("rewards/accuracies")
        ),
        Panel(
            "マージン：大きいほど区別できる",
            "β × 対数確率比の差（nat）",
            0.0,
            "0（学習前）",
            _both("rewards/margins"),
        ),
        Panel("回答の出やすさ：0 が学習前", drift, 0.0, "", _DRIFT),
    ]


def read_curve(log_history: list[dict], key: str, beta: float | None = None) -> tuple[list[int], list[float]]:
    """Return the steps and values of one key; a value that is no number, or says nothing, is NaN: a gap in
    the line.

    TRL logs an accuracy of 0 as long as policy and reference are equal, where every margin is exactly 0: a
    tie, not an error.
    """
    scale = 1 / beta if beta and key.endswith(("chosen", "rejected")) else 1.0
    margin = key.replace("accuracies", "margins")
    steps, values = [], []
    for entry in log_history:
        if key in entry:
            says_something = math.isfinite(entry[key]) and (key == margin or entry.get(margin) != 0)
            steps.append(entry["step"])
            values.append(entry[key] * scale if says_something else math.nan)
    return steps, values


STYLES = {
    "": {"linewidth": 1.3, "marker": ".", "markersize": 3},
    "o": {"linewidth": 2, "linestyle": "--", "marker": "o", "markersize": 5},
    "s": {"linewidth": 2, "linestyle": "--", "marker": "s", "markersize": 5},
}


class ShownFigure(Figure):
    """A figure outside pyplot, whose list of open figures would hold every one; a notebook shows it as the
    value of a cell.
    """

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def plot_training(log_history: list[dict], path=None, beta: float | None = None) -> ShownFigure:
    """Draw a DPO training in four panels, training beside held-out; save it as `path`'s .png and .svg if
    given.

    With `beta`, the run's, the drift is in nats, as in metrics.json. The SVG holds its letters as outlines:
    it looks the same on a machine without a Japanese font. Sizes are for a reader who sees 500 pixels of
    width.
    """
    figure = ShownFigure(figsize=(8, 7), dpi=100, facecolor="white", layout="constrained")
    for axis, panel in zip(figure.subplots(2, 2).flat, make_panels("dpo", beta), strict=True):
        for curve in panel.curves:
            axis.plot(
                *read_curve(log_history, curve.key, beta),
                color=curve.color,
                label=curve.label,
                **STYLES[curve.marker],
            )
        axis.axhline(panel.level, color=GREY, linestyle=":", label=panel.level_label)
        axis.set_title(panel.title, fontsize=13, pad=38)
        axis.set_xlabel("ステップ", fontsize=12)
        axis.set_ylabel(panel.axis, fontsize=12)
        axis.tick_params(labelsize=11)
        axis.grid(alpha=0.2)
        axis.xaxis.get_major_locator().set_params(integer=True, nbins=6)
        axis.legend(
            loc="lower left", bbox_to_anchor=(-0.02, 0.99), ncols=2, fontsize=10, frameon=False
        )  # above: it hides no curve
    if path is not None:
        for suffix in (".png", ".svg"):
            figure.savefig(Path(path).with_suffix(suffix))
    return figure
