"""Picks rows to look at and describes rows as tables for the notebook; it changes none."""

import random
from collections import Counter

from dpo_helpers.data.generate import strip_question

KIND_NAMES = {
    "wrong_concept": "別の概念の説明",
    "off_topic": "関係のない話",
    "vague": "あいまい",
    "evasive": "答えない",
    "unfinished": "書きかけ",
    "repetitive": "繰り返し",
    "rude": "失礼",
}


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


def describe_split(train_rows: list[dict], held_out_rows: list[dict]) -> list[dict]:
    """Return how many rows, questions and rows of each rejection kind stand on either side of the split."""
    table = []
    for name, rows in (("学習用", train_rows), ("評価用", held_out_rows)):
        line = {"": name, "行数": len(rows), "違う質問": len({row["prompt"] for row in rows})}
        if all("concept" in row for row in rows):
            line["概念"] = len({row["concept"] for row in rows})
        kinds = Counter(row["rejection_kind"] for row in rows if "rejection_kind" in row)
        table.append(line | {KIND_NAMES.get(kind, kind): kinds[kind] for kind in sorted(kinds)})
    return table
