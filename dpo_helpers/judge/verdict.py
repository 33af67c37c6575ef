"""Judges a run from its recorded figures by one table of rules; it measures nothing and reads no file.

Two abilities make `learned`: 見分ける (prefers the better of two answers) and 書く (its own answers say the
right thing, in good manners). The first rule that holds decides.
"""

import math
import operator
from typing import NamedTuple

from dpo_helpers.data.look import KIND_NAMES, UNSEEN_NAMES
from dpo_helpers.judge.answers import share_interval
from dpo_helpers.judge.history import collect_history, summarize_training
from dpo_helpers.judge.rules import RULE_NAMES

LABEL_NAMES = {
    "learned": "学習できました",
    "undertrained": "まだ学習不足です",
    "overfitted": "過学習です",
    "collapsed": "崩壊しています",
    "harmed": "DPO で書く力が落ちました",
    "discriminates_only": "見分けられますが、書けません",
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
            name in facts and OPERATORS[sign](facts[name], limit) for name, sign, limit in self.conditions
        )


# Each threshold with its source, or with what was measured (tests/fixtures/verdict).
EQUAL_TEXT = (
    0.01  # nats between the two sides' log-probs in any line of the log; different texts differ by several
)
FEWEST = 40  # unseen questions: the 95 % interval of a share is then at most ± 0.15
DAMAGE = 0.3  # of the answers became loops, lost their ends or their script
DIVERGED = 1.0  # training loss; ln 2 = 0.693 knows nothing
NOT_MOVED = 0.68  # that is a margin of 0.026
WORSE = math.log(2) + 0.01
TOO_LITTLE = 0.6  # chosen is preferred with e^-0.6 = 55 %; rasbt's GPT-2 355M at 5e-6 ends at 0.61
GAP = 0.3  # held-out minus training loss
CHANCE = 0.5
USABLE = 0.5  # of the greedy answers to one kind of unseen question say the right thing
GOOD_MANNERS = 0.3  # at most so many of the answers to a user's own questions are nearer to the rejected one
HARM = -0.1  # the lower end of the paired interval of right, or of good manners, against the model before DPO
OTHER_LOSS = 0.8  # a first loss above that is none of sigmoid's kind (ln 2): hinge 1, ipo 1 / (4 beta²)

LOWER_RATE = "LEARNING_RATE を 10 分の 1 に下げて、学習し直してください。"
RAISE_RATE = "LEARNING_RATE を {times} 倍に上げて、学習し直してください。"
FEWER_EPOCHS = "NUM_TRAIN_EPOCHS を半分以下に減らして、学習し直してください。"
MORE_SFT = "SFT_EPOCHS を 2 倍に増やして、DPO の前に回答の内容を教えてください。"
GENTLER = "LEARNING_RATE を 3 分の 1 に下げて、書く力を残しながら学習し直してください。"

# fmt: off
RULES = (
    Rule("collapsed", (("broken_numbers", ">=", 1),),
         "損失か勾配が、NaN（数として扱えない値）か無限大になりました。", LOWER_RATE),
    Rule("undecided", (("side_difference", "<", EQUAL_TEXT),),
         "良い回答と悪い回答の対数確率が、記録のどこでも同じです。"
         "chosen と rejected が同じ文章なので、比べるものがありません。",
         "DATA_FILE の chosen と rejected が違う文章になるように、データを直してください。"),
    Rule("undecided", (("interrupted", ">=", 1),),
         "学習が途中で止まっています。", "RESUME を「自動」のままにして、続きを最後まで実行してください。"),
    Rule("undecided", (("dpo_lines", "<", 1),),
         "DPO の学習の記録がありません。", "NUM_TRAIN_EPOCHS を 1 以上にして、DPO を実行してください。"),
    Rule("collapsed", (("damage", ">=", DAMAGE),),
         "ベースモデルには書けていた文章が、書けなくなりました。", LOWER_RATE),
    Rule("collapsed", (("train_loss", ">=", DIVERGED),),
         "学習用の損失が {train_loss:.2f} で、学習前の 0.693 より大きくなりました。"
         "学習が発散しています。", LOWER_RATE),
    Rule("undecided", (("questions", "<", FEWEST),),
         "評価用の質問が {questions:.0f} 問しかなく、偶然の揺れと区別できません。",
         "NUM_SAMPLES を増やし（自分のデータなら行を足し）、評価用の質問を 40 問以上にしてください。"),
    Rule("undertrained", (("held_out_loss", ">=", NOT_MOVED), ("held_out_loss", "<", WORSE)),
         "評価用の損失が、学習前（ln 2 = 0.693）からほとんど動いていません。", RAISE_RATE.format(times=10)),
    Rule("overfitted", (("gap", ">=", GAP),),
         "学習用の損失は {train_loss:.3f} なのに、評価用の損失は {held_out_loss:.3f} です。"
         "学習した行だけを覚えています。", FEWER_EPOCHS),
    Rule("undecided", (("held_out_loss", ">=", WORSE), ("accuracy_low", "<", CHANCE)),
         "モデルは動きましたが、評価用の損失は {held_out_loss:.3f} で、学習前の 0.693 より悪くなりました。"
         "chosen と rejected の付け方に決まりがないと、こうなります。",
         "DATA_FILE の chosen と rejected が入れ替わっている行を直し、誤りを減らしてください。"),
    Rule("undecided", (("accuracy_low", "<", CHANCE),),
         "正解率の 95 % 区間が 50 % を含むので、当てずっぽうと区別できません。", RAISE_RATE.format(times=3)),
    Rule("undecided", (("rule_excess", ">=", 0.0),),
         "「{best_rule}」という単純な規則だけで {best_rule_accuracy:.1%} 当たるので、"
         "見分けられるようになったとは言えません。",
         "DATA_FILE に、その規則では当たらない行（長さや終わり方のそろった難しいペア）を増やしてください。"),
    Rule("harmed", (("right_low", "<", HARM),),
         "DPO の前より、正しい回答が減りました（差 {right_change:+.0%}、"
         "95 % 区間 {right_low:+.0%}〜{right_high:+.0%}）。",
         GENTLER),
    Rule("harmed", (("manners_low", "<", HARM),),
         "DPO の前より、あいまいな回答や失礼な回答が増えました"
         "（良い書き方の差 {manners_change:+.0%}、"
         "95 % 区間 {manners_low:+.0%}〜{manners_high:+.0%}）。", GENTLER),
    Rule("undertrained", (("held_out_loss", ">=", TOO_LITTLE),),
         "評価用の損失は {held_out_loss:.3f} で、学習前の 0.693 から少ししか下が"
         "っていません。", RAISE_RATE.format(times=3)),
    Rule("discriminates_only", (("usable", "<", 1),),
         "二つの回答を見分けられますが、自分で書くと正しく答えられません。", MORE_SFT),
    Rule("discriminates_only", (("better", "<", 1),),
         "二つの回答を見分けられますが、書く回答は、ベースモデルより良くなったとは言えません。",
         RAISE_RATE.format(times=3)),
    Rule("learned", (("usable", ">=", 1),),
         "学習に使っていない質問で、良い回答を見分け、自分でも書けるようになりました。",
         "回答を読んで確かめ、足りない話題の行を DATA_FILE に加えてください。"),
    Rule("undecided", (),
         "学習に使わない行での評価がないので、覚えただけなのか、学習できたのかを区別できません。",
         "HELD_OUT_FRACTION を 0.2 以上にして、評価用の行を取り分けてください。"),
)
# fmt: on


def judge(metrics: dict, log_history: list[dict]) -> dict:
    """Return {label, headline, discrimination, writing, reasons, next_step} of metrics.json and the trainer's
    log.

    Either may be empty. The deciding reason comes first. `next_step` names one knob and its direction.
    """
    facts = collect_facts(metrics, log_history)
    rule = next(rule for rule in RULES if rule.holds(facts))
    headline = LABEL_NAMES[rule.label]
    added = _describe_addition(facts)
    if rule.label == "learned" and facts.get("added", 1) < 1:
        headline += "（教師あり学習の成果です。DPO は書き方を変えていません）"
    reasons = [rule.reason.format(**facts), *added, *_name_weak_kinds(metrics), *_explain_fall(metrics)]
    return {
        "label": rule.label,
        "headline": headline,
        "discrimination": _describe_discrimination(facts),
        "writing": _describe_writing(metrics),
        "reasons": reasons,
        "next_step": rule.next_step,
    }


def describe_verdict(verdict: dict) -> str:
    """Return the verdict as Japanese text of several lines."""
    lines = [f"判定：{verdict['headline']}"]
    lines += [
        f"{name}：{verdict[key]}"
        for name, key in (("見分ける", "discrimination"), ("書く", "writing"))
        if verdict[key]
    ]
    return "\n".join(
        [*lines, *(f"・{reason}" for reason in verdict["reasons"]), f"次の一手：{verdict['next_step']}"]
    )


def collect_facts(metrics: dict, log_history: list[dict]) -> dict:
    """Return the numbers that the rules read, by name; what is not known is not in it."""
    facts = _read_log(metrics, log_history) | _read_held_out(metrics) | _read_writing(metrics)
    if "held_out_loss" in facts and "train_loss" in facts:
        facts["gap"] = facts["held_out_loss"] - facts["train_loss"]
    return facts


def _read_log(metrics: dict, log_history: list[dict]) -> dict:
    training = collect_history(log_history)["training"]
    kept = {key: metrics[key] for key in ("first_loss", "final_train_loss") if key in metrics}
    losses = summarize_training(log_history) | kept
    facts = {
        "broken_numbers": int(_has_broken_numbers(metrics, log_history)),
        "interrupted": int(metrics.get("stopped", {}).get("reason") == "interrupted"),
        "dpo_lines": len(training["step"]),
    }
    if losses and losses["first_loss"] < OTHER_LOSS:
        facts["train_loss"] = losses["final_train_loss"]
    if training["step"]:
        differences = [abs(c - r) for c, r in zip(training["chosen"], training["rejected"], strict=True)]
        facts["side_difference"] = max(differences)
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
    dead = bool(gradients) and not any(map(math.isfinite, gradients))
    return stopped or dead or not all(map(math.isfinite, losses))


def _read_held_out(metrics: dict) -> dict:
    if not (held_out := metrics.get("held_out")):
        return {}
    low, high = held_out["accuracy_interval"]
    found = metrics["discrimination"]
    return {
        "rows": held_out["rows"],
        "held_out_loss": held_out["loss"],
        "accuracy": held_out["accuracy"],
        "accuracy_low": low,
        "accuracy_high": high,
        "best_rule": RULE_NAMES[found["best_rule"]],
        "best_rule_accuracy": found["best_rule_accuracy"],
        "rule_excess": found["best_rule_accuracy"] - low,
    }


def _read_writing(metrics: dict) -> dict:
    """Return what the writing says: is it usable, better than the base's, worse than before DPO, damaged."""
    if not (writing := metrics.get("writing")):
        return {}
    change = metrics["writing_change"]
    before = change.get("warm_up") or change["base"]
    right, manners = before["greedy"]["right"], before["greedy"]["manners"]
    own_rows = "held_out" in writing
    usable = [
        roles["policy"]["greedy"]["manners"] <= GOOD_MANNERS
        if own_rows
        else roles["policy"]["greedy"]["right"] >= USABLE
        for roles in writing.values()
    ]
    facts = {
        "questions": sum(roles["policy"]["greedy"]["questions"] for roles in writing.values()),
        "usable": int(any(usable)),
        "better": int(_is_better(change["base"])),
        "right_change": right[0],
        "right_low": right[1],
        "right_high": right[2],
        "manners_change": -manners[0],
        "manners_low": -manners[2],
        "manners_high": -manners[1],
        "damage": max(_measure_damage(roles) for roles in writing.values()),
    }
    if "warm_up" in change:
        facts["added"] = int(_is_better(change["warm_up"]))
        facts["sampled"] = before["sampled"]
    return facts


def _is_better(change: dict) -> bool:
    """Say whether greedy right, sampled right or manners (either way) got better, by the whole 95 %
    interval.
    """
    gains = [change[way]["right"][1] > 0 for way in change] + [
        change[way]["manners"][2] < 0 for way in change
    ]
    return any(gains)


def _measure_damage(roles: dict) -> float:
    """Return the share of greedy answers that became loops, lost their ends or their script: the worst of
    three.
    """
    base, policy = roles["base"]["greedy"], roles["policy"]["greedy"]
    return max(
        policy["loops"] - base["loops"], base["ends"] - policy["ends"], base["japanese"] - policy["japanese"]
    )


def _describe_discrimination(facts: dict) -> str:
    if "accuracy" not in facts:
        return ""
    return (
        "評価用 {rows} 行の正解率は {accuracy:.1%}（95 % 区間 {accuracy_low:.1%}〜{accuracy_high:.1%}）。"
        "単純な規則で最も当たるのは「{best_rule}」の {best_rule_accuracy:.1%}、損失は {held_out_loss:.3f}"
        "（学習前は 0.693）です。"
    ).format(**facts)


def _describe_writing(metrics: dict) -> str:
    """Say per kind of unseen question how many answers are right, and how many are ill-mannered, before
    and after.
    """
    names = {"base": "ベース", "warm_up": "教師あり学習後", "policy": "DPO 後"}
    lines = []
    for kind, roles in metrics.get("writing", {}).items():
        right = " → ".join(f"{names[role]} {ways['greedy']['right']:.0%}" for role, ways in roles.items())
        manners = " → ".join(f"{ways['sampled']['manners']:.0%}" for ways in roles.values())
        count = roles["policy"]["greedy"]["questions"]
        lines.append(
            f"{UNSEEN_NAMES[kind]} {count} 問で、正しい回答は {right}、"
            f"あいまい・失礼などの回答（くじ引き）は {manners}。"
        )
    return "".join(lines)


def _describe_addition(facts: dict) -> list[str]:
    """Say what DPO added to the warm-up, with its interval; [] where there was none."""
    if "added" not in facts:
        return []
    text = (
        "教師あり学習のあとに DPO が加えた差：正しい回答 {right_change:+.0%}（95 % 区間 "
        "{right_low:+.0%}〜{right_high:+.0%}）、"
        "良い書き方 {manners_change:+.0%}（{manners_low:+.0%}〜{manners_high:+.0%}）。"
    )
    return [text.format(**facts)]


def _name_weak_kinds(metrics: dict) -> list[str]:
    """Name the rejection kinds of ten rows or more whose accuracy may be chance, in one sentence; nothing
    if all may be.
    """
    kinds = [line for line in metrics.get("by_rejection_kind", []) if line["rows"] >= 10]
    weak = [
        line
        for line in kinds
        if share_interval(round(line["accuracy"] * line["rows"]), line["rows"]).low < CHANCE
    ]
    names = [
        f"{KIND_NAMES.get(line['rejection_kind'], line['rejection_kind'])}（{line['accuracy']:.0%}）"
        for line in weak
    ]
    if not 0 < len(weak) < len(kinds):
        return []
    return [f"悪い回答の種類のうち、当てずっぽうと区別できないもの：{'、'.join(names)}。"]


def _explain_fall(metrics: dict) -> list[str]:
    held_out = metrics.get("held_out") or {}
    if not all(held_out.get(f"{side}_log_prob_change", 0) < 0 for side in ("chosen", "rejected")):
        return []
    return [
        "良い回答と悪い回答の対数確率が、どちらも DPO の前より下がっています。"
        "DPO が広げるのは二つの差なので、悪い回答のほうが大きく下がっていれば異常ではありません。"
    ]
