"""Draws the one picture of each section of the experiment notebook from its outcomes; it computes no
figure of its own.
"""

import math

from dpo_helpers.sweep.tables import collect_values, estimate, list_settings
from dpo_helpers.train.curves import CHOSEN, GREY, HELD_OUT, REJECTED
from dpo_helpers.train.plots import ShownFigure

LABELS = {
    "held_out.loss": "評価の損失",
    "held_out.accuracy": "評価の正解率",
    "held_out.log_ratio": "対数比の差（nat）",
    "easy_held_out.accuracy": "簡単な評価データの正解率",
    "distance": "参照モデルからの距離（nat／トークン）",
    "answers.ends": "最後まで書けた回答の割合",
    "answers.repetition": "繰り返しのある回答の割合",
    "answers.distinct_2": "distinct-2",
    "seconds.training": "学習の時間（秒）",
    "memory_gb": "メモリー（GB）",
    "learning_rate": "学習率",
    "lora_scale": "LoRA の倍率 alpha / r",
    "beta": "β",
    "loss_type": "損失の種類",
    "training_rows": "学習用の行",
    "label_noise": "入れ替えた行の割合",
    "data": "データ",
    "model_name": "モデル",
    "sft_epochs": "教師あり学習のエポック数",
}
LEVELS = {"held_out.loss": (math.log(2), "ln 2（学習前）"), "held_out.accuracy": (0.5, "当てずっぽう")}


def make_figure(width: float = 7.0, height: float = 4.2) -> ShownFigure:
    return ShownFigure(figsize=(width, height), dpi=100, facecolor="white", layout="constrained")


def plot_heat_map(outcomes: list[tuple], x: str, y: str, metric: str = "held_out.loss") -> ShownFigure:
    """Draw the metric over two settings, lighter where it is lower; a cell without a number says why it
    has none.
    """
    xs, ys = (list(dict.fromkeys(setting[name] for setting in list_settings(outcomes))) for name in (x, y))
    figure = make_figure(1.5 + 1.3 * len(xs), 1.5 + 0.8 * len(ys))
    axis, colours = figure.subplots(), []
    for row in ys:
        colours.append([_mean(outcomes, {x: column, y: row}, metric) for column in xs])
    worst = (
        2 * math.log(2) if metric == "held_out.loss" else None
    )  # beyond, one colour: a single collapse would hide the rest
    image = axis.imshow(
        colours, cmap="viridis_r", vmin=0 if worst else None, vmax=worst, aspect="auto", origin="lower"
    )
    for j, line in enumerate(colours):
        for i, value in enumerate(line):
            text = "壊れた" if math.isnan(value) else f"{value:.2f}"
            axis.text(
                i,
                j,
                text,
                ha="center",
                va="center",
                fontsize=12,
                color="white" if value > 0.6 * image.get_clim()[1] else "black",
            )
    axis.set_xticks(range(len(xs)), [f"{value:g}" for value in xs])
    axis.set_yticks(range(len(ys)), [f"{value:g}" for value in ys])
    axis.set_xlabel(LABELS[x], fontsize=12)
    axis.set_ylabel(LABELS[y], fontsize=12)
    axis.set_title(LABELS[metric] + ("（学習前は 0.69）" if metric == "held_out.loss" else ""), fontsize=13)
    return figure


def plot_lines(
    outcomes: list[tuple], x: str, metric: str, by: str | None = None, log_x: bool = False
) -> ShownFigure:
    """Draw the metric against one setting, a line for each value of `by`, with 95 % intervals where there
    are enough seeds.
    """
    settings = list_settings(outcomes)
    figure = make_figure()
    axis = figure.subplots()
    for value, colour, marker in zip(
        dict.fromkeys(s.get(by) for s in settings), (CHOSEN, REJECTED, GREY, HELD_OUT), "osD^", strict=False
    ):
        mine = [setting for setting in settings if setting.get(by) == value]
        _draw_points(
            axis,
            outcomes,
            mine,
            [s[x] for s in mine],
            metric,
            colour,
            f"{marker}-",
            None if by is None else str(value),
        )
    _draw_level(axis, metric)
    axis.set_xlabel(LABELS[x], fontsize=12)
    if log_x:
        axis.set_xscale("log")
        ticks = sorted({setting[x] for setting in settings})
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
    return _finish(figure, axis, metric, legend=by is not None or metric in LEVELS)


def plot_bars(outcomes: list[tuple], metrics: list[str]) -> ShownFigure:
    """Draw one panel for each metric with a bar for each setting, named by its values."""
    figure = make_figure(1.5 + 3.4 * len(metrics), 4.2)
    settings = list_settings(outcomes)
    names = [" / ".join(map(str, setting.values())) for setting in settings]
    varied = dict.fromkeys(name for setting in settings for name in setting)
    for axis, metric in zip(figure.subplots(1, len(metrics), squeeze=False).flat, metrics, strict=True):
        for i, setting in enumerate(settings):
            values = list(collect_values(outcomes, setting, metric).values())
            if not values:
                axis.text(i, 0, "なし", ha="center", va="bottom", fontsize=11, color=GREY)
                continue
            result = estimate(values)
            axis.bar(i, result.mean, yerr=result.half_width, color=CHOSEN, capsize=4)
            top = result.mean + (
                result.half_width or 0
            )  # above the interval, whose line would strike the number out
            axis.annotate(
                f"{result.mean:.3g}",
                (i, max(top, 0)),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=10,
            )
        _draw_level(axis, metric)
        axis.set_xticks(range(len(settings)), names, rotation=30, ha="right")
        axis.set_xlabel(" / ".join(LABELS.get(name, name) for name in varied), fontsize=12)
        axis.set_xlim(-0.6, len(settings) - 0.4)
        axis.set_axisbelow(True)
        axis.margins(y=0.12)
        if metric.endswith("accuracy"):
            axis.set_ylim(0, 1.08)  # the same in every panel
        _finish(figure, axis, metric, legend=False)
    return figure


def plot_frontier(outcomes: list[tuple]) -> ShownFigure:
    """Draw the log-ratio margin against the distance from the reference, a point for each beta."""
    figure = make_figure()
    axis = figure.subplots()
    points = []
    for setting in list_settings(outcomes):
        far, wide = _mean(outcomes, setting, "distance"), _mean(outcomes, setting, "held_out.log_ratio")
        points.append((far, wide))
        axis.annotate(
            f"β {setting['beta']:g}", (far, wide), xytext=(6, -12), textcoords="offset points", fontsize=11
        )
    axis.plot(*zip(*points, strict=True), "o-", color=CHOSEN)
    axis.set_xlabel(LABELS["distance"], fontsize=12)
    axis.margins(x=0.15, y=0.12)
    return _finish(figure, axis, "held_out.log_ratio", legend=False)


def _mean(outcomes, setting: dict, metric: str) -> float:
    values = list(collect_values(outcomes, setting, metric).values())
    return estimate(values).mean if values else math.nan


def _draw_points(
    axis, outcomes, settings: list[dict], xs: list, metric: str, colour: str, style: str, label
) -> None:
    found = [
        (x, estimate(list(values.values())))
        for x, s in zip(xs, settings, strict=True)
        if (values := collect_values(outcomes, s, metric))
    ]
    yerr = [e.half_width for _, e in found] if all(e.half_width is not None for _, e in found) else None
    axis.errorbar(
        [x for x, _ in found],
        [e.mean for _, e in found],
        yerr=yerr,
        fmt=style,
        color=colour,
        capsize=4,
        label=label,
    )


def _draw_level(axis, metric: str) -> None:
    if metric in LEVELS:
        level, label = LEVELS[metric]
        axis.axhline(level, color=GREY, linestyle=":", label=label)


def _finish(figure, axis, metric: str, legend: bool) -> ShownFigure:
    axis.set_ylabel(LABELS[metric], fontsize=12)
    axis.tick_params(labelsize=11)
    axis.grid(alpha=0.2)
    if legend:
        axis.legend(fontsize=10)
    return figure
