"""Turns the results of an experiment into numbers with intervals, claims, tables and a recommendation;
nothing here runs or draws.
"""

import math
import statistics
from typing import NamedTuple

from dpo_helpers.config import RunConfig

# 97.5 % points of Student's t for 1 to 30 degrees of freedom; beyond, the last one, a little too wide.
T_975 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
    2.110,
    2.101,
    2.093,
    2.086,
    2.080,
    2.074,
    2.069,
    2.064,
    2.060,
    2.056,
    2.052,
    2.048,
    2.045,
    2.042,
)
FEWEST_SEEDS = 3


class Estimate(NamedTuple):
    """A mean over seeds and the half width of its 95 % interval (None for fewer than three seeds), in the
    metric's unit.
    """

    mean: float
    half_width: float | None
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.half_width is None else f" ± {self.half_width:.3f}")

    @property
    def direction(self) -> str:
        """ "lower" or "higher" where the interval excludes zero, else "unclear"."""
        if self.half_width is None or abs(self.mean) <= self.half_width:
            return "unclear"
        return "lower" if self.mean < 0 else "higher"


def estimate(values: list[float]) -> Estimate:
    """Return mean and 95 % interval by Student's t: mean ± t * s / sqrt(n)."""
    count = len(values)
    if count < FEWEST_SEEDS:
        return Estimate(statistics.fmean(values), None, count)
    t = T_975[min(count - 1, len(T_975)) - 1]
    return Estimate(statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(count), count)


def read_metric(record: dict, metric: str) -> float | None:
    """Return a metric by its dotted path, e.g. "held_out.loss"; None where the run has none (NaN, failed)."""
    value = record["metrics"]
    for name in metric.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def collect_values(outcomes: list[tuple], setting: dict, metric: str) -> dict[int, float]:
    """Return {seed: value} of the runs of one setting that have the metric."""
    values = {}
    for experiment, record in outcomes:
        if dict(experiment.setting) == setting and (value := read_metric(record, metric)) is not None:
            values[experiment.config.seed] = value
    return values


def compare_by_seed(first: dict[int, float], second: dict[int, float]) -> Estimate | None:
    """Return second minus first, paired by seed: what all runs of a seed share drops out. None without a
    common seed.
    """
    seeds = sorted(set(first) & set(second))
    return estimate([second[seed] - first[seed] for seed in seeds]) if seeds else None


def list_settings(outcomes: list[tuple]) -> list[dict]:
    """Return the different settings, in the order of the plan."""
    return [dict(setting) for setting in dict.fromkeys(experiment.setting for experiment, _ in outcomes)]


def name_setting(setting: dict) -> str:
    return "、".join(f"{name}={value}" for name, value in setting.items()) or "共通の設定"


COLUMNS = {
    "評価の損失": "held_out.loss",
    "正解率": "held_out.accuracy",
    "対数比の差（nat）": "held_out.log_ratio",
    "参照からの距離": "distance",
    "終わる回答": "answers.ends",
    "繰り返す回答": "answers.repetition",
    "distinct-2": "answers.distinct_2",
    "秒": "seconds.training",
}


def summarize_outcomes(outcomes: list[tuple], columns: dict | None = None) -> list[dict]:
    """Return a table: a line for each setting, with the mean and interval over its seeds, and what went
    wrong.
    """
    table = []
    for setting in list_settings(outcomes):
        mine = [record for experiment, record in outcomes if dict(experiment.setting) == setting]
        bad = [f"{record['status']}：{record['reason']}" for record in mine if record["status"] != "ok"]
        line = {"設定": name_setting(setting), "回数": len(mine) - len(bad)}
        for heading, metric in (columns or COLUMNS).items():
            values = list(collect_values(outcomes, setting, metric).values())
            line[heading] = str(estimate(values)) if values else "－"
        table.append(line | {"問題": bad[0] if bad else ""})
    return table


class Claim(NamedTuple):
    """One sentence of the notebook's prose: in `metric`, `second` is `direction` than `first`, everything
    else being equal.
    """

    section: int
    first: dict
    second: dict
    metric: str
    direction: str  # "lower" or "higher"
    text: str
    first_metric: str = ""  # where the first one is measured by another metric


def check_claim(claim: Claim, outcomes: list[tuple]) -> tuple[str, Estimate | None]:
    """Return ("yes" | "no" | "unclear" | "absent", the difference paired by seed); "yes" and "no" need an
    interval without zero.
    """
    first = collect_values(outcomes, claim.first, claim.first_metric or claim.metric)
    difference = compare_by_seed(first, collect_values(outcomes, claim.second, claim.metric))
    if difference is None:
        return "absent", None
    if difference.direction == "unclear":
        return "unclear", difference
    return "yes" if difference.direction == claim.direction else "no", difference


def describe_claims(claims, outcomes: list[tuple]) -> list[dict]:
    """Return what these results say of each claim, as rows of a Japanese table."""
    words = {"yes": "その通り", "no": "逆でした", "absent": "比べる結果がない"}
    table = []
    for claim in claims:
        verdict, difference = check_claim(claim, outcomes)
        if verdict == "unclear":
            few = difference.count < FEWEST_SEEDS
            words["unclear"] = (
                f"種が {difference.count} 個なので区間は出せない"
                if few
                else "区間が 0 を含み、どちらとも言えない"
            )
        table.append(
            {
                "わかったこと": claim.text,
                "この結果では": words[verdict],
                "差": str(difference) if difference else "－",
            }
        )
    return table


def collect_answers(outcomes: list[tuple]) -> list[dict]:
    """Return what each setting answers to the same questions (of the first seed), as rows of a Japanese
    table.
    """
    table = {}
    for experiment, record in outcomes:
        name = name_setting(dict(experiment.setting))
        for shown in record["metrics"].get("shown", []):
            table.setdefault(shown["question"], {}).setdefault(name, shown["answer"])
    names = [name_setting(setting) for setting in list_settings(outcomes)]
    return [
        {"質問": question, **{name: answers.get(name, "－") for name in names}}
        for question, answers in table.items()
    ]


def recommend(outcomes: list[tuple], worst_repetition: float = 0.15) -> tuple[dict, str]:
    """Return (setting, reason) of the lowest mean held-out loss, at one beta for all, among those that never
    broke.

    Broken: NaN, a failure, or more answers that repeat themselves than `worst_repetition`. Low loss alone
    would pick a model that has stopped to speak.
    """
    candidates = []
    for setting in list_settings(outcomes):
        mine = [record for experiment, record in outcomes if dict(experiment.setting) == setting]
        repetition = collect_values(outcomes, setting, "answers.repetition").values()
        values = list(collect_values(outcomes, setting, "held_out.default_beta_loss").values())
        if len(values) == len(mine) == len(repetition) and statistics.fmean(repetition) <= worst_repetition:
            candidates.append((estimate(values), setting))
    if not candidates:
        return {}, "どの設定も値か回答が壊れたので、選べません。学習率か倍率を下げて試してください。"
    best, setting = min(candidates, key=lambda item: item[0].mean)
    left = len(list_settings(outcomes)) - len(candidates)
    reason = (
        f"評価の損失（β を {RunConfig().beta} にそろえたもの）が {best} で、"
        f"比べた {left + len(candidates)} 通りのうち最も低い設定です"
    )
    return setting, reason + (
        f"（値が壊れた、または繰り返す回答が {worst_repetition:.0%} を超えた {left} 通りは除きました）。"
        if left
        else "。"
    )


def make_recommended_config(common: dict, *settings: dict) -> RunConfig:
    """Return the main notebook's configuration with what was found, one section after the other."""
    merged = {name: value for setting in (common, *settings) for name, value in setting.items()}
    known = RunConfig().as_dict()
    return RunConfig().replace({name: value for name, value in merged.items() if name in known})
