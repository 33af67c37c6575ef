"""Makes a finished run ready for others: merged into its base, with a model card, sent to the Hub."""

import fnmatch
import hashlib
import json
import shutil
from pathlib import Path

from dpo_helpers.config import RunConfig
from dpo_helpers.data.prompt import SIDES, make_prompt
from dpo_helpers.errors import UserError
from dpo_helpers.files import (
    exists,
    hash_file,
    list_names,
    read_rows,
    tell_full_disk,
    write_json,
    write_whole,
)
from dpo_helpers.folders import read_manifest, verify_folder, write_manifest
from dpo_helpers.hub import check_name, send_files
from dpo_helpers.judge.public import MERGE_FIRST, is_on_the_hub, make_card, make_public
from dpo_helpers.keep.result import load_run
from dpo_helpers.model.adapters import WEIGHTS

# What is sent of a folder: weights, tokenizer and figures, never rows or settings.
SHARED = (
    *("*.safetensors", "*.safetensors.index.json", "adapter_config.json", "config.json", "tokenizer*"),
    *("generation_config.json", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "metrics.json", "training.png"),
)
CARD = "README.md"
MARK = "merged.json"  # the first file of a merged model: its folder is ours to write over
TOLERANCE = 0.001  # nats a token between the adapter's log-probs and the merged model's
PROBE = {"prompt": make_prompt("AIとは何ですか？"), "chosen": "知能のある機械です。", "rejected": "さあ。"}


def merge_adapter(folder, target) -> Path:
    """Write base and trained adapter of a saved run as one ordinary model into `target`, with its card.

    One that is there already is kept where it was made from this very run, else made again. It is measured
    against the adapter before it counts. The warmed-up reference is not part of it.
    """
    folder, target = Path(folder), Path(target)
    aside, source = target.with_name(f"{target.name}.partial"), _identify(folder)
    for place in (target, aside):
        if list_names(place) and not exists(place / MARK):
            raise UserError(
                f"フォルダ {place} は空ではないので、上書きしません。別の名前を指定してください。"
            )
    if (manifest := verify_folder(target)) and manifest.get("source") == source:
        print(f"{target} は、今の結果から作ったものがすでにあるので、それを使います。")
        return target
    with tell_full_disk(folder, "一つにしたモデル"):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        write_json(aside / MARK, {})
        _merge_into(aside, folder)
        write_manifest(aside, source=source)
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
    print(
        f"ベースモデルとアダプターを一つのモデルにして {target} に保存し、同じ数字になることを確かめました。"
    )
    return target


def _identify(folder: Path) -> str:
    """Return a hash of what a merged model is made from; refuse a result that is damaged."""
    if (manifest := read_manifest(folder)) and verify_folder(folder) is None:
        raise UserError(f"{folder} の結果が壊れています。同じ設定で train をもう一度実行すると、直ります。")
    names = ("adapter_config.json", WEIGHTS, "run_config.json", "metrics.json")
    parts = manifest["files"] if manifest else [hash_file(folder / n) for n in names if exists(folder / n)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _merge_into(aside: Path, folder: Path) -> None:
    from dpo_helpers.model.load import load_weights

    (model, tokenizer, config), rows = load_run(folder), [PROBE]
    if exists(folder / "held_out.jsonl"):
        rows = read_rows(folder / "held_out.jsonl", "評価用の行")[:8]
    before = _measure(model, tokenizer, rows, config.max_length)
    model.merge_and_unload(adapter_names=["default"]).save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    del model
    after = _measure(load_weights(aside, str(aside)), tokenizer, rows, config.max_length)
    worst = max(abs(a - b) for a, b in zip(before, after, strict=True))
    if not worst <= TOLERANCE:
        shutil.rmtree(aside)
        raise UserError(
            f"一つにしたモデルの対数確率が、アダプターと 1 トークンで {worst:.4f} nat 違うので使いません。\n"
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
    """Merge a run beside its folder and show what would be sent, or send it, where that is wanted."""
    if not wanted:
        print("共有はしていません。見るだけなら SHARE を、実際に送るなら PUSH もオンにして、")
        print("このセルをもう一度実行してください。")
        return
    target = Path(folder).with_name(f"{Path(folder).name}-merged")
    push_to_hub(merge_adapter(folder, target), repo, dry_run=not push)


def make_model_card(folder) -> str:
    """Return a model card of a finished run's (or a merged model's) folder, from its files alone."""
    folder, needed = Path(folder), ("run_config.json", "metrics.json")
    if missing := [name for name in needed if not exists(folder / name)]:
        raise UserError(f"フォルダ {folder} は学習を終えていません（足りないもの：{', '.join(missing)}）。")
    config, metrics = RunConfig.load(folder / needed[0]), json.loads(make_public(folder, needed[1]))
    if "held_out" not in metrics:
        raise UserError(
            f"フォルダ {folder} の学習は途中で止まっていて、評価がありません。最後まで学習してください。"
        )
    return make_card(config, metrics, merged=not exists(folder / "adapter_config.json"))


def push_to_hub(folder, repo: str, dry_run: bool = True, public: bool = False) -> list[str]:
    """Send a folder's weights, tokenizer, figures and card to `repo` on the Hub; return the files' names.

    The dry run, which is the default, only shows what would be sent. Rows and settings are never sent.
    """
    folder, card = Path(folder), make_model_card(folder)
    if exists(folder / "adapter_config.json"):
        adapter = json.loads((folder / "adapter_config.json").read_bytes())
        if not is_on_the_hub(adapter["base_model_name_or_path"]):
            raise UserError(MERGE_FIRST)
    check_name(repo)
    names = [n for n in list_names(folder) if any(fnmatch.fnmatch(n, pattern) for pattern in SHARED)]
    contents = {CARD: card.encode()} | {n: make_public(folder, n) for n in names if n.endswith(".json")}
    print(f"送り先：https://huggingface.co/{repo}（{'公開' if public else '非公開（自分だけ）'}）")
    print("送るファイル：")
    for name in (names := [CARD, *names]):
        size = len(contents[name]) if name in contents else (folder / name).stat().st_size
        print(f"  {name}（{size / 1e6:.2f} MB）")
    print(f"モデルカード（{CARD}）：\n{'-' * 40}\n{card}{'-' * 40}")
    if dry_run:
        print("まだ何も送っていません。内容を読み、データの出どころを書き足す必要がないか確かめてください。")
        return names
    send_files(folder, names, contents, repo, public)
    return names
