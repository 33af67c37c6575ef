"""Draws the curves of a saved training with matplotlib, as a PNG and as an SVG; the view during training
draws its own.
"""

import io
from pathlib import Path

import matplotlib_fontja  # noqa: F401  (imported for its effect: a font with Japanese glyphs)
from matplotlib.figure import Figure

from dpo_helpers.train.curves import GREY, make_panels, read_curve

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
