"""Measures what the verdict reads, on the model at hand or on a saved run, and does `python -m dpo_helpers
judge`.
"""

from dpo_helpers.data.generate import strip_question
from dpo_helpers.data.look import KIND_NAMES, pick_rows
from dpo_helpers.judge.answers import accuracy_interval, compare_generation, measure_reference_distance
from dpo_helpers.judge.baselines import measure_baselines
from dpo_helpers.judge.scores import summarize_by, summarize_scores

MEASURED = (
    "held_out",
    "baselines",
    "generation",
    "reference_distance",
)  # what evaluate_run says of every run


def evaluate_run(model, tokenizer, rows: list[dict], scores: list[dict], config) -> tuple[dict, list[dict]]:
    """Return (what metrics.json says of the held-out rows, the table of generated answers); `scores` are
    score_rows' of all rows.

    The first holds held_out, baselines, generation, reference_distance (nats a token) and, for columns that
    every row has, by_rejection_kind and by_field. The table is answer_quality.compare_generation's, with the
    DPO margin of each row's pair.
    """
    held_out = summarize_scores(scores, config.beta)
    interval = accuracy_interval(round(held_out["accuracy"] * held_out["rows"]), held_out["rows"])
    generation, answers = compare_generation(model, tokenizer, rows, config)
    pairs = [(line["prompt"], line["after"]) for line in answers]
    margins = {
        id(row): summarize_scores([score], config.beta)["margin"]
        for row, score in zip(rows, scores, strict=True)
    }
    asked = pick_rows(rows, len(answers), config.seed)
    answers = [line | {"margin": margins[id(row)]} for line, row in zip(answers, asked, strict=True)]
    measured = {
        "held_out": held_out | {"accuracy_interval": list(interval)},
        "baselines": measure_baselines(model, tokenizer, rows, scores, config),
        "generation": generation,
        "reference_distance": measure_reference_distance(model, tokenizer, pairs, config.max_length),
    }
    for column in ("rejection_kind", "field"):
        if all(row.get(column) for row in rows):
            measured[f"by_{column}"] = summarize_by(column, rows, scores, config.beta)
    return measured, answers


def describe_kinds(metrics: dict) -> list[dict]:
    """Return the figures of each kind of rejected answer as table rows; one's own rows may have no kinds."""
    headings = {"rows": "行数", "loss": "損失", "accuracy": "正解率", "margin": "マージン"}
    lines = metrics.get("by_rejection_kind", [])
    if not lines:
        print("このデータには悪い回答の種類（rejection_kind の列）がないので、種類ごとの表はありません。")
    return [
        {"悪い回答の種類": KIND_NAMES.get(line["rejection_kind"], line["rejection_kind"])}
        | {heading: line[name] for name, heading in headings.items()}
        for line in lines
    ]


def describe_answers(answers: list[dict], count: int = 10) -> list[dict]:
    """Return the first of evaluate_run's table of answers under Japanese headings."""
    headings = {"before": "ベースモデル", "after": "DPO の後", "chosen": "良い回答", "margin": "マージン"}
    return [
        {"質問": strip_question(line["prompt"])} | {heading: line[name] for name, heading in headings.items()}
        for line in answers[:count]
    ]
