"""Judges a run from its recorded numbers by one table of rules; it measures nothing and reads no file
(judge.py does).
"""

import math
import operator
from typing import NamedTuple

from dpo_helpers.data.look import KIND_NAMES
from dpo_helpers.judge.answers import accuracy_interval
from dpo_helpers.judge.baselines import BASELINE_NAMES
from dpo_helpers.judge.monitoring import collect_history, summarize_training
from dpo_helpers.judge.scores import preference_loss

LN_2 = math.log(2)
LABEL_NAMES = {
    "learned": "学習できました",
    "undertrained": "まだ学習不足です",
    "overfitted": "過学習です",
    "collapsed": "崩壊しています",
    "undecided": "判断できません",
}
OPERATORS = {"<": operator.lt, ">=": operator.ge}


class Rule(NamedTuple):
    """Holds where every (fact, operator, threshold) does; a fact that is not known makes it not hold."""

    label: str
    conditions: tuple[tuple[str, str, float], ...]
    reason: str
    next_step: str = ""

    def holds(self, facts: dict) -> bool:
        return all(
            name in facts and OPERATORS[sign](facts[name], threshold)
            for name, sign, threshold in self.conditions
        )


# Each threshold with its source, or with what was measured (tests/fixtures/verdict).
EQUAL_TEXT = (
    0.01  # nats between the two sides' log-probs in any line of the log; different texts differ by several
)
MOST = 0.5  # of the answers became bad; measured: collapsed 0.93, memorised noise 0.33, healthy 0.08
BEYOND_CHANCE = (
    0.3  # between two shares of 30 to 40 answers; the 95 % half-width of their difference is at most 0.25
)
# distinct-2 over its value before; measured: healthy 0.97, memorised noise 0.35, collapsed 0.02 and 0.004
SAME_ANSWERS = 0.2
# nats a token from the reference; measured: healthy 0.17, 135M 0.09, memorised noise 0.77, collapsed 7.1 and
# 7.2
FAR_AWAY = 1.0
UNLIKELY = 1.3  # times the chosen log-prob before; measured: healthy 1.03, 135M 1.11, collapsed 1.4 and 1.6
DIVERGED = (
    1.0  # training loss; ln 2 = 0.693 knows nothing; measured: shuffled labels 0.70, collapsed 3.4 and 3.6
)
NOT_MOVED = 0.68  # that is a margin of 0.026; measured: stuck 0.693, 135M with the usual LoRA scale 0.687
# chosen is preferred with e^-0.6 = 55 %; rasbt's GPT-2 355M at 5e-6 ends at 0.61, ours at 0.16 to 0.38
TOO_LITTLE = 0.6
WORSE = LN_2 + 0.01  # held-out; measured: stuck 0.6931, shuffled labels 0.727
WIDE = 0.3  # the accuracy's 95 % interval (Wilson 1927): 10 rows all right, 20 at 90 %, 40 at chance
GAP = 0.3  # held-out minus training loss; measured: healthy 0.07, 135M 0.01 to 0.05, overfitted 0.64
CHANCE = 0.5  # the accuracy of a coin
# points of chrF; measured: the untouched and the stuck model 8.4 and 9.1, the healthy demo 8.6, 135M 8.1
# before and 24.5 after
NEARER = 3.0
FALL = 0.01  # nats an answer (in the log alone: times beta); measured: stuck 0.00002, healthy 3.5
# a first loss above that is none of sigmoid's kind (ln 2): hinge 1, ipo 1 / (4 beta²), nca_pair 3 ln 2
OTHER_LOSS = 0.8

LOWER_RATE = "LEARNING_RATE を 10 分の 1 に下げて、学習し直してください。"
RAISE_RATE = "LEARNING_RATE を {times} 倍に上げて、学習し直してください。"
FEWER_EPOCHS = "NUM_TRAIN_EPOCHS を半分以下に減らして、学習し直してください。"
MORE_ROWS = "NUM_SAMPLES を増やし（自分のデータなら行を足し）、評価用の行を {rows} 行以上にしてください。"
MORE_SFT = "SFT_EPOCHS を増やして、DPO の前に文章の書き方を教えてください。"

# The first rule that holds decides; every rule takes for granted that those above it do not hold.
RULES = (
    Rule(
        "collapsed",
        (("broken_numbers", ">=", 1),),
        "損失か勾配が、NaN（数として扱えない値）か無限大になりました。",
        LOWER_RATE,
    ),
    Rule(
        "undecided",
        (("side_difference", "<", EQUAL_TEXT),),
        "良い回答と悪い回答の対数確率が、記録のどこでも同じです。"
        "chosen と rejected が同じ文章なので、比べるものがありません。",
        "DATA_FILE の chosen と rejected が違う文章になるように、データを直してください。",
    ),
    Rule(
        "collapsed", (("damage", ">=", MOST),), "学習前には書けていた文章が、書けなくなりました。", LOWER_RATE
    ),
    Rule(
        "collapsed",
        (("variety", "<", SAME_ANSWERS),),
        "どの質問にも似た回答を返します。回答に出てくる二文字の並びの種類が、"
        "学習前の {variety:.0%} に減りました。",
        LOWER_RATE,
    ),
    Rule(
        "collapsed",
        (("train_loss", ">=", DIVERGED),),
        "学習用の損失が {train_loss:.2f} で、学習前の 0.693 より大きくなりました。学習が発散しています。",
        LOWER_RATE,
    ),
    Rule(
        "collapsed",
        (("chosen_growth", ">=", UNLIKELY),),
        "良い回答の対数確率（負の値）の大きさが学習前の {chosen_growth:.1f} 倍になり、"
        "良い回答まで出にくくなりました。",
        LOWER_RATE,
    ),
    Rule(
        "undertrained",
        (("held_out_loss", ">=", NOT_MOVED), ("held_out_loss", "<", WORSE)),
        "評価用の損失が、学習前（ln 2 = 0.693）からほとんど動いていません。",
        RAISE_RATE.format(times=10),
    ),
    Rule(
        "undecided",
        (("interval_width", ">=", WIDE),),
        "評価用の行が {rows} 行しかなく、正解率の 95 % 区間が "
        "{accuracy_low:.0%}〜{accuracy_high:.0%} と広すぎます。",
        MORE_ROWS.format(rows=40),
    ),
    Rule(
        "overfitted",
        (("gap", ">=", GAP),),
        "学習用の損失は {train_loss:.3f} なのに、評価用の損失は {held_out_loss:.3f} "
        "です。学習した行だけを覚えています。",
        FEWER_EPOCHS,
    ),
    Rule(
        "overfitted",
        (("curve_gap", ">=", GAP),),
        "学習用の損失は {train_loss:.3f} なのに、途中で測った評価用の損失は "
        "{curve_loss:.3f} です。学習した行だけを覚えています。",
        FEWER_EPOCHS,
    ),
    Rule(
        "collapsed",
        (("damage", ">=", BEYOND_CHANCE),),
        "学習前には書けていた文章が、崩れはじめています。",
        LOWER_RATE,
    ),
    Rule(
        "collapsed",
        (("faults", ">=", BEYOND_CHANCE), ("reference_distance", ">=", FAR_AWAY)),
        "自分で書いた回答が崩れ、参照モデルから大きく離れました（1 トークンあたり "
        "{reference_distance:.1f} nat）。",
        LOWER_RATE,
    ),
    Rule(
        "undecided",
        (("held_out_loss", ">=", WORSE), ("accuracy_low", "<", CHANCE)),
        "モデルは動きましたが、評価用の損失は {held_out_loss:.3f} で、学習前の 0.693 より悪くなりました。"
        "chosen と rejected の付け方に決まりがないと、こうなります。",
        "DATA_FILE の chosen と rejected が入れ替わっている行を直し、誤りを減らしてください。",
    ),
    Rule(
        "undertrained",
        (("margin_loss", ">=", NOT_MOVED), ("train_loss", ">=", NOT_MOVED), ("train_loss", "<", WORSE)),
        "学習用の損失が、学習前（ln 2 = 0.693）からほとんど動いていません。",
        RAISE_RATE.format(times=10),
    ),
    Rule(
        "undertrained",
        (("held_out_loss", ">=", TOO_LITTLE),),
        "評価用の損失は {held_out_loss:.3f} で、学習前の 0.693 から少ししか下がっていません。",
        RAISE_RATE.format(times=3),
    ),
    Rule(
        "undecided",
        (("accuracy_low", "<", CHANCE),),
        "正解率の 95 % 区間が 50 % を含むので、当てずっぽうと区別できません。",
        MORE_ROWS.format(rows=200),
    ),
    Rule(
        "undecided",
        (("baseline_excess", ">=", 0.0),),
        "「{best_baseline_name}」という見分け方だけで {best_baseline:.1%} 当たるので、"
        "学習の効果とは言えません。",
        "DATA_FILE に、その見分け方では当たらない行（長さのそろった難しい組など）を増やしてください。",
    ),
    Rule(
        "undertrained",
        (("faults", ">=", BEYOND_CHANCE),),
        "二つの回答の区別はできますが、自分ではまだ読める文章を書けません。",
        MORE_SFT,
    ),
    Rule(
        "learned",
        (("held_out_loss", "<", TOO_LITTLE), ("accuracy_low", ">=", CHANCE), ("answers", ">=", 1)),
        "学習に使っていない質問でも、良い回答を選べるようになりました。",
        "さらに良くするには、NUM_SAMPLES を増やして（自分のデータなら行を足して）ください。",
    ),
    Rule(
        "undecided",
        (("held_out_loss", "<", TOO_LITTLE),),
        "二つの回答の区別はできますが、自分で書いた回答を測っていないので、"
        "読める文章を書けるのかが分かりません。",
        "学習した重みのあるフォルダーで python -m dpo_helpers judge を実行して、回答を測ってください。",
    ),
    Rule(
        "undertrained",
        (("margin_loss", ">=", TOO_LITTLE),),
        "学習用のマージンが {train_margin:.2f} しかなく、二つの回答をまだ区別できていません。",
        RAISE_RATE.format(times=3),
    ),
    Rule(
        "undecided",
        (("interrupted", ">=", 1),),
        "学習が途中で止まっています。",
        "RESUME を「自動」のままにして、続きを最後まで実行してください。",
    ),
    Rule(
        "undecided",
        (("dpo_lines", "<", 1),),
        "DPO の学習の記録がありません。",
        "NUM_TRAIN_EPOCHS を 1 以上にして、DPO を実行してください。",
    ),
    Rule(
        "undecided",
        (),
        "学習に使わない行での評価がないので、覚えただけなのか、学習できたのかを区別できません。",
        "HELD_OUT_FRACTION を 0.2 以上にして、評価用の行を取り分けてください。",
    ),
)

# Said beside the deciding reason, wherever the facts are known.
NOTES = (
    Rule(
        "",
        (("rows", ">=", 1),),
        "評価用 {rows} 行の正解率は {accuracy:.1%}（95 % 区間 "
        "{accuracy_low:.1%}〜{accuracy_high:.1%}、当てずっぽうは 50 %）、"
        "損失は {held_out_loss:.3f}（学習前は 0.693）です。",
    ),
    Rule(
        "",
        (("best_baseline", ">=", 0),),
        "学習をしない見分け方で最も当たるのは「{best_baseline_name}」で、{best_baseline:.1%} です。",
    ),
    Rule(
        "",
        (("answers", ">=", 1),),
        "{answers} 問への回答（学習前 → 学習後）：最後まで書けた {ends_before:.0%} → "
        "{ends_after:.0%}、繰り返しがある "
        "{repetition_before:.0%} → {repetition_after:.0%}、日本語の文字 "
        "{japanese_before:.0%} → {japanese_after:.0%}、お手本との近さ（chrF、0〜100）"
        "{chrf_before:.0f} → {chrf_after:.0f}。",
    ),
    Rule(
        "",
        (("chrf_gain", "<", NEARER), ("collapsed", "<", 1)),
        "自分で書く回答の内容が、お手本に近づいたとは言えません。回答の表を読んで確かめてください。",
    ),
    Rule(
        "",
        (("chosen_change", "<", -FALL), ("rejected_change", "<", -FALL), ("collapsed", "<", 1)),
        "良い回答と悪い回答の対数確率が、どちらも学習前より下がっています。"
        "DPO が広げるのは二つの差なので、悪い回答のほうが大きく下がっていれば異常ではありません。",
    ),
)


def judge(metrics: dict, log_history: list[dict]) -> dict:
    """Return {label, reasons, next_step} of what metrics.json and the trainer's log say; either may be empty.

    The deciding reason comes first. `next_step` names one knob and its direction.
    """
    facts = collect_facts(metrics, log_history)
    rule = next(rule for rule in RULES if rule.holds(facts))
    facts["collapsed"] = int(rule.label == "collapsed")
    reasons = [each.reason.format(**facts) for each in (rule, *NOTES) if each.holds(facts)]
    return {"label": rule.label, "reasons": reasons + _name_weak_kinds(metrics), "next_step": rule.next_step}


def describe_verdict(verdict: dict) -> str:
    """Return the verdict as Japanese text of several lines."""
    reasons = "\n".join(f"・{reason}" for reason in verdict["reasons"])
    return f"判定：{LABEL_NAMES[verdict['label']]}\n{reasons}\n次の一手：{verdict['next_step']}"


def collect_facts(metrics: dict, log_history: list[dict]) -> dict:
    """Return the numbers that the rules read, by name; what is not known is not in it."""
    facts = _read_log(metrics, log_history) | _read_held_out(metrics) | _read_answers(metrics)
    measured = (
        "held_out_loss" if "held_out_loss" in facts else "curve_loss"
    )  # all rows tell more than the sample of the curve
    if measured in facts and "train_loss" in facts:
        facts["gap" if measured == "held_out_loss" else "curve_gap"] = facts[measured] - facts["train_loss"]
    return facts


def _read_log(metrics: dict, log_history: list[dict]) -> dict:
    training, curve = (collect_history(log_history)[name] for name in ("training", "held_out"))
    losses = summarize_training(log_history) | {
        key: metrics[key] for key in ("first_loss", "final_train_loss") if key in metrics
    }
    facts = {
        "broken_numbers": int(_has_broken_numbers(metrics, log_history)),
        "interrupted": int(metrics.get("stopped", {}).get("reason") == "interrupted"),
        "dpo_lines": len(training["step"]),
    }
    if losses and losses["first_loss"] < OTHER_LOSS:
        facts["train_loss"] = losses["final_train_loss"]
    if training["step"]:
        facts["side_difference"] = max(
            abs(c - r) for c, r in zip(training["chosen"], training["rejected"], strict=True)
        )
        tail = [
            margin
            for step, margin in zip(training["step"], training["margin"], strict=True)
            if step > 0.9 * training["step"][-1]
        ]
        facts["train_margin"] = sum(tail) / len(tail)
        facts["margin_loss"] = preference_loss(
            facts["train_margin"]
        )  # no more than the mean loss (Jensen), whatever loss_type trained
        last = [entry for entry in log_history if "rewards/chosen" in entry][-1]
        facts |= {
            f"{side}_change": last[f"rewards/{side}"] for side in ("chosen", "rejected")
        }  # times beta: the sign is what counts
    if len(curve["step"]) > 1:
        facts |= {"chosen_growth": curve["chosen"][-1] / curve["chosen"][0], "curve_loss": curve["loss"][-1]}
    return facts


def _has_broken_numbers(metrics: dict, log_history: list[dict]) -> bool:
    """Say whether the run ended in NaN or infinity; a single gradient may overflow, as fp16's scaler
    expects it to.
    """
    losses = [
        entry[key]
        for entry in log_history
        for key in ("loss", "eval_loss", "rewards/margins")
        if key in entry
    ]
    losses += [metrics[key] for key in ("first_loss", "final_train_loss") if key in metrics]
    losses += [(metrics.get("held_out") or {}).get("loss", 0.0)]
    gradients = [entry["grad_norm"] for entry in log_history if "grad_norm" in entry][-3:]
    stopped = metrics.get("stopped", {}).get("reason") == "nan"
    return (
        stopped
        or not all(map(math.isfinite, losses))
        or (bool(gradients) and not any(map(math.isfinite, gradients)))
    )


def _read_held_out(metrics: dict) -> dict:
    held_out = metrics.get("held_out")
    if not held_out:
        return {}
    rows, accuracy = held_out["rows"], held_out["accuracy"]
    low, high = held_out.get("accuracy_interval") or accuracy_interval(round(accuracy * rows), rows)
    facts = {
        "rows": rows,
        "accuracy": accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "interval_width": high - low,
    }
    facts |= {"held_out_loss": held_out["loss"]} | {
        name: held_out[name] for name in held_out if name.endswith("_change")
    }
    facts = {name.replace("_log_prob", ""): value for name, value in facts.items()}
    if baselines := {
        name: value for name, value in (metrics.get("baselines") or {}).items() if name != "shuffled_labels"
    }:
        best = max(baselines, key=baselines.get)
        facts |= {
            "best_baseline": baselines[best],
            "best_baseline_name": BASELINE_NAMES[best],
            "baseline_excess": baselines[best] - low,
        }
    return facts


def _read_answers(metrics: dict) -> dict:
    """Return the measures of the answers, by how much they are worse than before (damage) and than the
    chosen answers (faults).
    """
    parts = metrics.get("generation") or {}
    if not {"before", "after"} <= set(parts):
        return {}
    before, after = parts["before"], parts["after"]
    chosen = parts.get("chosen", {"repetition": 0.0, "ends": 1.0, "japanese": 1.0, "distinct_2": 1.0})
    loops = after["repetition"]
    facts = {
        "answers": after["answers"],
        # the worst of three: loops, missing ends, another script
        "damage": max(
            loops - max(before["repetition"], chosen["repetition"]),
            *(min(before[name], chosen[name]) - after[name] for name in ("ends", "japanese")),
        ),
        "faults": max(
            loops - chosen["repetition"], *(chosen[name] - after[name] for name in ("ends", "japanese"))
        ),
    }
    facts["chrf_gain"] = after["chrf"] - before["chrf"]
    if least := min(before["distinct_2"], chosen["distinct_2"]):
        facts["variety"] = after["distinct_2"] / least
    for when, part in (("before", before), ("after", after), ("chosen", chosen)):
        facts |= {f"{name}_{when}": value for name, value in part.items()}
    return facts | {name: metrics[name] for name in ("reference_distance",) if name in metrics}


def _name_weak_kinds(metrics: dict) -> list[str]:
    """Name the rejection kinds of ten rows or more whose accuracy may be chance, in one sentence; nothing
    if all may be.
    """
    kinds = [line for line in metrics.get("by_rejection_kind", []) if line["rows"] >= 10]
    weak = [
        line
        for line in kinds
        if accuracy_interval(round(line["accuracy"] * line["rows"]), line["rows"])[0] < CHANCE
    ]
    names = "、".join(
        f"{KIND_NAMES.get(line['rejection_kind'], line['rejection_kind'])}（{line['accuracy']:.0%}）"
        for line in weak
    )
    return (
        [f"悪さの種類のうち、当てずっぽうと区別できないもの：{names}。"] if 0 < len(weak) < len(kinds) else []
    )
