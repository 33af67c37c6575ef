"""Print the greedy answers of a saved run to held-out questions, unedited, as a Markdown table, with counts.

python tools/show_answers.py RUN_FOLDER [NUMBER_OF_QUESTIONS]
"""

import json
import sys
from pathlib import Path

from dpo_helpers.evaluation import check_answer
from dpo_helpers.notebook import answer_stages, pick_rows, quiet_libraries
from dpo_helpers.storage import load_run


def main(folder: Path, count: int) -> None:
    quiet_libraries()
    rows = [json.loads(line) for line in (folder / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]
    model, tokenizer, config = load_run(folder)
    asked = pick_rows(rows, count, config.seed)
    answers = answer_stages(model, tokenizer, asked)
    headings = list(answers[0])
    print("| " + " | ".join(headings) + " |\n|" + "---|" * len(headings))
    for answer in answers:
        print("| " + " | ".join(text.replace("\n", "⏎").replace("|", "\\|") for text in answer.values()) + " |")
    print()
    for heading in headings[1:-1]:
        checks = [check_answer(answer[heading], row["concept"]) for answer, row in zip(answers, asked, strict=True)]
        totals = {name: sum(check[name] for check in checks) for name in checks[0]}
        print(
            f"{heading}: 「。」で終わる {totals['ends']} / 名前が正しい {totals['names']} / 乱れなし {totals['clean']} （{len(asked)} 問中）"
        )


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) == 3 else 10)
