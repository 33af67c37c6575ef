"""Print the greedy answers of a saved run to held-out questions, unedited, as a Markdown table, with counts.

python tools/show_answers.py RUN_FOLDER [NUMBER_OF_QUESTIONS]
"""

import json
import re
import sys
from pathlib import Path

from dpo_helpers.judge.answers import check_answer
from dpo_helpers.keep.result import load_run
from dpo_helpers.data.look import pick_rows, quiet_libraries, tabulate_stages


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def make_table(rows: list[dict]) -> str:
    """Return rows as a Markdown table that shows every character as it is: marks are escaped, a line break
    becomes ⏎.
    """
    cells = [
        [re.sub(r"([\\`*_<|~$\[])", r"\\\1", str(value)).replace("\n", "⏎") for value in row.values()]
        for row in rows
    ]
    return "\n".join(
        "| " + " | ".join(line) + " |" for line in [list(rows[0]), ["---"] * len(rows[0]), *cells]
    )


def count_checks(answers: list[dict], asked: list[dict]) -> list[dict]:
    """Return how many answers of each stage pass each of check_answer's checks, as rows of a Japanese
    table.
    """
    table = []
    for stage in list(answers[0])[1:-1]:  # the first column is the question, the last one the chosen answer
        checks = [
            check_answer(answer[stage], row["concept"]) for answer, row in zip(answers, asked, strict=True)
        ]
        ends, names, clean = (
            f"{sum(check[name] for check in checks)} / {len(checks)}" for name in ("ends", "names", "clean")
        )
        table.append(
            {"段階": stage, "「。」で終わる": ends, "概念の名前を正しく書く": names, "乱れがない": clean}
        )
    return table


def main(folder: Path, count: int) -> None:
    quiet_libraries()
    model, tokenizer, config = load_run(folder)
    asked = pick_rows(read_rows(folder / "held_out.jsonl"), count, config.seed)
    answers = tabulate_stages(model, tokenizer, asked)
    print(make_table(answers), make_table(count_checks(answers, asked)), sep="\n\n")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) == 3 else 10)
