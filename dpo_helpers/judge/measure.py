"""Measures what the verdict reads, on the model at hand or on a saved run, and does `python -m dpo_helpers
judge`.
"""

import json
import sys
from pathlib import Path

from dpo_helpers.config import UserError
from dpo_helpers.judge.answers import accuracy_interval, compare_generation, measure_reference_distance
from dpo_helpers.judge.baselines import measure_baselines
from dpo_helpers.judge.scores import score_rows, summarize_by, summarize_scores
from dpo_helpers.judge.verdict import describe_verdict, judge
from dpo_helpers.tables import pick_rows

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


def read_folder(folder) -> tuple[dict, list[dict]]:
    """Return (metrics, log history) of a saved run, or of a folder that plain TRL wrote: its log alone.

    What the metrics lack is measured on the saved model where that and the held-out rows are there, which
    takes as long as evaluating the run did. Without its base model that is announced and left out.
    """
    folder = Path(folder)
    metrics, log_history = (
        _read_json(folder / "metrics.json", {}),
        _read_json(folder / "log_history.json", []),
    )
    if not log_history:
        log_history = _read_newest_state(folder).get("log_history", [])
    if not metrics and not log_history:
        raise UserError(
            f"{folder} に学習の記録がありません（metrics.json、log_history.json、"
            "trainer_state.json のどれもない）。"
            "結果のフォルダーか、チェックポイントのあるフォルダーを指定してください。"
        )
    whole = all(
        (folder / name).is_file()
        for name in ("held_out.jsonl", "run_config.json", "adapter_model.safetensors")
    )
    if whole and "stopped" not in metrics and not all(metrics.get(name) for name in MEASURED):
        try:
            metrics = metrics | measure_saved_run(folder)
        except (
            OSError
        ) as error:  # transformers', where the base model is neither here nor on a Hub within reach
            reason = str(error).splitlines()[0]
            print(
                f"⚠️ ベースモデルを読み込めないので、回答を測らず、記録だけで判定します（{reason}）。",
                file=sys.stderr,
            )
    return metrics, log_history


def _read_newest_state(folder: Path) -> dict:
    """Return the trainer_state.json of the newest step, in the folder itself or in one of its checkpoints;
    {} for none.
    """
    patterns = (
        "trainer_state.json",
        "checkpoint-*/trainer_state.json",
        "checkpoints/dpo-*/trainer_state.json",
    )
    states = [_read_json(path, {}) for pattern in patterns for path in folder.glob(pattern)]
    return max(states, key=lambda state: state.get("global_step", 0), default={})


def _read_json(path: Path, missing):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return missing
    except (ValueError, OSError) as error:
        raise UserError(f"{path} を読めません（{error}）。壊れていないか確かめてください。") from None


def measure_saved_run(folder: Path) -> dict:
    """Load a saved run and return what evaluate_run measures on its held-out rows."""
    from dpo_helpers.keep.storage import load_run

    model, tokenizer, config = load_run(folder)
    rows = [json.loads(line) for line in (folder / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]
    return evaluate_run(
        model, tokenizer, rows, score_rows(model, tokenizer, rows, config.max_length), config
    )[0]


def judge_folder(folder) -> dict:
    """Return the verdict {label, reasons, next_step} of a saved run, by the rules of today."""
    return judge(*read_folder(folder))


def add_judge_arguments(parser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR", help="結果のフォルダー、または TRL が書いたフォルダー")
    parser.add_argument("--json", action="store_true", help="判定を JSON で表示する")


def run_judge(arguments) -> int:
    """Print the verdict and return 0, whatever the label; raise UserError where there is nothing to read."""
    verdict = judge_folder(arguments.run_dir)
    print(json.dumps(verdict, ensure_ascii=False, indent=2) if arguments.json else describe_verdict(verdict))
    return 0
