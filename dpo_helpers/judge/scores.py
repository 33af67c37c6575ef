"""Measures a policy against its reference on held-out rows: log-probs of both answers, loss, accuracy and
margin.
"""

import math

from dpo_helpers.data.generate import SIDES
from dpo_helpers.data.tokens import encode_answers
from dpo_helpers.machine import halve_on_out_of_memory
from dpo_helpers.model.answer import evaluating, use_role


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
        batch = tokenizer.pad(
            {"input_ids": [encoded[i][0] for i in picked]}, padding_side="right", return_tensors="pt"
        ).to(model.device)
        with torch.no_grad():
            logits = model(**batch).logits[
                :, :-1
            ]  # (batch, tokens - 1, vocabulary): each predicts the next token
        targets = batch["input_ids"][:, 1:]
        log_probs = -torch.nn.functional.cross_entropy(
            logits.transpose(1, 2).float(), targets, reduction="none"
        )
        for row, i in enumerate(picked):
            ids, prompt_length = encoded[i]
            scores[i] = log_probs[row, prompt_length - 1 : len(ids) - 1].double().sum().item()
    return scores


def score_rows(model, tokenizer, rows: list[dict], max_length: int, batch_size: int = 16) -> list[dict]:
    """Score both answers of every row under the policy and under its reference.

    The reference is the adapter `ref` where the model carries one (a run with a warm-up), else the base
    without adapter. Returns a dict a row: policy_chosen, policy_rejected, reference_chosen,
    reference_rejected, in nats.
    """
    both = (
        score_role(model, tokenizer, rows, max_length, who, batch_size) for who in ("policy", "reference")
    )
    return [policy | reference for policy, reference in zip(*both, strict=True)]


def score_role(
    model, tokenizer, rows: list[dict], max_length: int, role: str, batch_size: int = 16
) -> list[dict]:
    """Score both answers of every row in one role (see use_role): a dict a row, e.g. policy_chosen,
    policy_rejected.
    """
    with evaluating(model), use_role(model, role):
        pairs = {side: [(row["prompt"], row[side]) for row in rows] for side in SIDES}
        sides = [score_answers(model, tokenizer, pairs[side], max_length, batch_size) for side in SIDES]
    return [
        {f"{role}_{side}": score for side, score in zip(SIDES, pair, strict=True)}
        for pair in zip(*sides, strict=True)
    ]


def preference_loss(margin: float) -> float:
    """-log sigmoid(margin), the DPO loss of one pair (Rafailov et al. 2023, eq. 7); margin = beta *
    log-ratio difference.
    """
    return math.log1p(math.exp(-margin)) if margin > -30 else -margin


def summarize_scores(scores: list[dict], beta: float) -> dict:
    """Return rows, loss, accuracy and margin (the mean of beta * log-ratio difference) of scored rows.

    The loss is the sigmoid one whatever `loss_type` trained the policy, so that runs can be compared. A tie
    counts as wrong.
    """
    margins = [
        beta
        * ((s["policy_chosen"] - s["reference_chosen"]) - (s["policy_rejected"] - s["reference_rejected"]))
        for s in scores
    ]
    count = len(margins)
    return {
        "rows": count,
        "loss": sum(map(preference_loss, margins)) / count,
        "accuracy": sum(margin > 0 for margin in margins) / count,
        "margin": sum(margins) / count,
        "chosen_log_prob_change": sum(s["policy_chosen"] - s["reference_chosen"] for s in scores) / count,
        "rejected_log_prob_change": sum(s["policy_rejected"] - s["reference_rejected"] for s in scores)
        / count,
    }


def summarize_by(column: str, rows: list[dict], scores: list[dict], beta: float) -> list[dict]:
    """Summarize the rows of each value of one column apart: a list of {column, rows, loss, accuracy,
    margin}.
    """
    table = []
    for value in sorted({row[column] for row in rows}):
        part = summarize_scores(
            [score for score, row in zip(scores, rows, strict=True) if row[column] == value], beta
        )
        table.append({column: value, **{name: part[name] for name in ("rows", "loss", "accuracy", "margin")}})
    return table
