"""Says what of a run may leave the machine: files without paths and the user's columns, and a model card."""

import json
from pathlib import Path

from dpo_helpers.config import RunConfig
from dpo_helpers.data.prompt import SIDES
from dpo_helpers.files import dump_json, read_bytes
from dpo_helpers.judge.rules import RULE_NAMES
from dpo_helpers.judge.verdict import LABEL_NAMES

FIGURES = {
    "loss": "損失（sigmoid。学習前は 0.6931）",
    "accuracy": "正解率（当てずっぽうなら 0.5）",
    "margin": "マージン",
    "chosen_log_prob_change": "良い回答の対数確率の変化（nat）",
    "rejected_log_prob_change": "悪い回答の対数確率の変化（nat）",
}
TEXT = """---
{front}
---

# {base} を DPO で学習した{kind}

ベースモデル {base} を、{warm_up}DPO（Direct Preference Optimization）
{epochs:g} エポック（LoRA のランク {rank}）で学習しました。
このカードは学習の記録（`run_config.json`、`metrics.json`）から自動で作りました。

## 使い方

{usage}

## データ

{source}。学習 {training_rows} 行、評価 {rows} 行。行そのものは公開していません。

## 成績（学習に使っていない {rows} 行）

{figures}

{verdict}## 学習の設定

{settings}

デバイス：{device}、精度：{precision}。バージョン：{versions}。

## 限界

- 小さなモデルなので、文の形が整っていても、**内容が正しいとは限りません**。事実の確認には使わないでください。
- 損失と正解率は「二つの回答のうちどちらが良いか」だけを測ります。正しさ、安全性、かたよりは測っていません。
- 評価の行は、学習の行と同じデータから、質問が重ならないように分けたものです。ほかの質問では測っていません。

## ライセンス

ベースモデル（{base}）のライセンスに従います。そのページで確かめてから使ってください。
"""
USAGE = """```python
{peft}from transformers import AutoModelForCausalLM, AutoTokenizer

REPO = "このリポジトリの名前"
tokenizer = AutoTokenizer.from_pretrained(REPO)
model = AutoModelForCausalLM.from_pretrained({load}){adapter}
inputs = tokenizer("質問: AIとは何ですか？\\n回答:\\n", return_tensors="pt")  # 会話用なら apply_chat_template
ids = model.generate(**inputs, max_new_tokens=80, do_sample=False, pad_token_id=tokenizer.pad_token_id)
print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""
MERGE_FIRST = (
    "ベースモデルがこのマシンにしかないので、アダプターだけを公開しても、ほかの人は使えません。\n"
    "先に python -m dpo_helpers merge で一つのモデルにして、"
    "そのフォルダを指定してください（ノートブックでは merge_adapter）。"
)


def hide_path(name: str) -> str:
    """Return a model's name; of a folder of this machine its last part alone."""
    return Path(name).name if name.startswith(("/", "~", ".")) or Path(name).is_absolute() else name


def make_public(folder: Path, name: str) -> bytes:
    """Return a result's file as it may leave the machine: without its paths, and the user's own columns."""
    content, metrics = (folder / name).read_bytes(), json.loads(read_bytes(folder / "metrics.json") or b"{}")
    own = not metrics.get("rows_generated")
    for file, key in (("run_config.json", "model_name"), ("adapter_config.json", "base_model_name_or_path")):
        if name.endswith(file):
            value = json.loads(content)
            return dump_json(value | {key: hide_path(value[key])})
    if name == "metrics.json" and own:
        return dump_json(hide_values(metrics))
    if name in ("train.jsonl", "held_out.jsonl") and own:
        rows = [json.loads(line) for line in content.decode().split("\n") if line]
        public = [{key: row[key] for key in ("prompt", *SIDES)} for row in rows]
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in public).encode()
    return content


def hide_values(metrics: dict) -> dict:
    """Return metrics without the values of the user's columns, also where the verdict names them."""
    apart = {key: lines for key, lines in metrics.items() if key.startswith("by_")}
    values = {str(line.get(key.removeprefix("by_"))) for key, lines in apart.items() for line in lines}
    kept = {key: value for key, value in metrics.items() if key not in apart}
    if verdict := kept.get("verdict"):
        reasons = [text for text in verdict["reasons"] if not any(value in text for value in values)]
        kept["verdict"] = verdict | {"reasons": reasons}
    return kept


def is_on_the_hub(name: str) -> bool:
    """Tell whether a model's name is one of the Hub, and not a folder's."""
    return name.count("/") == 1 and not name.startswith((".", "~", "/")) and not Path(name).exists()


def make_card(config: RunConfig, metrics: dict, merged: bool) -> str:
    """Return a model card in Japanese of a merged model, or of an adapter, from what its run recorded."""
    from huggingface_hub import ModelCardData

    name, held_out = config.model_name, metrics["held_out"]
    on_hub, verdict = is_on_the_hub(name), metrics.get("verdict")
    base = f"{name}（その場で作った小さな GPT-2）" if name.startswith("embedded") else hide_path(name)
    front = ModelCardData(
        language="ja",
        base_model=name if on_hub else None,
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        tags=["dpo", "trl", *([] if merged else ["lora"])],
    )
    usage = USAGE.format(
        peft="" if merged else "from peft import PeftModel\n",
        load="REPO" if merged else f'"{name}"',
        adapter="" if merged else "\nmodel = PeftModel.from_pretrained(model, REPO)",
    )
    figures = [(label, f"{held_out[key]:.4f}") for key, label in FIGURES.items()]
    if interval := held_out.get("accuracy_interval"):
        figures.append(("正解率の 95 % 区間", f"{interval[0]:.1%}〜{interval[1]:.1%}"))
    for rule, share in metrics.get("rules", {}).items():
        figures.append((f"何も学ばない見分け方「{RULE_NAMES.get(rule, rule)}」の正解率", f"{share:.4f}"))
    reasons = [f"- {text}\n" for text in verdict["reasons"]] if verdict else []
    heading = f"## 自動の判定：{LABEL_NAMES[verdict['label']]}\n\n" if verdict else ""
    return TEXT.format(
        front=front.to_yaml(),
        base=base,
        kind="モデル" if merged else " LoRA アダプター",
        warm_up=f"教師あり学習（{config.sft_epochs:g} エポック）と " if config.sft_epochs else "",
        epochs=config.num_train_epochs,
        rank=config.lora_rank,
        usage=usage if merged or on_hub else MERGE_FIRST,
        source="プログラムで自動生成した行です"
        if metrics.get("rows_generated")
        else "学習した人が用意した行です",
        training_rows=metrics.get("training_rows"),
        rows=held_out["rows"],
        figures=_table(figures),
        verdict=f"{heading}{''.join(reasons)}\n" if verdict else "",
        settings=_table([(f"`{key}`", v) for key, v in (config.as_dict() | {"model_name": base}).items()]),
        device=metrics["device"],
        precision=metrics["precision"],
        versions="、".join(f"{name} {number}" for name, number in metrics["versions"].items()),
    )


def _table(rows: list[tuple]) -> str:
    return "\n".join(f"| {left} | {right} |" for left, right in [("項目", "値"), ("---", "---"), *rows])
