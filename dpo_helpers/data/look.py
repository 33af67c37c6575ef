"""Picks rows to look at and describes rows as tables for the notebook; it changes none."""

import random
from collections import Counter

from dpo_helpers.data.prompt import strip_question

KIND_NAMES = {
    "wrong_fact": "事実と違う",
    "off_form": "質問とずれている",
    "vague": "あいまい",
    "evasive": "答えない",
    "unfinished": "書きかけ",
    "repetitive": "繰り返し",
    "rude": "失礼",
}
UNSEEN_NAMES = {"new_concept": "新しい概念", "new_wording": "新しい聞き方", "held_out": "評価用の質問"}


def pick_rows(rows: list[dict], count: int, seed: int) -> list[dict]:
    """Pick rows of different concepts to look at or to ask, the same ones for the same seed."""
    draw = random.Random(seed)
    order = sorted(range(len(rows)), key=lambda _: draw.random())
    picked = {}
    for i in order:
        picked.setdefault(rows[i].get("concept") or rows[i]["prompt"], rows[i])
    return list(picked.values())[:count]


def describe_rows(rows: list[dict]) -> list[dict]:
    """Return preference rows under Japanese headings."""
    return [
        {
            "質問": strip_question(row["prompt"]),
            "良い回答（chosen）": row["chosen"],
            "悪い回答（rejected）": row["rejected"],
            "悪い回答の種類": KIND_NAMES.get(row.get("rejection_kind"), ""),
        }
        for row in rows
    ]


def group_by_unseen(rows: list[dict]) -> dict[str, list[dict]]:
    """Return held-out rows by the kind of unseen question; a user's own rows are of one kind, "held_out"."""
    groups = {}
    for row in rows:
        groups.setdefault(row.get("unseen") or "held_out", []).append(row)
    return dict(sorted(groups.items()))


def describe_split(train_rows: list[dict], held_out_rows: list[dict]) -> list[dict]:
    """Return how many rows, questions and rows of each rejection kind stand on either side of the split."""
    parts = {f"評価用（{UNSEEN_NAMES[name]}）": rows for name, rows in group_by_unseen(held_out_rows).items()}
    table = []
    for name, rows in {"学習用": train_rows, **parts}.items():
        line = {"": name, "行数": len(rows), "違う質問": len({row["prompt"] for row in rows})}
        if all("concept" in row for row in rows):
            line["概念"] = len({row["concept"] for row in rows})
        kinds = Counter(row["rejection_kind"] for row in rows if "rejection_kind" in row)
        table.append(line | {text: kinds[kind] for kind, text in KIND_NAMES.items() if kinds})
    return table
