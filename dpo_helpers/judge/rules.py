"""Simple ways to pick the chosen answer without DPO, and how often each is right on held-out rows.

A policy is held against the best rule of text alone. What the characters or the base's log-probs tell is
shown beside it: the latter is no trick of the rows but what the base knew before.
"""

import math
from collections import Counter

from dpo_helpers.data.prompt import SIDES, strip_question
from dpo_helpers.data.tokens import encode_answers
from dpo_helpers.judge.answers import has_loop
from dpo_helpers.judge.scores import score_role

RULE_NAMES = {
    "longer": "長いほうを選ぶ",
    "shorter": "短いほうを選ぶ",
    "usual_length": "いつもの長さに近いほうを選ぶ",
    "names": "質問の言葉を含むほうを選ぶ",
    "ends": "「。」で終わるほうを選ぶ",
    "names_and_ends": "質問の言葉を含み「。」で終わるほうを選ぶ",
    "no_loop": "繰り返しのないほうを選ぶ",
}
BESIDE_NAMES = {
    "characters": "文字の種類と数だけを見る分類器（学習用の行で作成）",
    "base_log_prob_sum": "ベースモデルの対数確率（合計）",
    "base_log_prob_mean": "ベースモデルの対数確率（1 トークンあたり）",
}


def share_right(differences: list[float]) -> float:
    """Return how often a score prefers the chosen answer (chosen minus rejected); a tie counts as half."""
    return sum((difference > 0) + 0.5 * (difference == 0) for difference in differences) / len(differences)


def compare_by_rule(name: str, row: dict, usual_length: float) -> float:
    """Return by how much a rule of text prefers the row's chosen answer to its rejected one."""
    score = {
        "longer": len,
        "shorter": lambda text: -len(text),
        "usual_length": lambda text: -abs(len(text) - usual_length),
        "names": lambda text: _names(text, row),
        "ends": lambda text: text.endswith("。"),
        "names_and_ends": lambda text: bool(_names(text, row)) and text.endswith("。"),
        "no_loop": lambda text: not has_loop(text),
    }[name]
    return score(row["chosen"]) - score(row["rejected"])


def _names(text: str, row: dict) -> int:
    """Say whether an answer names the concept; of rows without one, return how much of the question it
    repeats.
    """
    if row.get("concept"):
        return row["concept"] in text
    question, longest = strip_question(row["prompt"]), 0
    for start in range(len(text)):
        while text[start : start + longest + 1] in question and start + longest < len(text):
            longest += 1
    return longest


def measure_rules(train_rows: list[dict], held_out_rows: list[dict]) -> dict[str, float]:
    """Return the accuracy of each rule of text, in [0, 1]; the usual length is that of the trained chosen
    answers.
    """
    usual_length = sum(len(row["chosen"]) for row in train_rows) / len(train_rows)
    return {
        name: share_right([compare_by_rule(name, row, usual_length) for row in held_out_rows])
        for name in RULE_NAMES
    }


def find_best_rule(accuracies: dict[str, float]) -> tuple[str, float]:
    return max(accuracies.items(), key=lambda item: item[1])


def measure_beside(model, tokenizer, train_rows, held_out_rows, max_length: int) -> dict[str, float]:
    """Return the accuracy of what is no rule of text: a classifier of characters, and the base's
    log-probs.
    """
    weights = _weigh_characters(train_rows)
    characters = [
        sum(weights[letter] for letter in row["chosen"]) - sum(weights[letter] for letter in row["rejected"])
        for row in held_out_rows
    ]
    base = score_role(model, tokenizer, held_out_rows, max_length, "base")
    tokens = {}
    for side in SIDES:
        encoded = encode_answers(tokenizer, [(row["prompt"], row[side]) for row in held_out_rows])
        tokens[side] = [max(1, len(ids[:max_length]) - len(start)) for start, ids in encoded]
    means = [
        s["base_chosen"] / c - s["base_rejected"] / r
        for s, c, r in zip(base, tokens["chosen"], tokens["rejected"], strict=True)
    ]
    return {
        "characters": share_right(characters),
        "base_log_prob_sum": share_right([score["base_chosen"] - score["base_rejected"] for score in base]),
        "base_log_prob_mean": share_right(means),
    }


def _weigh_characters(rows: list[dict]) -> Counter:
    """Return the log-odds of each character to stand in a chosen answer (naive Bayes, add-one smoothing)."""
    counts = {side: Counter(letter for row in rows for letter in row[side]) for side in SIDES}
    letters = set(counts["chosen"]) | set(counts["rejected"])
    totals = {side: sum(counts[side].values()) + len(letters) for side in SIDES}
    share = {
        side: {letter: (counts[side][letter] + 1) / totals[side] for letter in letters} for side in SIDES
    }
    return Counter(
        {letter: math.log(share["chosen"][letter] / share["rejected"][letter]) for letter in letters}
    )


def describe_rules(metrics: dict) -> list[dict]:
    """Return the policy's accuracy and those of the rules as rows of a Japanese table."""
    table = [{"見分け方": "学習したモデル（DPO の後）", "正解率": f"{metrics['held_out']['accuracy']:.1%}"}]
    for title, names, figures in (
        ("単純な規則：", RULE_NAMES, metrics["rules"]),
        ("参考：", BESIDE_NAMES, metrics["beside"]),
    ):
        table += [
            {"見分け方": title + names[name], "正解率": f"{value:.1%}"} for name, value in figures.items()
        ]
    return table
