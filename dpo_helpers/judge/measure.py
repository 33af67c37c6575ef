"""Measures a trained model on held-out rows, as metrics.json keeps it, and describes the figures as
tables.
"""

from typing import NamedTuple

from dpo_helpers.config import RunConfig
from dpo_helpers.data.look import KIND_NAMES, UNSEEN_NAMES, group_by_unseen
from dpo_helpers.data.prompt import strip_question
from dpo_helpers.judge.answers import check_answers, paired_difference, summarize_checks, write_answers
from dpo_helpers.judge.rules import find_best_rule, measure_beside, measure_rules
from dpo_helpers.judge.scores import check_before, compute_margin, score_rows, summarize_by, summarize_scores

ROLE_KEYS = {
    "base": "base",
    "reference": "warm_up",
    "policy": "policy",
}  # in metrics.json; no warm-up, no such key
WAYS = ("greedy", "sampled")
BEFORE_ROWS = 4  # whose log-probs under base and reference tell a leaked adapter


class Evaluation(NamedTuple):
    """`metrics` is what metrics.json keeps of the held-out rows, `answers` a table of what was written."""

    metrics: dict
    answers: list[dict]


def evaluate_run(model, tokenizer, train_rows, held_out_rows, config: RunConfig, before: dict) -> Evaluation:
    """Score the held-out rows, let base, warm-up and policy answer them, and put the figures together.

    `before` are measure_before's of the first BEFORE_ROWS held-out rows; a leaked adapter raises UserError.
    """
    length = config.max_length
    check_before(model, tokenizer, held_out_rows[:BEFORE_ROWS], before, length)
    scores = score_rows(model, tokenizer, held_out_rows, length)
    held_out, rules = summarize_scores(scores, config.beta), measure_rules(train_rows, held_out_rows)
    best_rule, best_accuracy = find_best_rule(rules)
    metrics = {
        "held_out": held_out,
        "discrimination": {
            "accuracy": held_out["accuracy"],
            "interval": held_out["accuracy_interval"],
            "best_rule": best_rule,
            "best_rule_accuracy": best_accuracy,
        },
        "rules": rules,
        "beside": measure_beside(model, tokenizer, train_rows, held_out_rows, length),
        "before": before,
    }
    for column in ("unseen", "rejection_kind", "field"):
        if all(row.get(column) for row in held_out_rows):
            metrics[f"by_{column}"] = summarize_by(column, held_out_rows, scores, config.beta)
    roles = [role for role in ROLE_KEYS if role != "reference" or "ref" in model.peft_config]
    written = write_answers(model, tokenizer, held_out_rows, config, roles)
    checks = {
        ROLE_KEYS[role]: {
            way: check_answers(texts[way], held_out_rows, [*train_rows, *held_out_rows]) for way in WAYS
        }
        for role, texts in written.items()
    }
    metrics["writing"] = summarize_writing(checks, held_out_rows)
    metrics["writing_change"] = compare_writing(checks)
    return Evaluation(metrics, _tabulate(written, checks, held_out_rows, scores, config.beta))


def summarize_writing(checks: dict, rows: list[dict]) -> dict:
    """Return {kind of unseen question: {role: {"greedy" | "sampled": summarize_checks}}}."""
    kinds = {}
    for number, row in enumerate(rows):
        kinds.setdefault(row.get("unseen") or "held_out", []).append(number)
    return {
        kind: {
            role: {way: summarize_checks([found[i] for i in numbers]) for way, found in ways.items()}
            for role, ways in checks.items()
        }
        for kind, numbers in sorted(kinds.items())
    }


def compare_writing(checks: dict) -> dict:
    """Return {earlier role: {way: {measure: [difference, low, high]}}} of the policy against base and
    warm-up.

    Over all held-out questions, paired, with 95 % intervals; `manners` counts bad manners, so lower is
    better.
    """
    earlier = [role for role in checks if role != "policy"]
    return {
        role: {
            way: {
                name: _flatten(
                    paired_difference(
                        [check[name] for check in checks[role][way]],
                        [check[name] for check in checks["policy"][way]],
                    )
                )
                for name in ("right", "manners")
            }
            for way in WAYS
        }
        for role in earlier
    }


def _flatten(difference) -> list[float]:
    mean, (low, high) = difference
    return [mean, low, high]


def _tabulate(written: dict, checks: dict, rows: list[dict], scores: list[dict], beta: float) -> list[dict]:
    return [
        {
            "prompt": row["prompt"],
            "unseen": row.get("unseen") or "held_out",
            "chosen": row["chosen"],
            "margin": compute_margin(score, beta),
            **{ROLE_KEYS[role]: texts["greedy"][i] for role, texts in written.items()},
            "right": {role: ways["greedy"][i]["right"] for role, ways in checks.items()},
        }
        for i, (row, score) in enumerate(zip(rows, scores, strict=True))
    ]


def describe_metrics(metrics: dict) -> list[dict]:
    """Return the figures of metrics.json that a reader wants first, as rows of a Japanese table."""
    held_out, seconds = metrics["held_out"], metrics["seconds"]
    lines = [
        ("最初の損失（学習用）", f"{metrics['first_loss']:.4f}", "学習前は ln 2 = 0.6931"),
        ("最後の損失（学習用）", f"{metrics['final_train_loss']:.4f}", "最後の 1 割のステップの平均"),
        (f"損失（評価用 {held_out['rows']} 行）", f"{held_out['loss']:.4f}", "0.6931 より小さいほど良い"),
        ("正解率（評価用）", f"{held_out['accuracy']:.1%}", "当てずっぽうなら 50 %"),
        (
            "マージン（評価用）",
            f"{held_out['margin']:.3f}",
            "学習前は 0。大きいほど、二つをはっきり区別している",
        ),
        (
            "良い回答の対数確率の変化",
            f"{held_out['chosen_log_prob_change']:+.2f}",
            "1 回答あたり。下がることも多い",
        ),
        (
            "悪い回答の対数確率の変化",
            f"{held_out['rejected_log_prob_change']:+.2f}",
            "良い回答より大きく下がるのが狙い",
        ),
        (
            "速さ",
            f"{metrics['pairs_per_second']:.2f} ペア/秒",
            f"DPO {seconds['training']:.0f} 秒、教師あり学習 {seconds['sft']:.0f} 秒",
        ),
        (
            "メモリの最大",
            f"{metrics['peak_memory_bytes'] / 1e9:.2f} GB",
            "GPU があれば GPU、なければこの処理全体",
        ),
    ]
    return [{"項目": name, "値": value, "読み方": note} for name, value, note in lines]


def describe_writing(metrics: dict) -> list[dict]:
    """Return what base, warm-up and policy write on each kind of unseen question, as rows of a Japanese
    table.
    """
    names = {"base": "ベースモデル", "warm_up": "教師あり学習の後", "policy": "DPO の後"}
    ways = {"greedy": "最も確かな回答", "sampled": "くじ引きの回答"}
    table = []
    for kind, roles in metrics["writing"].items():
        for way, way_name in ways.items():
            for role, summary in roles.items():
                found, (low, high) = summary[way], summary[way]["interval"]["right"]
                table.append(
                    {
                        "質問": f"{UNSEEN_NAMES[kind]}（{found['questions']} 問）",
                        "書かせ方": way_name,
                        "モデル": names[role],
                        "正しい": f"{found['right']:.0%}（{low:.0%}〜{high:.0%}）",
                        "あいまい・答えない・失礼": f"{found['manners']:.0%}",
                        "聞かれた名前がある": f"{found['names']:.0%}",
                        "終わりまで書いた": f"{found['ends']:.0%}",
                        "繰り返し": f"{found['loops']:.0%}",
                    }
                )
    return table


def describe_kinds(metrics: dict) -> list[dict]:
    """Return the figures by kind of unseen question and by kind of rejected answer, as rows of a Japanese
    table.
    """
    headings = {"rows": "行数", "loss": "損失", "accuracy": "正解率", "margin": "マージン"}
    table = []
    for column, names in (("unseen", UNSEEN_NAMES), ("rejection_kind", KIND_NAMES)):
        for line in metrics.get(f"by_{column}", []):
            figures = {heading: line[name] for name, heading in headings.items()}
            table.append({"種類": names.get(line[column], line[column])} | figures)
    if not table:
        print("このデータには種類を表す列がないので、種類ごとの表はありません。")
    return table


def describe_answers(answers: list[dict], count: int = 6) -> list[dict]:
    """Return questions whose answer the training changed, `count` of each kind of unseen question, with
    what changed.
    """
    table = []
    for kind, lines in group_by_unseen(answers).items():
        changed = [line for line in lines if line["policy"] != line["base"]]
        won = [line for line in changed if line["right"]["policy"] > line["right"]["base"]]
        lost = [line for line in changed if line["right"]["policy"] < line["right"]["base"]]
        rest = [line for line in changed if line["right"]["policy"] == line["right"]["base"]]
        share = max(1, count // 3)
        for line in [*won[:share], *lost[:share], *rest][:count]:
            table.append(_describe_answer(kind, line))
    return table


def _describe_answer(kind: str, line: dict) -> dict:
    was, now = line["right"]["base"], line["right"]["policy"]
    change = {(False, True): "正しくなった", (True, False): "誤りになった", (True, True): "正しいまま"}
    warm_up = {"教師あり学習の後": line["warm_up"]} if "warm_up" in line else {}
    return {
        "質問": strip_question(line["prompt"]),
        "種類": UNSEEN_NAMES[kind],
        "ベースモデル": line["base"],
        **warm_up,
        "DPO の後": line["policy"],
        "良い回答": line["chosen"],
        "変化": change.get((was, now), "誤りのまま"),
        "マージン": line["margin"],
    }
