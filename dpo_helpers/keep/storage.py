"""Writes a run's folder, reads it back, and copies it elsewhere (zip, Google Drive) with a check of every
byte.
"""

import json
import os
import shutil
import zipfile
from pathlib import Path

from dpo_helpers.config import RunConfig
from dpo_helpers.errors import UserError
from dpo_helpers.files import copy_file, write_json, write_rows
from dpo_helpers.keep.run_lock import LOCK_NAME
from dpo_helpers.machine import in_colab

BASE_MODEL_FOLDER = "base_model"  # holds the embedded model, which no other machine could download
CHECKPOINTS = "checkpoints"  # the folder inside a run's folder that training goes on from
DRIVE_ROOT = Path("/content/drive")
FLUSH_SECONDS = 300  # Colab's own default is a day


def prepare_run_folder(folder: Path, config: RunConfig) -> None:
    """Make the folder for a run and write run_config.json."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config.save(folder / "run_config.json")
    except OSError as error:
        raise UserError(
            f"フォルダー {folder} に書き込めません（{error.strerror}）。"
            "書き込める場所を RUN_DIR に指定してください。"
        ) from None


def list_result_files(folder) -> list[Path]:
    """Return the files of a run's folder that are its result: without checkpoints and lock."""
    aside = {CHECKPOINTS, LOCK_NAME}
    return [
        path
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in aside
    ]


def save_model(folder, model, tokenizer) -> None:
    """Save the trained adapter (`default`) in the folder itself and, after a warm-up, the reference in
    `reference/`.

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
        name
        for name in ("adapter_config.json", "adapter_model.safetensors", "run_config.json")
        if not (folder / name).is_file()
    ]:
        raise UserError(
            f"フォルダー {folder} に学習済みモデルがありません（足りないもの："
            f"{', '.join(missing)}）。保存先のパスを確かめてください。"
        )
    own_base = folder / BASE_MODEL_FOLDER
    base = (
        own_base
        if own_base.is_dir()
        else json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, use_safetensors=True)
    model = PeftModel.from_pretrained(model, folder)
    if (folder / "reference").is_dir():
        model.load_adapter(folder / "reference", adapter_name="ref")
    return model, AutoTokenizer.from_pretrained(folder), RunConfig.load(folder / "run_config.json")


def make_zip(folder) -> Path:
    """Pack a run's result, without its checkpoints, into one zip beside its folder and return its path."""
    folder = Path(folder).resolve()
    archive = folder.with_name(f"{folder.name}.zip")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in list_result_files(folder):
            packed.write(path, path.relative_to(folder.parent))
    return archive


def download_file(path, wanted: bool) -> None:
    """Send a file to the user's own computer where Colab can; elsewhere say where it lies."""
    if wanted and in_colab():
        from google.colab import files

        files.download(str(path))
    else:
        print(f"ダウンロードはしていません。ファイルは {path} にあります。")


def mount_drive(wanted: bool, run_dir) -> Path | None:
    """Ask for Google Drive and return the folder there for this run, or None with a line that says why and
    what follows.

    A refusal is an answer: training goes on, and the result stays on this machine.
    """
    if not wanted:
        print(
            "Google Drive は使いません。結果はこのマシンの中だけに残るので、"
            "最後に zip をダウンロードしてください。"
        )
        return None
    if not in_colab():
        print("Colab ではないので Google Drive は使いません。結果はこのマシンのフォルダーに残ります。")
        return None
    if not os.path.isdir(DRIVE_ROOT / "MyDrive"):  # mount() asks for consent even where it is mounted already
        from google.colab import drive

        try:
            drive.mount(str(DRIVE_ROOT))
        # google.colab raises MessageError, ValueError and NotImplementedError: all mean "no Drive"
        except Exception as error:
            print(f"Google Drive に接続できませんでした（{error}）。学習はこのまま続けられます。")
            print(
                "使いたい場合はこのセルをもう一度実行して許可してください。"
                "使わない場合は最後に zip をダウンロードしてください。"
            )
            return None
    folder = DRIVE_ROOT / "MyDrive" / "dpo_runs" / Path(run_dir).name
    print(f"Google Drive に接続しました。途中経過と結果は マイドライブ/dpo_runs/{folder.name} に保存します。")
    return folder


def unmount_drive(wanted: bool) -> None:
    """Flush what is written to Google Drive and let go of it, where that is wanted and Drive is there."""
    if not (wanted and in_colab() and os.path.isdir(DRIVE_ROOT / "MyDrive")):
        return
    from google.colab import drive

    try:
        drive.flush_and_unmount(timeout_ms=FLUSH_SECONDS * 1000)
    except Exception as error:  # ValueError after the time, NotImplementedError where it is not supported
        print(
            f"Google Drive への送信が終わったことを確かめられませんでした（{error}）。"
            "送信は裏で続いているかもしれません。"
        )
        print(
            "ランタイムを閉じる前に、ブラウザーの Google Drive に新しいファイルがあることを"
            "確かめるか、zip をダウンロードしてください。"
        )
    else:
        print("Google Drive への書き込みをすべて終え、切り離しました。")


def choose_data_file(path: str, upload: bool, mirror: Path | None) -> str:
    """Return the user's own file: an uploaded one, kept on Drive where that is connected, else what the form
    says ("" for none).

    A machine that is lost takes the upload with it: without a copy the run could not go on elsewhere.
    """
    if not upload:
        return path.strip()
    if not in_colab():
        raise UserError(
            "アップロードは Colab だけで使えます。UPLOAD_FILE をオフにして、"
            "DATA_FILE にファイルのパスを書いてください。"
        )
    from google.colab import files

    uploaded = files.upload()
    if len(uploaded) != 1:
        raise UserError(
            f"ファイルを一つ選んでください（選ばれた数：{len(uploaded)}）。"
            "使わない場合は UPLOAD_FILE をオフにしてください。"
        )
    [(name, content)] = uploaded.items()
    Path(name).write_bytes(
        content
    )  # upload() leaves an older file of this name alone and saves as "name (1)"
    if mirror is None:
        return name
    kept = mirror.parent / "data" / name
    try:
        copy_file(Path(name), kept)
    except OSError as error:
        print(
            f"Google Drive に写しを置けませんでした（{error}）。切断に備えて、"
            "元のファイルを手元に残しておいてください。"
        )
        return name
    print(f"写しを {kept} に置きました。次からは UPLOAD_FILE をオフにして、DATA_FILE にこのパスを書けます。")
    return str(kept)


def copy_run(folder, target) -> bool:
    """Copy a run's result into `target`, its folder on Drive, and compare every file; return whether all of
    it is there.

    Files are overwritten in place: nothing is deleted or renamed, so nothing fills Drive's bin.
    """
    folder, target = Path(folder), Path(target)
    files = list_result_files(folder)
    try:
        target.mkdir(exist_ok=True)
        for path in files:
            copy_file(path, target / path.relative_to(folder))
    except OSError as error:
        print(
            f"{target} へコピーできませんでした（{error}）。結果は {folder} に残っています。"
            "zip をダウンロードしてください。"
        )
        return False
    print(f"{target} に {len(files)} 個のファイルを保存し、内容が一致することを確かめました。")
    return True


def save_run(run, train_rows, held_out_rows, trainer, metrics: dict) -> list[str]:
    """Complete a run's folder: adapter, tokenizer, rows, logs, and metrics last; return the names of its
    files.
    """
    folder = run.folder
    with run.clock("saving"):
        write_rows(folder / "train.jsonl", train_rows)
        write_rows(folder / "held_out.jsonl", held_out_rows)
        _save_training(folder, trainer, trainer.state.log_history, run.progress.sft_log)
    metrics["seconds"]["saving"] = run.clock.seconds["saving"]
    write_json(folder / "metrics.json", metrics)  # last: a folder with metrics is a finished one
    return [str(path.relative_to(folder)) for path in list_result_files(folder)]


def save_stopped(run, trainer, log_history: list[dict], sft_log_history: list[dict], metrics: dict) -> None:
    """Save what there is of a run that ended early: the adapter as it is, the logs so far, metrics."""
    _save_training(run.folder, trainer, log_history, sft_log_history)
    write_json(run.folder / "metrics.json", metrics)


def _save_training(folder: Path, trainer, log_history: list[dict], sft_log_history: list[dict]) -> None:
    save_model(folder, trainer.model, trainer.processing_class)
    write_json(folder / "log_history.json", log_history)
    write_json(folder / "sft_log_history.json", sft_log_history)
