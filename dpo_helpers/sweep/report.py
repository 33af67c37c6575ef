"""Turns the results of an experiment into tables, sentences with their intervals, pictures and a
recommendation.
"""

import math
import statistics
from typing import NamedTuple

from dpo_helpers.config import RunConfig
from dpo_helpers.data.look import UNSEEN_NAMES
from dpo_helpers.train.plots import CHOSEN, GREY, HELD_OUT, REJECTED, ShownFigure

FEWEST_SEEDS = 3
RIGHT = "writing.new_wording.greedy.right"


class Metric(NamedTuple):
    """A figure of a run: its Japanese name, whether more of it is better, and the bounds that its interval
    keeps.
    """

    name: str
    more_is_better: bool
    low: float = -math.inf
    high: float = math.inf
    level: float | None = None  # to compare with


SHARE = {"low": 0.0, "high": 1.0}
METRICS = {
    "held_out.accuracy": Metric("正解率", True, **SHARE, level=0.5),
    "held_out.loss": Metric("評価用の損失", False, low=0.0, level=math.log(2)),
    "held_out.log_ratio": Metric("対数確率比の差（nat）", True),
    "easy_held_out.accuracy": Metric("簡単な評価用データの正解率", True, **SHARE, level=0.5),
    **{
        f"writing.{kind}.{way}.{measure}": Metric(
            f"{text}（{UNSEEN_NAMES[kind]}、{way_text}）", measure == "right", **SHARE
        )
        for kind in ("new_wording", "new_concept")
        for way, way_text in (("greedy", "最も確かな回答"), ("sampled", "くじ引き"))
        for measure, text in (("right", "正しい回答"), ("manners", "あいまい・失礼など"))
    },
    "distance": Metric("参照モデルからの距離（nat / トークン）", False),
    "seconds.training": Metric("学習の時間（秒）", False, low=0.0),
    "memory_gb": Metric("メモリ（GB）", False, low=0.0),
}
KNOB_NAMES = {
    "learning_rate": "学習率",
    "lora_scale": "LoRA の倍率 alpha / r",
    "beta": "β",
    "loss_type": "損失の種類",
    "training_rows": "学習用の行",
    "label_noise": "入れ替えた行の割合",
    "data": "データ",
    "model_name": "モデル",
    "sft_epochs": "教師あり学習のエポック数",
    "num_train_epochs": "DPO のエポック数",
    "lora_rank": "LoRA のランク",
}
SHOWN_METRICS = (
    "held_out.accuracy",
    "held_out.loss",
    RIGHT,
    "writing.new_concept.greedy.right",
    "writing.new_wording.sampled.right",
    "writing.new_wording.sampled.manners",
)


class Estimate(NamedTuple):
    """A mean over seeds and its 95 % interval (NaN for fewer than three seeds), in the metric's unit."""

    mean: float
    low: float
    high: float

    @property
    def has_interval(self) -> bool:
        return not math.isnan(self.low)


def estimate(values: list[float], low: float = -math.inf, high: float = math.inf) -> Estimate:
    """Return mean and 95 % interval by Student's t, mean ± t * s / sqrt(n), kept within the metric's
    bounds.
    """
    mean, count = statistics.fmean(values), len(values)
    if count < FEWEST_SEEDS:
        return Estimate(mean, math.nan, math.nan)
    from scipy.stats import t

    half = t.ppf(0.975, count - 1) * statistics.stdev(values) / math.sqrt(count)
    return Estimate(mean, max(low, mean - half), min(high, mean + half))


def read_metric(record: dict, path: str) -> float | None:
    """Return a metric by its dotted path, e.g. "held_out.loss"; None where the run has none (NaN, failed)."""
    value = record["metrics"]
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def collect_values(outcomes: list[tuple], setting: dict, path: str) -> dict[int, float]:
    """Return {seed: value} of the runs of one setting that have the metric."""
    found = {e.config.seed: read_metric(record, path) for e, record in outcomes if dict(e.setting) == setting}
    return {seed: value for seed, value in found.items() if value is not None}


def list_settings(outcomes: list[tuple]) -> list[dict]:
    return [dict(setting) for setting in dict.fromkeys(experiment.setting for experiment, _ in outcomes)]


def name_setting(setting: dict) -> str:
    """Return a setting in words, as 学習率 0.001、β 0.1."""
    parts = [
        f"{KNOB_NAMES.get(name, name)} {value:g}"
        if isinstance(value, float)
        else f"{KNOB_NAMES.get(name, name)} {value}"
        for name, value in setting.items()
    ]
    return "、".join(parts) or "共通の設定"


def write_estimate(found: Estimate, metric: Metric) -> str:
    """Return an estimate in sensible digits, with its interval where it has one."""
    form = "{:.0%}" if metric.high == 1.0 else "{:.2f}" if abs(found.mean) < 100 else "{:.0f}"
    text = form.format(found.mean)
    return f"{text}（{form.format(found.low)}〜{form.format(found.high)}）" if found.has_interval else text


def summarize_outcomes(outcomes: list[tuple], metrics=SHOWN_METRICS) -> list[dict]:
    """Return a table: a line for each setting, with the mean and interval over its seeds, and what went
    wrong.
    """
    table = []
    for setting in list_settings(outcomes):
        mine = [record for experiment, record in outcomes if dict(experiment.setting) == setting]
        bad = [record["reason"] for record in mine if record["status"] != "ok"]
        line = {"設定": name_setting(setting), "回数": len(mine) - len(bad)}
        for path in metrics:
            values = list(collect_values(outcomes, setting, path).values())
            metric = METRICS[path]
            line[metric.name] = (
                write_estimate(estimate(values, metric.low, metric.high), metric) if values else "－"
            )
        table.append(line | {"問題": bad[0] if bad else ""})
    return table


def compare(outcomes: list[tuple], first: dict, second: dict, path: str) -> Estimate | None:
    """Return second minus first, paired by seed: what all runs of a seed share drops out. None without a
    common seed.
    """
    before, after = (collect_values(outcomes, setting, path) for setting in (first, second))
    seeds = sorted(set(before) & set(after))
    return estimate([after[seed] - before[seed] for seed in seeds]) if seeds else None


def say_differences(outcomes: list[tuple], metrics=SHOWN_METRICS) -> str:
    """Say of the first setting against each other one what changed, and where nothing can be said."""
    first, *others = list_settings(outcomes)
    lines = []
    for other in others:
        for path in metrics:
            found, metric = compare(outcomes, first, other, path), METRICS[path]
            if found is None:
                continue
            lines.append(
                f"・{name_setting(other)}（{name_setting(first)}と比べて）："
                f"{metric.name}は{_say(found, metric)}"
            )
    return "\n".join(lines)


def _say(found: Estimate, metric: Metric) -> str:
    form = "{:+.0%}" if metric.high == 1.0 else "{:+.2f}"
    if not found.has_interval:
        return f"差 {form.format(found.mean)}。乱数シードが 3 つより少ないので、偶然かどうかは言えません。"
    interval = (
        f"差 {form.format(found.mean)}（95 % 区間 {form.format(found.low)}〜{form.format(found.high)}）"
    )
    if found.low <= 0 <= found.high:
        return f"{interval}。区間が 0 を含むので、変わったとも変わらないとも言えません。"
    better = (found.mean > 0) == metric.more_is_better
    return f"{interval}。{'良く' if better else '悪く'}なりました。"


def collect_answers(outcomes: list[tuple]) -> list[dict]:
    """Return what each setting answers to the same questions (of the first seed), as rows of a Japanese
    table.
    """
    table = {}
    for experiment, record in outcomes:
        for shown in record["metrics"].get("shown", []):
            name = name_setting(dict(experiment.setting))
            table.setdefault(shown["question"], {}).setdefault(name, shown["answer"])
    return [{"質問": question, **answers} for question, answers in table.items()]


def recommend(outcomes: list[tuple], path: str = RIGHT) -> tuple[dict | None, str]:
    """Return (setting, reason): the lowest loss among settings whose writing is no worse than the best one's.

    No worse: its 95 % interval reaches the best mean. None where that cannot be told, or leaves a single
    setting that was compared with nothing.
    """
    metric, found = METRICS[path], {}
    for number, setting in enumerate(list_settings(outcomes)):
        values = list(collect_values(outcomes, setting, path).values())
        losses = list(collect_values(outcomes, setting, "held_out.loss").values())
        if len(values) >= FEWEST_SEEDS and losses:
            found[number] = (estimate(values, metric.low, metric.high), statistics.fmean(losses))
    if len(found) < 2:
        return None, "3 つ以上の乱数シードで比べられた設定が 2 つより少ないので、おすすめはありません。"
    best = max(mean.mean for mean, _ in found.values())
    good = {number: loss for number, (mean, loss) in found.items() if mean.high >= best}
    number = min(good, key=good.get)
    setting = list_settings(outcomes)[number]
    reason = (
        f"{metric.name}が {write_estimate(found[number][0], metric)} で、"
        f"最も良い {best:.0%} に劣るとは言えない "
        f"{len(good)} 通りのうち、評価用の損失が最も低い設定です（比べた設定は {len(found)} 通り）。"
    )
    return setting, reason


def save_recommendation(path, common: dict, settings: list[dict | None], model_name: str) -> str:
    """Write the main notebook's configuration with what was found; return what to say. Nothing found,
    nothing written.
    """
    chosen = [setting for setting in settings if setting]
    if not chosen:
        return (
            "おすすめの設定がないので、設定ファイルは書きませんでした。"
            "SEEDS を 3 つ以上にして試してください。"
        )
    known, merged = RunConfig().as_dict(), {}
    for setting in (common, *chosen):
        merged |= {name: value for name, value in setting.items() if name in known}
    config = RunConfig().replace(merged)
    config.save(path)
    differences = "\n".join(f"・{line}" for line in RunConfig().differences(config))
    return (
        f"{path} を書きました。これは {model_name} で見つけた設定です。"
        "大きいモデルでは、学習率を 10 分の 1 ほどに小さくして使ってください。\n"
        f"既定の設定との違い：\n{differences}"
    )


def make_figure(width: float = 7.0, height: float = 4.2) -> ShownFigure:
    return ShownFigure(figsize=(width, height), dpi=100, facecolor="white", layout="constrained")


def plot_bars(outcomes: list[tuple], metrics: list[str], title: str) -> ShownFigure:
    """Draw one panel for each metric with a bar for each setting, named by its values, with 95 %
    intervals.
    """
    settings = list_settings(outcomes)
    names = [
        " / ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in s.values())
        for s in settings
    ]
    figure = make_figure(1.5 + 3.4 * len(metrics), 4.4)
    figure.suptitle(title, fontsize=13)
    for axis, path in zip(figure.subplots(1, len(metrics), squeeze=False).flat, metrics, strict=True):
        metric = METRICS[path]
        for i, setting in enumerate(settings):
            values = list(collect_values(outcomes, setting, path).values())
            if values:
                _draw_bar(axis, i, estimate(values, metric.low, metric.high), metric)
            else:
                axis.text(i, 0, "なし", ha="center", va="bottom", fontsize=11, color=GREY)
        if metric.level is not None:
            axis.axhline(metric.level, color=GREY, linestyle=":")
        axis.set_xticks(range(len(settings)), names, rotation=30, ha="right")
        axis.set_xlabel(" / ".join(KNOB_NAMES.get(name, name) for name in settings[0]), fontsize=12)
        axis.set_title(metric.name, fontsize=11)
        axis.margins(y=0.14)
        axis.set_ylim(bottom=0, top=1.12 if metric.high == 1.0 else None)
    return figure


def _draw_bar(axis, place: int, found: Estimate, metric: Metric) -> None:
    error = [[found.mean - found.low], [found.high - found.mean]] if found.has_interval else None
    axis.bar(place, found.mean, yerr=error, color=CHOSEN, capsize=4)
    top = found.high if found.has_interval else found.mean  # the interval's line would strike the number out
    text = f"{found.mean:.0%}" if metric.high == 1.0 else f"{found.mean:.2g}"
    axis.annotate(
        text, (place, max(top, 0)), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=10
    )


def plot_lines(
    outcomes: list[tuple], x: str, paths: list[str], title: str, log_x: bool = False
) -> ShownFigure:
    """Draw metrics against one setting, a labelled line for each, with 95 % intervals where there are
    enough seeds.
    """
    figure = make_figure()
    axis, settings = figure.subplots(), list_settings(outcomes)
    for path, colour, marker in zip(paths, (CHOSEN, REJECTED, HELD_OUT), "osD", strict=False):
        metric, points = METRICS[path], []
        for setting in settings:
            if values := list(collect_values(outcomes, setting, path).values()):
                points.append((setting[x], estimate(values, metric.low, metric.high)))
        errors = None
        if points and all(found.has_interval for _, found in points):
            errors = [[f.mean - f.low for _, f in points], [f.high - f.mean for _, f in points]]
        xs, ys = [place for place, _ in points], [found.mean for _, found in points]
        axis.errorbar(xs, ys, yerr=errors, fmt=f"{marker}-", color=colour, capsize=4, label=metric.name)
    axis.set_xlabel(KNOB_NAMES.get(x, x), fontsize=12)
    axis.set_title(title, fontsize=13)
    if log_x:
        axis.set_xscale("log")
        axis.set_xticks(
            sorted({s[x] for s in settings}), [f"{tick:g}" for tick in sorted({s[x] for s in settings})]
        )
        axis.minorticks_off()
    axis.grid(alpha=0.2)
    axis.legend(fontsize=10)
    return figure
