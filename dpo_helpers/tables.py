"""What the cells of the notebooks need of IPython: injected values, quiet libraries, tables; nothing here
trains or measures.
"""

import ast
import random
from collections import Counter

from dpo_helpers.data.generate import strip_question


def injected(name: str, default):
    """Return the value that papermill injected for a switch, else `default`, the one in the cell's form.

    papermill puts its cell behind the one tagged `parameters`; a switch in a later cell would overwrite what
    it set.
    """
    from IPython import get_ipython

    shell = get_ipython()
    cells = [] if shell is None else shell.user_ns.get("In", [])
    source = next((cell for cell in reversed(cells) if cell.startswith("# Parameters\n")), "")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
    return default


def quiet_libraries() -> None:
    """Leave only messages that a reader can act on: no progress bars of data preparation, no deprecation
    notes of libraries.
    """
    import logging
    import warnings

    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft)\b")
    # torchao tells of kernels that this torch cannot load, and torch of how torchao registers its types.
    for name in ("trl", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def show_table(rows: list[dict]):
    """Return rows as a table that a notebook shows in full, with wrapped text and no row numbers.

    `dtype=object` keeps a count a whole number in a column that also holds fractions.
    """
    import pandas

    style = pandas.DataFrame(rows, dtype=object).style.hide(axis="index").format(precision=4)
    left = {"text-align": "left", "vertical-align": "top", "white-space": "pre-wrap"}
    return style.set_properties(**left).set_table_styles(
        [{"selector": "th", "props": [("text-align", "left")]}]
    )


def pick_rows(rows: list[dict], count: int, seed: int) -> list[dict]:
    """Pick rows of different concepts to look at or to ask, the same ones for the same seed."""
    draw = random.Random(seed)
    order = sorted(range(len(rows)), key=lambda _: draw.random())
    picked = {}
    for i in order:
        picked.setdefault(rows[i].get("concept") or rows[i]["prompt"], rows[i])
    return list(picked.values())[:count]


KIND_NAMES = {
    "vague": "あいまい",
    "evasive": "答えない",
    "wrong_concept": "別の概念の説明",
    "off_topic": "関係のない話",
    "unfinished": "書きかけ",
    "repetitive": "繰り返し",
    "rude": "失礼",
}


def show_kinds(rows: list[dict], scores: list[dict], beta: float):
    """Show the scores of each rejection kind apart, with Japanese names; rows of one's own may have none."""
    from dpo_helpers.judge.scores import summarize_by

    if any("rejection_kind" not in row for row in rows):
        print("このデータには悪さの種類（rejection_kind の列）がないので、種類ごとの表はありません。")
        return None
    headings = {"rows": "行数", "loss": "損失", "accuracy": "正解率", "margin": "マージン"}
    return show_table(
        [
            {"悪さの種類": KIND_NAMES.get(line["rejection_kind"], line["rejection_kind"])}
            | {heading: line[name] for name, heading in headings.items()}
            for line in summarize_by("rejection_kind", rows, scores, beta)
        ]
    )


def show_split(train_rows: list[dict], held_out_rows: list[dict]):
    """Show how many rows, questions and rows of each rejection kind stand on either side of the split."""
    table = []
    for name, rows in (("学習用", train_rows), ("評価用", held_out_rows)):
        line = {"": name, "行数": len(rows), "違う質問": len({row["prompt"] for row in rows})}
        if all("concept" in row for row in rows):
            line["概念"] = len({row["concept"] for row in rows})
        kinds = Counter(row["rejection_kind"] for row in rows if "rejection_kind" in row)
        table.append(line | {KIND_NAMES.get(kind, kind): kinds[kind] for kind in sorted(kinds)})
    return show_table(table)


def show_rows(rows: list[dict]):
    """Show preference rows with Japanese headings."""
    return show_table(
        [
            {
                "質問": strip_question(row["prompt"]),
                "良い回答（chosen）": row["chosen"],
                "悪い回答（rejected）": row["rejected"],
                "悪さの種類": KIND_NAMES.get(row.get("rejection_kind"), ""),
            }
            for row in rows
        ]
    )


def tabulate_stages(model, tokenizer, rows: list[dict], stages=("base", "reference", "policy")) -> list[dict]:
    """Answer the rows' questions as the model did at each stage of its training; return rows of a table
    with the chosen answers.
    """
    from dpo_helpers.model.answer import ANSWER_STAGES, answer_stages

    questions = [strip_question(row["prompt"]) for row in rows]
    answers = answer_stages(model, tokenizer, questions, stages)
    return [
        {
            "質問": question,
            **{ANSWER_STAGES[stage]: text for stage, text in texts.items()},
            "お手本（chosen）": row["chosen"],
        }
        for question, texts, row in zip(questions, answers, rows, strict=True)
    ]


def show_answers(answers: list[dict], count: int = 10):
    """Show the first of judge.evaluate_run's table of held-out questions: before, after, the chosen
    answer, the pair's margin.
    """
    headings = {
        "before": "学習前（ベースモデル）",
        "after": "学習後",
        "chosen": "お手本（chosen）",
        "margin": "マージン",
    }
    return show_table(
        [
            {"質問": strip_question(line["prompt"])}
            | {heading: line[name] for name, heading in headings.items()}
            for line in answers[:count]
        ]
    )
