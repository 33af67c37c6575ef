"""Keeps blind votes between two roles of a model in a file that is training data for the next round, and
counts them.
"""

import json
import math
import os
import random
from datetime import datetime
from pathlib import Path

from dpo_helpers.data.prompt import make_prompt
from dpo_helpers.data.row_checks import BadRow, normalize_record
from dpo_helpers.errors import UserError
from dpo_helpers.judge.answers import share_interval


def order_roles(question: str, roles: list[str], seed: int) -> list[str]:
    """Return who is A and who is B for one question: as good as random to the voter, and the same whenever
    the cell is run.
    """
    return random.Random(f"{seed}/{make_prompt(question)}").sample(roles, len(roles))


def path_without_row(path) -> Path:
    """Return the file beside `path` for votes that are no training row: ties, and what load_preferences
    would refuse.
    """
    path = Path(path)
    return path.with_name(f"{path.stem}_without_row.jsonl")


def read_votes(path) -> list[dict]:
    """Return all votes, each with its two `answers`; those that are no training row stand at the end and
    have no `chosen`.
    """
    votes = []
    for file in (Path(path), path_without_row(path)):
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        for number, line in enumerate(
            text.split("\n"), 1
        ):  # splitlines would also cut at U+2028, which an answer may hold
            try:
                if line.strip():
                    vote = json.loads(line)
                    answers = vote["answers"] if "answers" in vote else [vote["chosen"], vote["rejected"]]
                    votes.append({**vote, "prompt": vote["prompt"], "answers": answers})
            except (ValueError, KeyError, TypeError):
                advice = "その行を消すか、投票を保存するファイルに別の名前を付けてください。"
                raise UserError(f"{file} の {number} 行目は投票として読めません。{advice}") from None
    return votes


def record_vote(path, question: str, answers: dict[str, str], winner: str | None) -> str:
    """Append the vote on `answers` ({role: text}, two of them; None is a tie) as one line; return why it is
    no training row, or "".

    A row goes to `path` (prompt, chosen, rejected, winner, loser, time), everything else to
    `path_without_row`.
    """
    ordered = sorted(answers, key=lambda role: role != winner)  # the winner first
    texts, now = (
        [answers[role] for role in ordered],
        datetime.now().astimezone().isoformat(timespec="seconds"),
    )
    who = {"winner": winner or "tie", "loser": ordered[1] if winner else "tie", "time": now}
    row = {"prompt": make_prompt(question), "chosen": texts[0], "rejected": texts[1]}
    obstacle = find_obstacle(row, read_votes(path)) if winner else "tie"
    if obstacle:
        append_line(
            path_without_row(path),
            {"prompt": row["prompt"], "answers": texts, "roles": ordered, **who, "reason": obstacle},
        )
    else:
        append_line(path, {**row, **who})
    return obstacle


def find_obstacle(row: dict, votes: list[dict]) -> str:
    """Return the reason (a key of row_checks.REASONS) for which load_preferences would refuse `row` after
    `votes`, or "".
    """
    try:
        row = normalize_record(row, ())
    except BadRow as bad:
        return bad.args[0]
    earlier = [vote for vote in votes if "chosen" in vote and vote["prompt"] == row["prompt"]]
    if any((vote["chosen"], vote["rejected"]) == (row["chosen"], row["rejected"]) for vote in earlier):
        return "duplicate"
    swapped = any(vote["chosen"] == row["rejected"] or vote["rejected"] == row["chosen"] for vote in earlier)
    return "swapped" if swapped else ""


def append_line(path, value: dict) -> None:
    """Add one JSON line and wait until it is on the disk; what stands in the file is never touched."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        file.seek(max(0, file.tell() - 1))
        glue = (
            b"" if file.read() in (b"", b"\n") else b"\n"
        )  # a file edited by hand may end without a line end
        file.write(glue + json.dumps(value, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def win_rate(wins: int, losses: int) -> tuple[float, float, float]:
    """Return (rate, low, high): the share of wins among the votes that name a winner, and its 95 % Wilson
    interval.
    """
    count = wins + losses
    return (wins / count, *share_interval(wins, count)) if count else (math.nan, 0.0, 1.0)


def describe_votes(votes: list[dict]) -> str:
    """Say how often the policy won, how sure that is, and how many rows there are for the next training."""
    wins, losses = (sum(vote.get(role) == "policy" for vote in votes) for role in ("winner", "loser"))
    ties, rows = sum(vote.get("winner") == "tie" for vote in votes), sum("chosen" in vote for vote in votes)
    if not wins + losses:
        return f"勝敗の付いた投票はまだありません（引き分け {ties}、学習に使える行 {rows}）。"
    rate, low, high = win_rate(wins, losses)
    interval = f"95 % 信頼区間 {low:.0%}〜{high:.0%}"
    return (
        f"DPO の後の勝率 {rate:.0%}（{wins} 勝 {losses} 敗、{interval}）、"
        f"引き分け {ties}、学習に使える行 {rows}"
    )
