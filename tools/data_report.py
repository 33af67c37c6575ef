"""Writes a Japanese report, report.md with pictures, on the generated rows and on what runs trained on such
rows answer.

PYTHONPATH=. python tools/data_report.py OUTPUT_FOLDER [RUN_FOLDER ...]
"""

import json
import lzma
import random
import sys
from collections import Counter
from pathlib import Path

from dpo_helpers.config import RunConfig
from dpo_helpers.data.generate import (
    FIELDS,
    REJECTION_KINDS,
    generate_preferences,
    load_topics,
    split_rows,
    strip_question,
)
from dpo_helpers.data.tokens import build_token_report, measure_rows
from dpo_helpers.errors import UserError
from dpo_helpers.judge.baselines import (
    BASELINE_NAMES,
    compare_answers,
    compare_lengths,
    describe_baselines,
    share_right,
)
from dpo_helpers.judge.scores import SIDES, score_rows, summarize_by, summarize_scores
from dpo_helpers.keep.result import load_run
from dpo_helpers.model.load import load_tokenizer
from dpo_helpers.data.look import KIND_NAMES, pick_rows, quiet_libraries, tabulate_stages
from tools.bench_data import measure
from tools.show_answers import count_checks, make_table, read_rows

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures"
FORM_NAMES = {
    "definition": "定義",
    "purpose": "使い道",
    "mechanism": "仕組み",
    "strength": "利点",
    "caution": "注意点",
    "example": "具体例",
}
SIDE_NAMES = {"chosen": "良い回答（chosen）", "rejected": "悪い回答（rejected）"}
COLORS = {"chosen": "#0072B2", "rejected": "#D55E00", "other": "#666666"}
HARD_KINDS = (
    "wrong_concept",
    "off_topic",
)  # true sentences: only the question tells that they are the wrong answer


def open_tokenizers() -> dict:
    """Return the tokenizers of GPT-2 (DialoGPT's too), SmolLM2 and the embedded model by name, without any
    download.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizers = {}
    for name, file, end in (
        ("GPT-2（DialoGPT と同じ）", "gpt2", "<|endoftext|>"),
        ("SmolLM2", "smollm2", "<|im_end|>"),
    ):
        text = lzma.decompress((FIXTURES / f"{file}_tokenizer.json.xz").read_bytes()).decode()
        tokenizers[name] = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(text), bos_token=end, eos_token=end, pad_token=end
        )
    return tokenizers | {"その場で作るモデル": load_tokenizer("embedded")}


def compare_characters(train_rows: list[dict], held_out_rows: list[dict]) -> list[float]:
    """Return by how much a classifier prefers chosen to rejected in each held-out row, from the characters of
    the answers alone.

    It is a logistic regression on how often each character occurs; it sees neither the question nor any
    order.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    counter = CountVectorizer(analyzer="char", lowercase=False)
    counts = counter.fit_transform([row[side] for side in SIDES for row in train_rows])
    classifier = LogisticRegression(max_iter=1000).fit(counts, [side for side in SIDES for _ in train_rows])
    # classes_ are sorted, so that a positive score stands for "rejected"
    chosen, rejected = (
        -classifier.decision_function(counter.transform([row[side] for row in held_out_rows]))
        for side in SIDES
    )
    return (chosen - rejected).tolist()


def share_by_kind(rows: list[dict], columns: dict[str, list[float]]) -> list[dict]:
    """Return how often each column of differences is right (a tie counts as half), in all and by rejection
    kind.
    """
    table = []
    for kind, name in ({"": "全体"} | {kind: KIND_NAMES[kind] for kind in REJECTION_KINDS}).items():
        picked = [i for i, row in enumerate(rows) if kind in ("", row["rejection_kind"])]
        if picked:
            shares = {
                heading: f"{share_right([values[i] for i in picked]):.1%}"
                for heading, values in columns.items()
            }
            table.append({"悪さの種類": name, "行数": len(picked), **shares})
    return table


def count_values(rows: list[dict], column: str, heading: str, names: dict[str, str]) -> list[dict]:
    """Return rows and share of each value of one column, as rows of a Japanese table."""
    counts = Counter(row[column] for row in rows)
    return [
        {heading: name, "行数": counts[value], "割合": f"{counts[value] / len(rows):.1%}"}
        for value, name in names.items()
    ]


def describe_rows(rows, train_rows, held_out_rows, seconds: float) -> str:
    def count(part, key):
        return len({row[key] for row in part})

    sides = [("全体", rows), ("学習用", train_rows), ("評価用", held_out_rows)]
    sizes = [
        {"": name, "行数": len(part), "違う質問": count(part, "prompt"), "概念": count(part, "concept")}
        for name, part in sides
    ]
    shared = {row["concept"] for row in train_rows} & {row["concept"] for row in held_out_rows}
    return f"""## 行の数

{make_table(sizes)}

学習用と評価用の両方に出てくる概念は {len(shared)} 個です。{len(rows):,} 行の生成にかかった時間は {seconds:.2f} 秒でした。

![悪さの種類と分野ごとの行数](shares.png)

{make_table(count_values(rows, "field", "分野", {field: field for field in FIELDS}))}

{make_table(count_values(rows, "rejection_kind", "悪さの種類", KIND_NAMES))}

{make_table(count_values(rows, "question_form", "質問の形", {form: FORM_NAMES[form] for form in load_topics()["questions"]}))}

評価用の {len(held_out_rows)} 行の内訳：

{make_table(count_values(held_out_rows, "rejection_kind", "悪さの種類", KIND_NAMES))}
"""


def describe_lengths(rows) -> str:
    longer = compare_lengths(rows)
    middle = round(sum(len(row["chosen"]) for row in rows) / len(rows))
    nearer = [abs(len(row["rejected"]) - middle) - abs(len(row["chosen"]) - middle) for row in rows]
    columns = {"長いほうを選ぶと正解": longer, "短いほうを選ぶと正解": [-difference for difference in longer]}
    table = share_by_kind(rows, columns | {f"{middle} 文字に近いほうを選ぶと正解": nearer})
    return f"""## 回答の長さだけで当てられるか

長さで良い回答を当てられると、モデルは内容ではなく長さを学んでしまいます。50 % に近いほど良いデータです。同じ長さの行は半分の正解と数えます。
良い回答の長さは平均の {middle} 文字の近くに集まり、悪い回答は短いものから長いものまで広がるので、「{middle} 文字に近いほう」という見分け方も並べます。

![回答の長さ](lengths.png)

{make_table(table)}
"""


def describe_tokens(reports: dict[str, dict], max_length: int) -> str:
    headings = {
        "longest": "最も長い行（トークン）",
        "rows_cut": f"{max_length} を超える行",
        "rows_merged_at_boundary": "質問と回答の境目がくっつく行",
        "tokens_per_character": "回答 1 文字あたりのトークン数",
    }
    table = [
        {"トークナイザー": name} | {text: report[key] for key, text in headings.items()}
        for name, report in reports.items()
    ]
    return f"""## トークン数

一行の長さは、質問、長いほうの回答、終端記号の合計です。{max_length} トークンを超えると、回答の終わりが切られます。

![行の長さ](tokens.png)

{make_table(table)}
"""


def describe_characters(train_rows, held_out_rows) -> str:
    hard = [
        [row for row in rows if row["rejection_kind"] in HARD_KINDS] for rows in (train_rows, held_out_rows)
    ]
    heading = "正解率"
    return f"""## 出てくる文字だけで当てられるか

質問を見ず、回答に出てくる文字の数だけを使う分類器（ロジスティック回帰）を学習用の {len(train_rows)} 行で作り、評価用の {len(held_out_rows)} 行で
「良い回答の点数のほうが高い」割合を測りました（同点は半分の正解）。「あいまい」「失礼」などは回答の書き方が違うので、質問を見なくても当てられます。

{make_table(share_by_kind(held_out_rows, {heading: compare_characters(train_rows, held_out_rows)}))}

「別の概念の説明」と「関係のない話」の悪い回答は、正しい文です。質問を見なければ見分けられないので、この二種類だけで学習した分類器は 50 % 前後になるはずです
（{len(hard[1])} 行では、偶然だけでも ±{0.98 / len(hard[1]) ** 0.5:.0%} ほど揺れます）。

{make_table(share_by_kind(hard[1], {heading: compare_characters(*hard)}))}
"""


def describe_run(folder: Path) -> str:
    """Score and question one saved run; every answer is shown as it came."""
    model, tokenizer, config = load_run(folder)
    rows = read_rows(folder / "held_out.jsonl")
    if unknown := sum("rejection_kind" not in row for row in rows):
        raise UserError(
            f"{folder} の評価用の {unknown} 行に悪さの種類がありません。"
            "生成したデータで学習した結果を指定してください。"
        )
    saved = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["held_out"]
    scores = score_rows(model, tokenizer, rows, config.max_length)
    differences = compare_answers(model, tokenizer, rows, scores, config)
    summary = summarize_scores(scores, config.beta)
    baselines = {name: share_right(values) for name, values in differences.items()}
    by_kind = {
        line["rejection_kind"]: line for line in summarize_by("rejection_kind", rows, scores, config.beta)
    }
    by_kind = [summary] + [by_kind[kind] for kind in REJECTION_KINDS if kind in by_kind]
    shares = share_by_kind(rows, {BASELINE_NAMES[name]: values for name, values in differences.items()})
    kinds = [
        {
            "悪さの種類": share["悪さの種類"],
            "行数": share["行数"],
            "損失": f"{line['loss']:.4f}",
            "DPO の正解率": f"{line['accuracy']:.1%}",
            "マージン": f"{line['margin']:.3f}",
        }
        | share
        for line, share in zip(by_kind, shares, strict=True)
    ]
    asked = pick_rows(rows, 30, config.seed)
    answers = tabulate_stages(model, tokenizer, asked)
    return f"""## 学習の結果：{folder}

ベースモデルは {config.model_name}、行数は {config.num_samples:,}、教師あり学習は {config.sft_epochs:g} エポック、DPO は {config.num_train_epochs:g} エポックです。
評価用の {len(rows)} 行を採点し直しました：損失 {summary["loss"]:.4f}、正解率 {summary["accuracy"]:.1%}、マージン {summary["margin"]:.3f}
（学習の直後の記録：損失 {saved["loss"]:.4f}、正解率 {saved["accuracy"]:.1%}、マージン {saved["margin"]:.3f}）。

{make_table(describe_baselines(baselines, summary["accuracy"]))}

悪さの種類ごとに見ると、次のとおりです。一種類の行は少ないので、「でたらめに入れ替えた採点」は 50 % から大きく揺れます。
DPO の正解率では同点を誤りと数え、ほかの見分け方では半分の正解と数えます。

{make_table(kinds)}

### 評価用の質問への回答

質問は、答えを見る前に乱数の種 {config.seed} で選んだ {len(asked)} 問です（一つの概念から一問）。回答は毎回最も確からしいトークンを選んで作り、
すべてをそのまま載せます。⏎ は改行です。

{make_table(count_checks(answers, asked))}

「乱れがない」は、同じ 4 文字が 3 回以上出てこず、壊れた文字もないことです。内容が正しいかどうかは、この数では分かりません。

{make_table(answers)}
"""


def describe_sample(rows) -> str:
    picked = random.Random(0).sample(rows, min(100, len(rows)))
    table = [
        {
            "番号": number,
            "質問": strip_question(row["prompt"]),
            **{SIDE_NAMES[side]: row[side] for side in SIDES},
            "悪さの種類": KIND_NAMES[row["rejection_kind"]],
        }
        for number, row in enumerate(picked, 1)
    ]
    return f"## 無作為に選んだ {len(picked)} 行（乱数の種 0）\n\n{make_table(table)}\n"


def save_figure(figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_lengths(rows, path: Path) -> None:
    """Draw how long the answers of both sides are, in characters."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 3.5), layout="constrained")
    longest = max(len(row[side]) for row in rows for side in SIDES)
    for side in SIDES:
        lengths = [len(row[side]) for row in rows]
        label = f"{SIDE_NAMES[side]}　平均 {sum(lengths) / len(lengths):.1f} 文字"
        axis.hist(
            lengths,
            bins=range(longest + 2),
            histtype="step",
            linewidth=2,
            align="left",
            color=COLORS[side],
            label=label,
        )
    share = share_right(compare_lengths(rows))
    axis.set(
        title=f"回答の長さ：長いほうを選んでも、正解は {share:.0%}",
        xlabel="回答の長さ（文字）",
        ylabel="行数",
    )
    axis.legend(fontsize=9)
    save_figure(figure, path)


def plot_tokens(measured: dict[str, list], max_length: int, path: Path) -> None:
    """Draw how long the rows are in each tokenizer's tokens, beside the limit."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(measured), 1, figsize=(7, 1.9 * len(measured) + 0.6), sharex=True, layout="constrained"
    )
    longest = max(max_length, *(row.tokens for rows in measured.values() for row in rows))
    for axis, (name, rows) in zip(axes, measured.items(), strict=True):
        axis.hist([row.tokens for row in rows], bins=range(0, longest + 4, 2), color=COLORS["chosen"])
        axis.axvline(
            max_length, color=COLORS["rejected"], linestyle="--", label=f"上限 {max_length} トークン"
        )
        axis.set(title=name, ylabel="行数")
    axes[0].legend(fontsize=9, loc="upper left")
    axes[-1].set(xlabel="質問と長いほうの回答の長さ（トークン）")
    over = sum(
        any(rows[i].cut for rows in measured.values()) for i in range(len(next(iter(measured.values()))))
    )
    figure.suptitle(f"行の長さ：{max_length} トークンを超える行は {over} 行")
    save_figure(figure, path)


def plot_shares(rows, path: Path) -> None:
    """Draw how many rows each rejection kind and each field has."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    panels = (
        ("rejection_kind", KIND_NAMES, "悪さの種類", "rejected"),
        ("field", {field: field for field in FIELDS}, "分野", "other"),
    )
    for axis, (column, names, title, color) in zip(axes, panels, strict=True):
        counts = Counter(row[column] for row in rows)
        bars = axis.barh(list(names.values()), [counts[value] for value in names], color=COLORS[color])
        axis.bar_label(bars, padding=2, fontsize=9)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set(title=f"{title}ごとの行数：{min(counts.values())}〜{max(counts.values())} 行", xlabel="行数")
    save_figure(figure, path)


def main(output: Path, runs: list[Path]) -> None:
    import matplotlib_fontja  # noqa: F401  (imported for its effect: a font with Japanese glyphs)

    quiet_libraries()
    config, rows = RunConfig(), []
    seconds, _, _ = measure(
        lambda: (
            rows.extend(generate_preferences(config.num_samples, config.seed, config.held_out_fraction))
            or rows
        )
    )
    train_rows, held_out_rows = split_rows(rows, config.held_out_fraction, config.seed)
    measured = {
        name: measure_rows(rows, tokenizer, config.max_length)
        for name, tokenizer in open_tokenizers().items()
    }
    output.mkdir(parents=True, exist_ok=True)
    plot_lengths(rows, output / "lengths.png")
    plot_tokens(measured, config.max_length, output / "tokens.png")
    plot_shares(rows, output / "shares.png")
    sections = [
        f"# 生成したデータの報告\n\n既定の設定（{config.num_samples:,} 行、"
        f"乱数の種 {config.seed}、評価用の概念の割合 {config.held_out_fraction:.0%}）で作ったデータです。\n",
        describe_rows(rows, train_rows, held_out_rows, seconds),
        describe_lengths(rows),
        describe_tokens(
            {name: build_token_report(part, config.max_length) for name, part in measured.items()},
            config.max_length,
        ),
        describe_characters(train_rows, held_out_rows),
        *(describe_run(folder) for folder in runs),
        describe_sample(rows),
    ]
    (output / "report.md").write_text("\n".join(sections), encoding="utf-8")
    print(f"報告を {output / 'report.md'} に書きました。")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        main(Path(sys.argv[1]), [Path(word) for word in sys.argv[2:]])
    except UserError as error:
        sys.exit(f"⚠️ {error}")
