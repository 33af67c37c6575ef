"""Measures log-probs of answers in a model's roles, and what they say of preference: loss, accuracy,
margin.
"""

import math

from dpo_helpers.data.prompt import SIDES
from dpo_helpers.data.tokens import encode_answers
from dpo_helpers.errors import UserError
from dpo_helpers.judge.answers import share_interval
from dpo_helpers.machine import halve_on_out_of_memory
from dpo_helpers.model.answer import evaluating, use_role

LEAK = (
    0.05  # nats an answer: rounding between two passes stays far below, an adapter that is left on far above
)


def score_answers(
    model, tokenizer, pairs: list[tuple[str, str]], max_length: int, batch_size: int = 16
) -> list[float]:
    """Return log p(answer | prompt) in nats, summed over the answer's tokens and EOS, for each (prompt,
    answer).
    """
    encoded = [(ids[:max_length], len(start)) for start, ids in encode_answers(tokenizer, pairs)]
    return halve_on_out_of_memory(
        lambda size: score_encoded(model, tokenizer, encoded, size), batch_size, "評価"
    )


def score_encoded(model, tokenizer, encoded: list[tuple[list[int], int]], batch_size: int) -> list[float]:
    """Return log p(answer | prompt) for each (token ids of both, number of prompt tokens)."""
    import torch

    order = sorted(
        range(len(encoded)), key=lambda i: len(encoded[i][0])
    )  # like lengths together: less padding
    scores = [0.0] * len(encoded)
    for start in range(0, len(order), batch_size):
        picked = order[start : start + batch_size]
        ids = {"input_ids": [encoded[i][0] for i in picked]}
        batch = tokenizer.pad(ids, padding_side="right", return_tensors="pt").to(model.device)
        with torch.no_grad():
            # (batch, tokens - 1, vocabulary): each predicts the next token
            logits = model(**batch).logits[:, :-1]
        targets = batch["input_ids"][:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2).float(), targets, reduction="none")
        for row, i in enumerate(picked):
            ids, prompt_length = encoded[i]
            scores[i] = -loss[row, prompt_length - 1 : len(ids) - 1].double().sum().item()
    return scores


def score_rows(model, tokenizer, rows: list[dict], max_length: int, batch_size: int = 16) -> list[dict]:
    """Score both answers of every row under the policy and under its reference, in nats.

    The reference is the adapter `ref` where the model carries one (a run with a warm-up), else the base
    without adapter. Returns a dict a row: policy_chosen, policy_rejected, reference_chosen,
    reference_rejected.
    """
    both = (
        score_role(model, tokenizer, rows, max_length, role, batch_size) for role in ("policy", "reference")
    )
    return [policy | reference for policy, reference in zip(*both, strict=True)]


def score_role(
    model, tokenizer, rows: list[dict], max_length: int, role: str, batch_size: int = 16
) -> list[dict]:
    """Score both answers of every row in one role (see use_role): a dict a row, policy_chosen,
    policy_rejected.
    """
    with evaluating(model), use_role(model, role):
        pairs = {side: [(row["prompt"], row[side]) for row in rows] for side in SIDES}
        sides = [score_answers(model, tokenizer, pairs[side], max_length, batch_size) for side in SIDES]
    columns = [f"{role}_{side}" for side in SIDES]
    return [dict(zip(columns, scores, strict=True)) for scores in zip(*sides, strict=True)]


def measure_before(model, tokenizer, rows: list[dict], max_length: int) -> dict[str, list[float]]:
    """Return what base and reference make of a few rows before the training, to be compared with later."""
    scores = {}
    for role in ("base", "reference"):
        with evaluating(model), use_role(model, role):
            pairs = [(row["prompt"], row["chosen"]) for row in rows]
            scores[role] = score_answers(model, tokenizer, pairs, max_length)
    return scores


def check_before(model, tokenizer, rows: list[dict], before: dict, max_length: int) -> None:
    """Raise UserError where base or reference are no longer what `measure_before` found: an adapter leaks
    into them.
    """
    now = measure_before(model, tokenizer, rows, max_length)
    for role, name in (("base", "ベースモデル"), ("reference", "DPO 前のモデル")):
        worst = max(abs(a - b) for a, b in zip(now[role], before[role], strict=True))
        if not worst <= LEAK:
            raise UserError(
                f"{name}の対数確率が、学習を始めたときから {worst:.2f} nat ずれています。"
                "学習した重みが混ざっているので、前後の比較を止めました。"
                "「ランタイム → セッションを再起動する」のあと、"
                "最初のセルから実行してください（続きから再開します）。"
            )


def preference_loss(margin: float) -> float:
    """-log sigmoid(margin), the DPO loss of one pair (Rafailov et al. 2023, eq. 7); margin = beta *
    log-ratio difference.
    """
    return math.log1p(math.exp(-margin)) if margin > -30 else -margin


def compute_margin(scores: dict, beta: float) -> float:
    """Return beta * (log-ratio of chosen − log-ratio of rejected) of one scored row."""
    chosen = scores["policy_chosen"] - scores["reference_chosen"]
    return beta * (chosen - (scores["policy_rejected"] - scores["reference_rejected"]))


def summarize_scores(scores: list[dict], beta: float) -> dict:
    """Return rows, loss, accuracy with its 95 % interval, margin, and the mean change of each side's
    log-prob.

    The loss is the sigmoid preference term whatever else trained the policy, so that runs can be compared. A
    tie counts as wrong.
    """
    margins, count = [compute_margin(each, beta) for each in scores], len(scores)
    right = sum(margin > 0 for margin in margins)
    change = {
        side: sum(s[f"policy_{side}"] - s[f"reference_{side}"] for s in scores) / count for side in SIDES
    }
    return {
        "rows": count,
        "loss": sum(map(preference_loss, margins)) / count,
        "accuracy": right / count,
        "accuracy_interval": list(share_interval(right, count)),
        "margin": sum(margins) / count,
        "chosen_log_prob_change": change["chosen"],
        "rejected_log_prob_change": change["rejected"],
    }


def summarize_by(column: str, rows: list[dict], scores: list[dict], beta: float) -> list[dict]:
    """Summarize the rows of each value of one column apart: a list of {column, rows, loss, accuracy,
    margin}.
    """
    table = []
    for value in sorted({row[column] for row in rows}):
        part = [score for score, row in zip(scores, rows, strict=True) if row[column] == value]
        figures = summarize_scores(part, beta)
        table.append(
            {column: value, **{name: figures[name] for name in ("rows", "loss", "accuracy", "margin")}}
        )
    return table


def measure_reference_distance(model, tokenizer, pairs: list[tuple[str, str]], max_length: int) -> float:
    """Return the mean of log p_policy − log p_reference per token (nats) of the policy's own (prompt, answer)
    pairs.

    For sampled answers that is a Monte Carlo estimate of the KL divergence; for greedy ones a proxy, to be
    compared with itself alone. EOS counts as a token.
    """
    scores = {}
    for role in ("policy", "reference"):
        with evaluating(model), use_role(model, role):
            scores[role] = score_answers(model, tokenizer, pairs, max_length)
    # a prompt that fills max_length leaves no token of the answer, and a difference of 0
    tokens = [max(1, len(ids[:max_length]) - len(start)) for start, ids in encode_answers(tokenizer, pairs)]
    differences = zip(scores["policy"], scores["reference"], tokens, strict=True)
    return sum((policy - reference) / count for policy, reference, count in differences) / len(pairs)
