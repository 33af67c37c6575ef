"""Measures null baselines on held-out rows: rules that know nothing of DPO, and how often each picks the
chosen answer.
"""

import random

from dpo_helpers.data.generate import SIDES
from dpo_helpers.data.tokens import encode_answers
from dpo_helpers.judge.scores import score_answers, summarize_scores
from dpo_helpers.model.answer import evaluating, use_role


def share_right(differences: list[float]) -> float:
    """Return how often a score prefers the chosen answer, from its differences (chosen minus rejected); a
    tie counts as half.
    """
    return sum((difference > 0) + 0.5 * (difference == 0) for difference in differences) / len(differences)


def compare_lengths(rows: list[dict]) -> list[int]:
    """Return by how many characters the chosen answer is longer than the rejected one, row by row."""
    return [len(row["chosen"]) - len(row["rejected"]) for row in rows]


def compare_base_log_probs(model, tokenizer, rows: list[dict], max_length: int) -> dict[str, list[float]]:
    """Return how much likelier (nats) the untouched base model finds the chosen answer: in all, and per
    token of each answer.
    """
    sums, means = {}, {}
    with evaluating(model), use_role(model, "base"):
        for side in SIDES:
            pairs = [(row["prompt"], row[side]) for row in rows]
            sums[side] = score_answers(model, tokenizer, pairs, max_length)
            encoded = [(ids[:max_length], len(start)) for start, ids in encode_answers(tokenizer, pairs)]
            # a prompt that fills max_length leaves no token of the answer, and a sum of 0
            tokens = [max(1, len(ids) - prompt_length) for ids, prompt_length in encoded]
            means[side] = [total / count for total, count in zip(sums[side], tokens, strict=True)]
    columns = {"base_log_prob_sum": sums, "base_log_prob_mean": means}
    return {
        name: [c - r for c, r in zip(*(values[side] for side in SIDES), strict=True)]
        for name, values in columns.items()
    }


def shuffle_labels(scores: list[dict], beta: float, seed: int) -> list[float]:
    """Return the policy's DPO margins with chosen and rejected exchanged in rows picked at random, each
    with probability 1/2.
    """
    draw = random.Random(f"{seed}/labels")
    return [
        summarize_scores([score], beta)["margin"] * (1 if draw.random() < 0.5 else -1) for score in scores
    ]


def compare_answers(model, tokenizer, rows: list[dict], scores: list[dict], config) -> dict[str, list[float]]:
    """Return every baseline's differences (chosen minus rejected), row by row; `scores` come from
    evaluation.score_rows.
    """
    longer = compare_lengths(rows)
    return {
        "longer": longer,
        "shorter": [-difference for difference in longer],
        **compare_base_log_probs(model, tokenizer, rows, config.max_length),
        "shuffled_labels": shuffle_labels(scores, config.beta, config.seed),
    }


def measure_baselines(model, tokenizer, rows: list[dict], scores: list[dict], config) -> dict[str, float]:
    """Return the accuracy of each baseline, in [0, 1]; a tie counts as half."""
    return {
        name: share_right(values)
        for name, values in compare_answers(model, tokenizer, rows, scores, config).items()
    }


BASELINE_NAMES = {
    "longer": "長いほうを選ぶ",
    "shorter": "短いほうを選ぶ",
    "base_log_prob_sum": "学習前のモデルの対数確率（合計）",
    "base_log_prob_mean": "学習前のモデルの対数確率（1 トークンあたり）",
    "shuffled_labels": "正解をでたらめに入れ替えた採点",
}


def describe_baselines(baselines: dict[str, float], accuracy: float) -> list[dict]:
    """Return the policy's own accuracy and those of the baselines as rows of a Japanese table."""
    notes = {
        "longer": "50 % から離れるほど、長さだけで当てられるデータ",
        "shorter": "「長いほうを選ぶ」と足すと 100 %",
        "base_log_prob_sum": "短い回答ほど選ばれやすい",
        "base_log_prob_mean": "長さの影響を小さくしたもの",
        "shuffled_labels": "50 % 前後になるはず。大きく外れたら採点を疑う（行が少ないほど揺れる）",
    }
    first = {
        "見分け方": "学習したモデル（DPO の後）",
        "正解率": f"{accuracy:.1%}",
        "見方": "下のどの行よりも高ければ、学習の効果がある",
    }
    return [first] + [
        {"見分け方": BASELINE_NAMES[name], "正解率": f"{baselines[name]:.1%}", "見方": note}
        for name, note in notes.items()
    ]
