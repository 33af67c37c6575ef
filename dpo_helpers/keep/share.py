"""Makes a finished run ready for others: merged into its base, described by a model card, sent to the Hugging Face Hub."""

import fnmatch
import hashlib
import json
import shutil
import tempfile
from pathlib import Path

from dpo_helpers.config import RunConfig
from dpo_helpers.data.generate import SIDES, make_prompt
from dpo_helpers.errors import UserError
from dpo_helpers.files import (
    MANIFEST,
    exists,
    hash_file,
    list_names,
    read_json,
    read_manifest,
    read_rows,
    tell_full_disk,
    verify_folder,
    write_json,
    write_manifest,
    write_whole,
)
from dpo_helpers.judge.baselines import BASELINE_NAMES
from dpo_helpers.judge.verdict import LABEL_NAMES
from dpo_helpers.keep.checkpoints import WEIGHTS
from dpo_helpers.keep.result import hide_path, load_run, make_public

# What is sent of a folder: weights, tokenizer and figures, never rows or settings.
SHARED = (
    *("*.safetensors", "*.safetensors.index.json", "adapter_config.json", "config.json", "generation_config.json"),
    *("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("metrics.json", "training.png"),
)
CARD = "README.md"
MARK = "merged.json"  # says from which run's files a merged model was made; the first file that is written
TOLERANCE = 0.001  # nats a token between the adapter's log-probs and the merged model's
TRY_ROWS = [{"prompt": make_prompt("AIとは何ですか？"), "chosen": "知能のある機械です。", "rejected": "さあ。"}]
LIMITS = """- 小さなモデルなので、文の形が整っていても、**内容が正しいとは限りません**。事実の確認には使わないでください。
- 損失と正解率は「二つの回答のうちどちらが良いか」だけを測ります。回答の正しさ、安全性、かたよりは測っていません。
- 評価の行は、学習の行と同じデータから、質問が重ならないように分けたものです。ほかの種類の質問での成績は測っていません。"""


def merge_adapter(folder, target) -> Path:
    """Write base and trained adapter of a saved run as one ordinary model into `target`, with its card; return it.

    One that is there already is kept where it was made from this very run, else made again. It is measured against the
    adapter before it counts. The warmed-up reference is not part of it.
    """
    folder, target = Path(folder), Path(target)
    aside, source = target.with_name(f"{target.name}.partial"), _identify(folder)
    for place in (target, aside):
        if list_names(place) and not exists(place / MARK):
            raise UserError(f"フォルダ {place} は空ではないので、上書きしません。別の名前を指定してください。")
    if (manifest := verify_folder(target)) and manifest.get("source") == source:
        print(f"{target} は、今の結果から作ったものがすでにあるので、それを使います。")
        return target
    with tell_full_disk(target.parent if target.parent.is_dir() else ".", "一つにしたモデル"):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        write_json(aside / MARK, {"source": source})
        _merge_into(aside, folder)
        write_manifest(aside, source=source)
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
    print(f"ベースモデルとアダプターを一つのモデルにして {target} に保存し、アダプターと同じ数字になることを確かめました。")
    return target


def _identify(folder: Path) -> str:
    """Return a hash of what a merged model is made from; refuse a result that is damaged."""
    if (manifest := read_manifest(folder)) and verify_folder(folder) is None:
        raise UserError(f"{folder} の結果が壊れています。同じ設定で train をもう一度実行すると、直ります。")
    names = ("adapter_config.json", WEIGHTS, "run_config.json", "metrics.json")
    files = manifest["files"] if manifest else [hash_file(folder / n) for n in names if exists(folder / n)]
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _merge_into(aside: Path, folder: Path) -> None:
    from dpo_helpers.model.load import load_weights

    model, tokenizer, config = load_run(folder)
    rows = read_rows(folder / "held_out.jsonl", "評価用の行")[:8] if exists(folder / "held_out.jsonl") else TRY_ROWS
    before = _measure(model, tokenizer, rows, config.max_length)
    model.merge_and_unload(adapter_names=["default"]).save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    del model
    after = _measure(load_weights(aside, str(aside)), tokenizer, rows, config.max_length)
    worst = max(abs(a - b) for a, b in zip(before, after, strict=True))
    if not worst <= TOLERANCE:
        shutil.rmtree(aside)
        raise UserError(
            f"一つにしたモデルの対数確率が、アダプターのものと 1 トークンあたり {worst:.4f} nat 違うので、使いません。\n"
            "入力と出力で同じ重みを使う層（lm_head や wte）に LoRA を付けると起こります。"
            "LORA_TARGETS を all-linear にして学習し直すか、アダプターのまま使ってください。"
        )
    for name in ("run_config.json", "metrics.json", "training.png"):
        if exists(folder / name):
            write_whole(aside / name, make_public(folder, name))
    if exists(aside / "metrics.json"):
        write_whole(aside / CARD, make_model_card(aside))


def _measure(model, tokenizer, rows: list[dict], max_length: int) -> list[float]:
    """Return log p(answer | prompt) a token of every answer of the rows."""
    from dpo_helpers.data.tokens import encode_answers
    from dpo_helpers.judge.scores import score_encoded

    pairs = [(row["prompt"], row[side]) for row in rows for side in SIDES]
    encoded = [(ids[:max_length], len(start)) for start, ids in encode_answers(tokenizer, pairs)]
    scores = score_encoded(model.eval(), tokenizer, encoded, batch_size=4)
    return [score / max(1, len(ids) - start) for score, (ids, start) in zip(scores, encoded, strict=True)]


def share_run(folder, repo: str, wanted: bool, push: bool) -> None:
    """Merge a run beside its folder and show what would be sent, or send it; unless `wanted`, say how to ask for that."""
    if not wanted:
        print("共有はしていません。見るだけなら SHARE を、実際に送るなら PUSH もオンにして、このセルをもう一度実行してください。")
        return
    push_to_hub(merge_adapter(folder, Path(folder).with_name(f"{Path(folder).name}-merged")), repo, dry_run=not push)


def make_model_card(folder) -> str:
    """Return a model card in Japanese of a finished run's (or a merged model's) folder, from its files and nothing else."""
    from huggingface_hub import ModelCardData

    folder, needed = Path(folder), ("run_config.json", "metrics.json")
    if missing := [name for name in needed if not exists(folder / name)]:
        raise UserError(f"フォルダ {folder} に学習の記録（{', '.join(missing)}）がありません。学習を終えたフォルダを指定してください。")
    config, metrics = RunConfig.load(folder / needed[0]), json.loads(make_public(folder, needed[1]))
    if "held_out" not in metrics:
        raise UserError(f"フォルダ {folder} の学習は途中で止まっていて、評価がありません。最後まで学習してから実行してください。")
    merged, on_hub = not exists(folder / "adapter_config.json"), _is_on_the_hub(config.model_name)
    base, held_out, verdict = _public_name(config.model_name), metrics["held_out"], metrics.get("verdict")
    front = ModelCardData(
        language="ja",
        base_model=config.model_name if on_hub else None,
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        tags=["dpo", "trl", *([] if merged else ["lora"])],
    )
    warm_up = f"教師あり学習（{config.sft_epochs:g} エポック）と " if config.sft_epochs else ""
    source = "プログラムで自動生成した行です" if metrics.get("rows_generated") else "学習した人が用意した行です"
    settings = config.as_dict() | {"model_name": base}
    versions = "、".join(f"{name} {number}" for name, number in metrics["versions"].items())
    sections = (
        f"---\n{front.to_yaml()}\n---",
        f"# {base} を DPO で学習した{'モデル' if merged else ' LoRA アダプター'}\n\n"
        f"ベースモデル {base} を、{warm_up}DPO（Direct Preference Optimization、{config.num_train_epochs:g} エポック、"
        f"LoRA のランク {config.lora_rank}）で学習しました。"
        "このカードは学習の記録（`run_config.json`、`metrics.json`）から自動で作りました。",
        f"## 使い方\n\n{_usage(config.model_name, merged, on_hub)}",
        f"## データ\n\n{source}。学習 {metrics.get('training_rows')} 行、評価 {held_out['rows']} 行。"
        "行そのものは公開していません。",
        f"## 成績（学習に使っていない {held_out['rows']} 行）\n\n{_describe_figures(metrics)}",
        "\n".join([f"## 自動の判定：{LABEL_NAMES[verdict['label']]}\n", *(f"- {text}" for text in verdict["reasons"])])
        if verdict
        else "",
        f"## 学習の設定\n\n{_table(('設定', '値'), [(f'`{name}`', value) for name, value in settings.items()])}\n\n"
        f"デバイス：{metrics['device']}、精度：{metrics['precision']}。バージョン：{versions}。",
        f"## 限界\n\n{LIMITS}",
        f"## ライセンス\n\nベースモデル（{base}）のライセンスに従います。そのページで確かめてから使ってください。",
    )
    return "\n\n".join(section for section in sections if section) + "\n"


def push_to_hub(folder, repo: str, dry_run: bool = True, public: bool = False) -> list[str]:
    """Send a folder's weights, tokenizer, figures and card to `repo` on the Hub; return the names of the files.

    The dry run, which is the default, only shows what would be sent. Rows and settings are never sent.
    """
    from huggingface_hub.utils import validate_repo_id

    folder, card = Path(folder), make_model_card(folder)
    if exists(folder / "adapter_config.json"):
        if not _is_on_the_hub(read_json(folder / "adapter_config.json", "アダプター")["base_model_name_or_path"]):
            raise UserError(
                "ベースモデルがこのマシンにしかないので、アダプターだけを公開しても、ほかの人は使えません。\n"
                "先に python -m dpo_helpers merge で一つのモデルにして、"
                "そのフォルダを指定してください（ノートブックでは merge_adapter）。"
            )
    try:
        validate_repo_id(repo)
    except ValueError:
        raise UserError(f"リポジトリの名前 {repo} は使えません。「ユーザー名/モデル名」の形に、英数字と - _ . で書いてください。") from None
    names = [n for n in list_names(folder) if any(fnmatch.fnmatch(n, pattern) for pattern in SHARED)]
    contents = {CARD: card.encode()} | {n: make_public(folder, n) for n in names if n.endswith(".json")}
    print(f"送り先：https://huggingface.co/{repo}（{'公開' if public else '非公開（自分だけ）'}）\n送るファイル：")
    for name in (names := [CARD, *names]):
        size = len(contents[name]) if name in contents else (folder / name).stat().st_size
        print(f"  {name}（{size / 1e6:.2f} MB）")
    print(f"モデルカード（{CARD}）：\n{'-' * 40}\n{card}{'-' * 40}")
    if dry_run:
        print("まだ何も送っていません。内容を読み、データの出どころを書き足す必要がないか確かめてから、実際に送ってください。")
    else:
        _send(folder, names, contents, repo, public)
    return names


def _send(folder: Path, names: list[str], contents: dict[str, bytes], repo: str, public: bool) -> None:
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    if get_token() is None:
        raise UserError(
            "Hugging Face のトークンがありません。https://huggingface.co/settings/tokens で Write の権限のトークンを作り、"
            "Colab では左の鍵の印（シークレット）に HF_TOKEN の名前で入れて、ほかでは hf auth login を実行してください。"
        )
    try:
        with tempfile.TemporaryDirectory() as staged:
            for name in names:
                if name in contents:
                    (Path(staged) / name).write_bytes(contents[name])
                else:
                    (Path(staged) / name).symlink_to((folder / name).resolve())
            HfApi().create_repo(repo, private=not public, exist_ok=True)
            HfApi().upload_folder(repo_id=repo, folder_path=staged, commit_message="DPO で学習したモデルを追加")
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise UserError(f"{repo} に書き込めません。トークンに Write の権限があるか、ユーザー名が自分のものか確かめてください。") from None
        raise UserError(f"Hugging Face Hub がエラーを返しました（{error}）。少し待ってから、もう一度実行してください。") from error
    except (OSError, HTTPError) as error:
        raise UserError(
            f"Hugging Face Hub に送れませんでした（{error}）。ネットワークを確かめて、もう一度実行してください"
            "（送り終えた分は送り直しません）。"
        ) from error
    print(f"送りました：https://huggingface.co/{repo}")


def _public_name(name: str) -> str:
    """Return a model's name without the folders of this machine."""
    return f"{name}（その場で作った小さな GPT-2）" if name.startswith("embedded") else hide_path(name)


def _is_on_the_hub(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "~", "/")) and not Path(name).exists()


def _usage(base: str, merged: bool, on_hub: bool) -> str:
    if not (merged or on_hub):
        return (
            "ベースモデルが公開されていないので、このアダプターだけでは使えません。"
            "`python -m dpo_helpers merge` で一つのモデルにしてください。"
        )
    load = "REPO" if merged else f'"{base}"'
    lines = [
        *([] if merged else ["from peft import PeftModel"]),
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n",
        'REPO = "このリポジトリの名前"',
        "tokenizer = AutoTokenizer.from_pretrained(REPO)",
        f"model = AutoModelForCausalLM.from_pretrained({load})",
        *([] if merged else ["model = PeftModel.from_pretrained(model, REPO)"]),
        'inputs = tokenizer("質問: AIとは何ですか？\\n回答:\\n", return_tensors="pt")  # 会話用なら apply_chat_template',
        "ids = model.generate(**inputs, max_new_tokens=80, do_sample=False, pad_token_id=tokenizer.pad_token_id)",
        'print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return "\n".join(["```python", *lines, "```"])


def _table(headings: tuple, rows: list[tuple]) -> str:
    lines = [headings, tuple("---" for _ in headings), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _describe_figures(metrics: dict) -> str:
    held_out = metrics["held_out"]
    low, high = held_out.get("accuracy_interval", (None, None))
    interval = "" if low is None else f"（95 % 区間 {low:.1%}〜{high:.1%}）"
    figures = [
        ("損失（sigmoid。学習前は 0.6931）", f"{held_out['loss']:.4f}"),
        ("正解率（当てずっぽうなら 50 %）", f"{held_out['accuracy']:.1%}{interval}"),
        ("マージン", f"{held_out['margin']:.3f}"),
        ("良い回答の対数確率の変化（nat）", f"{held_out['chosen_log_prob_change']:+.2f}"),
        ("悪い回答の対数確率の変化（nat）", f"{held_out['rejected_log_prob_change']:+.2f}"),
    ]
    names = {"first_loss": "最初の損失", "final_train_loss": "最後の 1 割の損失"}
    figures += [(f"{label}（学習用の行）", f"{metrics[k]:.4f}") for k, label in names.items() if k in metrics]
    text = _table(("項目", "値"), figures)
    if baselines := metrics.get("baselines"):
        rows = [(BASELINE_NAMES.get(name, name), f"{value:.1%}") for name, value in baselines.items()]
        text += "\n\n何も学ばない見分け方の正解率：\n\n" + _table(("見分け方", "正解率"), rows)
    return text
