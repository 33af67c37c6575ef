"""Writes a run's folder, reads it back, and copies it elsewhere (zip, Google Drive) with a check of every byte."""

import hashlib
import json
import shutil
from pathlib import Path

from dpo_helpers.config import RunConfig, UserError
from dpo_helpers.environment import in_colab

BASE_MODEL_FOLDER = "base_model"  # holds the embedded model, which no other machine could download
DRIVE_ROOT = Path("/content/drive")


def prepare_run_folder(folder, config: RunConfig) -> Path:
    """Make the folder for a run and write run_config.json; refuse one that holds a run with another configuration."""
    folder = Path(folder)
    existing = folder / "run_config.json"
    if existing.is_file() and (different := RunConfig.load(existing).differences(config)):
        raise UserError(
            f"フォルダー {folder} には別の設定の結果があるので、上書きしません。違い：{'、'.join(different)}\n"
            "別の名前（例：run-2）を RUN_DIR に書くか、このフォルダーの名前を変えてから、もう一度実行してください。"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config.save(existing)
    except OSError as error:
        raise UserError(
            f"フォルダー {folder} に書き込めません（{error.strerror}）。書き込める場所を RUN_DIR に指定してください。"
        ) from None
    return folder


def write_json(path, value) -> None:
    Path(path).write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def write_rows(path, rows: list[dict]) -> None:
    """Write rows as JSON Lines, UTF-8, one a line."""
    Path(path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def save_model(folder, model, tokenizer) -> None:
    """Save the trained adapter (`default`) in the folder itself and, after a warm-up, the reference in `reference/`.

    The base is not copied, except for the embedded model: it exists nowhere else.
    """
    folder, adapter = Path(folder), model.peft_config["default"]
    base = Path(adapter.base_model_name_or_path)
    if base.is_dir() and base.name.startswith("embedded-"):
        copy = folder / BASE_MODEL_FOLDER
        shutil.copytree(base, copy, dirs_exist_ok=True)
        for settings in model.peft_config.values():
            settings.base_model_name_or_path = str(copy.resolve())
    model.save_pretrained(folder, selected_adapters=["default"])
    if "ref" in model.peft_config:
        model.save_pretrained(folder, selected_adapters=["ref"])
        shutil.copytree(folder / "ref", folder / "reference", dirs_exist_ok=True)
        shutil.rmtree(folder / "ref")
    tokenizer.save_pretrained(folder)
    (folder / "README.md").unlink()  # PEFT's model card to be filled in, which nobody has filled in


def load_run(folder):
    """Return (PeftModel, tokenizer, RunConfig) of a saved run, ready to answer and to be measured.

    A warmed-up reference, where the run has one, is loaded beside the trained adapter under the name `ref`.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(folder)
    if missing := [
        name for name in ("adapter_config.json", "adapter_model.safetensors", "run_config.json") if not (folder / name).is_file()
    ]:
        raise UserError(
            f"フォルダー {folder} に学習済みモデルがありません（足りないもの：{', '.join(missing)}）。保存先のパスを確かめてください。"
        )
    own_base = folder / BASE_MODEL_FOLDER
    base = own_base if own_base.is_dir() else json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, use_safetensors=True)
    model = PeftModel.from_pretrained(model, folder)
    if (folder / "reference").is_dir():
        model.load_adapter(folder / "reference", adapter_name="ref")
    return model, AutoTokenizer.from_pretrained(folder), RunConfig.load(folder / "run_config.json")


def make_zip(folder) -> Path:
    """Pack a run's folder, without the trainers' working files, into one zip beside it and return its path."""
    folder = Path(folder).resolve()
    return Path(shutil.make_archive(str(folder), "zip", root_dir=folder.parent, base_dir=folder.name))


def download_file(path, wanted: bool) -> None:
    """Send a file to the user's own computer where Colab can; elsewhere say where it lies."""
    if wanted and in_colab():
        from google.colab import files

        files.download(str(path))
    else:
        print(f"ダウンロードはしていません。ファイルは {path} にあります。")


def mount_drive(wanted: bool) -> Path | None:
    """Ask for Google Drive and return the folder for copies of runs, or None with a line that says why and what follows.

    A refusal is an answer: training goes on, and the result stays on this machine.
    """
    if not wanted:
        print("Google Drive は使いません。結果はこのマシンの中だけに残るので、最後に zip をダウンロードしてください。")
        return None
    if not in_colab():
        print("Colab ではないので Google Drive は使いません。結果はこのマシンのフォルダーに残ります。")
        return None
    if not (DRIVE_ROOT / "MyDrive").is_dir():  # mount() asks for consent even where it is mounted already
        from google.colab import drive

        try:
            drive.mount(str(DRIVE_ROOT))
        except Exception as error:  # google.colab raises MessageError, ValueError and NotImplementedError: all mean "no Drive"
            print(f"Google Drive に接続できませんでした（{error}）。学習はこのまま続けられます。")
            print("使いたい場合はこのセルをもう一度実行して許可してください。使わない場合は最後に zip をダウンロードしてください。")
            return None
    print("Google Drive に接続しました。結果は マイドライブ/dpo_runs に保存します。")
    return DRIVE_ROOT / "MyDrive" / "dpo_runs"


def copy_run(folder, target_root) -> Path | None:
    """Copy a run's folder under `target_root` and compare every file; return the copy, or None with a line on what failed.

    An existing copy of another run is kept: the new one gets the next free number.
    """
    folder, target_root = Path(folder), Path(target_root)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    try:
        target = _free_name(target_root, folder)
        for path in files:
            copy = target / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            if hash_file(copy) != hash_file(path):
                raise OSError(f"{path.name} の内容が一致しません")
    except OSError as error:
        print(f"{target_root} へコピーできませんでした（{error}）。結果は {folder} に残っています。zip をダウンロードしてください。")
        return None
    print(f"{target} に {len(files)} 個のファイルを保存し、内容が一致することを確かめました。")
    return target


def _free_name(root: Path, folder: Path) -> Path:
    """Return root/name, or root/name-2 and so on where that name belongs to a run with another configuration."""
    number = 1
    while True:
        target = root / (folder.name if number == 1 else f"{folder.name}-{number}")
        if not (target / "run_config.json").is_file() or hash_file(target / "run_config.json") == hash_file(folder / "run_config.json"):
            return target
        number += 1


def hash_file(path) -> str:
    """Return the SHA-256 of a file's content as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_run(folder, model, tokenizer, train_rows, held_out_rows, log_history, sft_log_history, metrics) -> list[str]:
    """Complete a run's folder: adapter, tokenizer, rows, logs, metrics and plot; return the names of its files."""
    from dpo_helpers.monitoring import plot_training

    folder = Path(folder)
    save_model(folder, model, tokenizer)
    write_rows(folder / "train.jsonl", train_rows)
    write_rows(folder / "held_out.jsonl", held_out_rows)
    write_json(folder / "log_history.json", log_history)
    write_json(folder / "sft_log_history.json", sft_log_history)
    plot_training(log_history, folder / "training.png")
    write_json(folder / "metrics.json", metrics)  # last: a folder with metrics is a finished one
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
