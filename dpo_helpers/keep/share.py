"""Makes a finished run ready for others: merged into its base, described by a model card, sent to the
Hugging Face Hub.
"""

import fnmatch
import json
import shutil
from pathlib import Path

from dpo_helpers.config import RunConfig
from dpo_helpers.errors import UserError
from dpo_helpers.judge.rules import RULE_NAMES as BASELINE_NAMES
from dpo_helpers.judge.verdict import LABEL_NAMES

# What is sent of a folder: weights, tokenizer and figures. Rows may be private, and run_config.json may name
# a folder of this machine.
SHARED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "adapter_config.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "metrics.json",
    "training.png",
)
CARD = "README.md"


def merge_adapter(folder, target) -> Path:
    """Write base and trained adapter of a saved run as one ordinary model into the new folder `target`, with
    its card; return it.

    The warmed-up reference, where the run has one, is not part of it.
    """
    from dpo_helpers.keep.storage import load_run  # here: it needs psutil, which `doctor` must do without

    folder, target = Path(folder), Path(target)
    if target.exists() and any(target.iterdir()):
        raise UserError(
            f"フォルダー {target} は空ではありません。上書きしないように止めました。"
            "別の名前を指定してください。"
        )
    model, tokenizer, _ = load_run(folder)
    merged = model.merge_and_unload(adapter_names=["default"])
    merged.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for name in ("run_config.json", "metrics.json", "training.png"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    if (target / "metrics.json").is_file():
        (target / CARD).write_text(make_model_card(target, _describe_data(folder)), encoding="utf-8")
    print(
        f"ベースモデルとアダプターを一つのモデルにして {target} に保存しました。"
        "AutoModelForCausalLM.from_pretrained でそのまま読み込めます。"
    )
    return target


def share_run(folder, repo: str, wanted: bool, push: bool) -> None:
    """Merge a run beside its folder, once, and show what would be sent, or send it; without `wanted` say
    how to ask for that.
    """
    if not wanted:
        print(
            "共有はしていません。見るだけなら SHARE を、実際に送るなら PUSH もオンにして、"
            "このセルをもう一度実行してください。"
        )
        return
    target = Path(folder).with_name(f"{Path(folder).name}-merged")
    if not (target / CARD).is_file():
        merge_adapter(folder, target)
    push_to_hub(target, repo, dry_run=not push)


def make_model_card(folder, data: str | None = None) -> str:
    """Return a model card in Japanese of a finished run's (or a merged model's) folder, from its files and
    nothing else.

    `data` describes the rows where the folder no longer has them.
    """
    folder = Path(folder)
    if missing := [name for name in ("run_config.json", "metrics.json") if not (folder / name).is_file()]:
        raise UserError(
            f"フォルダー {folder} に学習の記録がありません（足りないもの："
            f"{', '.join(missing)}）。学習を終えたフォルダーを指定してください。"
        )
    config, metrics = (
        RunConfig.load(folder / "run_config.json"),
        json.loads((folder / "metrics.json").read_text(encoding="utf-8")),
    )
    if "held_out" not in metrics:
        raise UserError(
            f"フォルダー {folder} の学習は途中で止まっていて、評価がありません。"
            "最後まで学習してから実行してください。"
        )
    merged, base = not (folder / "adapter_config.json").is_file(), _public_name(config.model_name)
    sections = (
        _front_matter(config.model_name, merged),
        f"# {base} を DPO で学習した{'モデル' if merged else ' LoRA アダプター'}\n\n"
        f"ベースモデル {base} を、{_describe_method(config)}で学習しました。"
        "このカードは学習の記録（`run_config.json`、`metrics.json`）から自動で作りました。",
        f"## 使い方\n\n{_usage(config.model_name, merged)}",
        f"## データ\n\n{_describe_data(folder) if data is None else data}",
        f"## 成績（学習に使っていない {metrics['held_out']['rows']} 行）\n\n{_describe_figures(metrics)}",
        _describe_verdict(metrics.get("verdict")),
        f"## 学習の設定\n\n{_describe_settings(config, metrics, base)}",
        f"## 限界\n\n{LIMITS}",
        f"## ライセンス\n\nベースモデル（{base}）のライセンスに従います。"
        "そのページで確かめてから使ってください。",
    )
    return "\n\n".join(section for section in sections if section) + "\n"


def push_to_hub(folder, repo: str, dry_run: bool = True, public: bool = False) -> list[str]:
    """Send a folder's weights, tokenizer, figures and card to `repo` on the Hub; return the names of the
    files.

    The dry run, which is the default, only shows what would be sent. Rows and settings are never sent.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HTTPError
    from huggingface_hub.utils import validate_repo_id

    folder, card = Path(folder), make_model_card(folder)
    adapter = folder / "adapter_config.json"
    if adapter.is_file() and not _is_on_the_hub(json.loads(adapter.read_text())["base_model_name_or_path"]):
        raise UserError(
            "ベースモデルがこのマシンにしかないので、アダプターだけを公開しても、ほかの人は使えません。\n"
            "先に python -m dpo_helpers merge で一つのモデルにして、"
            "そのフォルダーを指定してください（ノートブックでは merge_adapter）。"
        )
    try:
        validate_repo_id(repo)
    except ValueError:
        raise UserError(
            f"リポジトリーの名前 {repo} は使えません。「ユーザー名/モデル名」の形に、"
            "英数字と - _ . で書いてください。"
        ) from None
    names = [
        CARD,
        *(
            path.name
            for path in sorted(folder.iterdir())
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in SHARED)
        ),
    ]
    kind = "公開" if public else "非公開（自分だけ）"
    print(f"送り先：https://huggingface.co/{repo}（{kind}）\n送るファイル：")
    for name in names:
        size = len(card.encode()) if name == CARD else (folder / name).stat().st_size
        print(f"  {name}（{size / 1e6:.2f} MB）")
    print(f"モデルカード（{CARD}）：\n{'-' * 40}\n{card}{'-' * 40}")
    if dry_run:
        print(
            "まだ何も送っていません。内容を読み、データの出どころを書き足す必要が"
            "ないか確かめてから、実際に送ってください。"
        )
        return names
    if get_token() is None:
        raise UserError(
            "Hugging Face のトークンがありません。https://huggingface.co/settings/tokens で "
            "Write の権限のトークンを作り、"
            "Colab では左の鍵の印（シークレット）に HF_TOKEN の名前で入れて、ほかでは hf "
            "auth login を実行してください。"
        )
    try:
        HfApi().create_repo(repo, private=not public, exist_ok=True)
        (folder / CARD).write_text(card, encoding="utf-8")
        HfApi().upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=names,
            commit_message="DPO で学習したモデルを追加",
        )
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise UserError(
                f"{repo} に書き込む権限がありません。トークンに Write の権限があるか、"
                "ユーザー名（または組織）が自分のものか確かめてください。"
            ) from None
        raise UserError(
            f"Hugging Face Hub がエラーを返しました（{error}）。少し待ってから、もう一度実行してください。"
        ) from error
    except (OSError, HTTPError) as error:
        raise UserError(
            f"Hugging Face Hub に送れませんでした（{error}）。ネットワークを確かめて、"
            "もう一度実行してください（送り終えた分は送り直しません）。"
        ) from error
    print(f"送りました：https://huggingface.co/{repo}")
    return names


LIMITS = "\n".join(
    (
        "- 小さなモデルなので、文の形が整っていても、**内容が正しいとは限りません**。"
        "事実の確認には使わないでください。",
        "- 損失と正解率は「二つの回答のうちどちらが良いか」を測ります。安全性、かたよりは測っていません。",
        "- 評価の行は、学習の行と同じデータから取り分けたものです。"
        "ほかの種類の質問での成績は測っていません。",
    )
)


def _public_name(name: str) -> str:
    """Return a model's name without the folders of this machine."""
    from dpo_helpers.model.embedded import EMBEDDED

    if name in EMBEDDED:
        return f"{name}（その場で作った小さな GPT-2）"
    return name if _is_on_the_hub(name) else Path(name).name


def _is_on_the_hub(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "~", "/")) and not Path(name).exists()


def _front_matter(name: str, merged: bool) -> str:
    base = [f"base_model: {name}"] if _is_on_the_hub(name) else []
    lines = [
        "language: ja",
        *base,
        f"library_name: {'transformers' if merged else 'peft'}",
        "pipeline_tag: text-generation",
    ]
    return "\n".join(
        [
            "---",
            *lines,
            "tags:",
            *(f"- {tag}" for tag in ("dpo", "trl", *(() if merged else ("lora",)))),
            "---",
        ]
    )


def _describe_method(config: RunConfig) -> str:
    warm_up = f"教師あり学習（{config.sft_epochs:g} エポック）と " if config.sft_epochs else ""
    return (
        f"{warm_up}DPO（Direct Preference Optimization、{config.num_train_epochs:g} "
        f"エポック、LoRA のランク {config.lora_rank}）"
    )


def _usage(base: str, merged: bool) -> str:
    if not (merged or _is_on_the_hub(base)):
        return (
            "ベースモデルが公開されていないので、このアダプターだけでは使えません。"
            "`python -m dpo_helpers merge` で一つのモデルにしてください。"
        )
    load = (
        ["model = AutoModelForCausalLM.from_pretrained(REPO)"]
        if merged
        else [f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), REPO)']
    )
    lines = [
        *([] if merged else ["from peft import PeftModel"]),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'REPO = "このリポジトリーの名前"',
        "tokenizer = AutoTokenizer.from_pretrained(REPO)",
        *load,
        'inputs = tokenizer("質問: AIとは何ですか？\\n回答:\\n'
        '", return_tensors="pt")  # 会話用の書式があれば apply_chat_template を使う',
        "ids = model.generate(**inputs, max_new_tokens=80, do_sample=False, "
        "pad_token_id=tokenizer.pad_token_id)",
        'print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return "\n".join(["```python", *lines, "```"])


def _describe_data(folder: Path) -> str:
    """Say how many rows there were; that they were generated only where generating them again gives every
    one of them.
    """
    from dpo_helpers.data.generate import generate_preferences

    files = [Path(folder) / name for name in ("train.jsonl", "held_out.jsonl")]
    if not all(file.is_file() for file in files):
        return "学習と評価に使った行は、このフォルダーには残っていません。"
    train, held_out = (
        [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files
    )
    config, columns = RunConfig.load(Path(folder) / "run_config.json"), ("prompt", "chosen", "rejected")
    generated = {
        tuple(row[name] for name in columns)
        for row in generate_preferences(config.num_samples, config.seed, config.held_out_fraction)
    }
    ours = all(tuple(row[name] for name in columns) in generated for row in train + held_out)
    source = (
        "概念と回答の表（AI、プログラミング、データサイエンス）から、プログラムで自動生成した行です。"
        if ours
        else "自動生成の行とは一致しません。出どころは、この記録からは分かりません。"
    )
    shared = {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    return (
        f"{source}学習 {len(train)} 行、評価 {len(held_out)} 行（両方にある質問："
        f"{len(shared)}）。行そのものは公開していません。"
    )


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
    figures += [
        (f"{label}（学習用の行）", f"{metrics[key]:.4f}")
        for key, label in (("first_loss", "最初の損失"), ("final_train_loss", "最後の 1 割の損失"))
        if key in metrics
    ]
    text = _table(("項目", "値"), figures)
    if baselines := metrics.get("rules"):
        rows = [(BASELINE_NAMES.get(name, name), f"{value:.1%}") for name, value in baselines.items()]
        text += "\n\n何も学ばない見分け方の正解率：\n\n" + _table(("見分け方", "正解率"), rows)
    return text


def _describe_verdict(verdict: dict | None) -> str:
    if not verdict:
        return ""
    return "\n".join(
        [
            f"## 自動の判定：{LABEL_NAMES[verdict['label']]}\n",
            *(f"- {reason}" for reason in verdict["reasons"]),
        ]
    )


def _describe_settings(config: RunConfig, metrics: dict, base: str) -> str:
    settings = [
        (f"`{name}`", base if name == "model_name" else value) for name, value in config.as_dict().items()
    ]
    versions = "、".join(f"{name} {number}" for name, number in metrics["versions"].items())
    return (
        f"{_table(('設定', '値'), settings)}\n\n計算装置：{metrics['device']}、精度："
        f"{metrics['precision']}。版：{versions}。"
    )
