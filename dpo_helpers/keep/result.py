"""Saves a run's result whole, loads it, repairs and delivers it, and packs it as a zip without the machine's paths."""

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

from dpo_helpers.config import RunConfig
from dpo_helpers.data.generate import SIDES
from dpo_helpers.errors import UserError
from dpo_helpers.files import (
    MANIFEST,
    copy_in_place,
    copy_whole,
    exists,
    merge_lines,
    move_over,
    patiently,
    read_bytes,
    read_json,
    tell_full_disk,
    verify_folder,
    write_json,
    write_manifest,
    write_rows,
)
from dpo_helpers.keep.checkpoints import WEIGHTS, find_different_adapters
from dpo_helpers.machine import in_colab

GROWING = ("votes.jsonl", "votes_without_row.jsonl")  # never shortened, and no part of the manifest
BASE_MODEL = "base_model"  # holds the embedded model, which no other machine could download
ZIP_MARK = b"dpo_helpers"


def save_model(folder: Path, model, tokenizer, base: Path | None = None) -> None:
    """Save the trained adapter (`default`) in the new folder itself and, after a warm-up, the reference in `reference/`.

    The base is not copied, except for the embedded model, `base`: it exists nowhere else.
    """
    model.save_pretrained(folder, selected_adapters=["default"])
    if "ref" in model.peft_config:
        model.save_pretrained(folder, selected_adapters=["ref"])
        (folder / "ref").rename(folder / "reference")
    tokenizer.save_pretrained(folder)
    (folder / "README.md").unlink()  # PEFT's model card to be filled in, which nobody has filled in
    if base is not None:
        shutil.copytree(base, folder / BASE_MODEL)
    for path in folder.glob("**/adapter_config.json"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        name = BASE_MODEL if base else hide_path(settings["base_model_name_or_path"])
        write_json(path, settings | {"base_model_name_or_path": name})


def save_run(run, trainer, metrics: dict, logs: tuple, rows: tuple = (), draw=None) -> list[str]:
    """Write a run's result beside its folder, then move it in, its manifest last; return the names of its files.

    `logs` are those of DPO and of the warm-up, `rows` those of both sides; `draw` gets the path of a picture.
    """
    aside = run.checkpoints / "writing-result"
    with tell_full_disk(run.folder, "結果"), run.clock("saving"):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_model(aside, trainer.model, trainer.processing_class, run.find_base())
        for name, side in zip(("train.jsonl", "held_out.jsonl"), rows, strict=False):
            write_rows(aside / name, side)
        for name, log in zip(("log_history.json", "sft_log_history.json"), logs, strict=True):
            write_json(aside / name, log)
        if draw:
            draw(aside / "training")
        run.config.save(aside / "run_config.json")
    with tell_full_disk(run.folder, "結果"):
        metrics["seconds"]["saving"] = run.clock.seconds["saving"]
        write_json(aside / "metrics.json", metrics | {"rows_generated": run.progress.generated})
        write_manifest(aside, identity=run.progress.identity)
        names = sorted(verify_folder(aside)["files"])
        move_over(aside, run.folder)
    return names


def read_result(folder: Path, mirror: Path | None) -> dict | None:
    """Return metrics.json of a finished result that is whole, fetched from the mirror where it is not; else None."""
    if patiently(verify_folder, folder) is None:
        if exists(folder / MANIFEST):
            print(f"{folder} の結果は書きかけか壊れているので、コピーかチェックポイントから作り直します。")
        if mirror is None or patiently(verify_folder, mirror) is None:
            return None
        copy = folder / "fetched"
        shutil.rmtree(copy, ignore_errors=True)
        patiently(copy_whole, mirror, copy)
        move_over(copy, folder)
    metrics = json.loads(patiently(read_bytes, folder / "metrics.json"))
    return None if "stopped" in metrics else metrics


def deliver_result(folder: Path, mirror: Path) -> bool:
    """Bring a whole result to the mirror, and what only grows; say what was done and return whether it is there."""
    try:
        deliver_votes(folder, mirror)
        if (manifest := verify_folder(folder)) is None:
            print(f"{folder} の結果が壊れているので、{mirror} には書きません。保存のセルをもう一度実行してください。")
            return False
        if patiently(verify_folder, mirror) != manifest:
            copy_in_place(folder, mirror)
    except OSError as error:
        print(f"{mirror} へコピーできませんでした（{error}）。結果は {folder} に残っています。zip をダウンロードしてください。")
        return False
    print(f"{mirror} に {len(manifest['files'])} 個のファイルがあり、内容が一致することを確かめました。")
    return True


def deliver_votes(folder: Path, mirror: Path, send: bool = True) -> None:
    """Let the folder hold all votes of both places, and the mirror too if `send`."""
    for name in GROWING:
        merge_lines(folder / name, mirror / name, send)


def load_run(folder):
    """Return (PeftModel, tokenizer, RunConfig) of a saved run, ready to answer and to be measured.

    A warmed-up reference, where the run has one, is loaded beside the trained adapter under the name `ref`.
    """
    from peft import PeftModel

    from dpo_helpers.model.load import find_model, load_tokenizer, load_weights

    folder = Path(folder)
    needed = ("adapter_config.json", WEIGHTS, "run_config.json")
    if missing := [name for name in needed if not exists(folder / name)]:
        raise UserError(
            f"フォルダ {folder} に学習済みモデルがありません（足りないもの：{', '.join(missing)}）。"
            "保存先のパスを確かめてください。"
        )
    config, base = RunConfig.load(folder / "run_config.json"), folder / BASE_MODEL
    model = load_weights(base if base.is_dir() else find_model(config.model_name), config.model_name)
    references = [folder / "reference"] if exists(folder / "reference" / WEIGHTS) else []
    try:
        model = PeftModel.from_pretrained(model, folder, use_safetensors=True)
        for reference in references:
            model.load_adapter(reference, adapter_name="ref", use_safetensors=True)
        fits = not find_different_adapters(model, folder)
    except Exception as error:  # whatever PEFT and safetensors make of a damaged or foreign adapter
        raise UserError(f"{folder} のアダプターを読めません（{error}）。保存し直してください。") from error
    if not fits:
        raise UserError(f"{folder} のアダプターの重みの名前が、ベースモデルと合いません。別のモデルのものです。")
    return model, load_tokenizer(str(folder)), config


# What may leave the machine


def hide_path(name: str) -> str:
    """Return a model's name; of a folder of this machine its last part alone."""
    return Path(name).name if Path(name).is_absolute() or name.startswith(("~", ".")) else name


def make_public(folder: Path, name: str) -> bytes:
    """Return a result's file as it may leave the machine: no path of it, and no columns of the user's own rows."""
    content = (folder / name).read_bytes()
    own = not read_json(folder / "metrics.json", "学習の記録").get("rows_generated")
    if name == "run_config.json":
        values = json.loads(content)
        return _dump(values | {"model_name": hide_path(values["model_name"])})
    if name == "metrics.json" and own:
        return _dump(hide_values(json.loads(content)))
    if name in ("train.jsonl", "held_out.jsonl") and own:
        rows = [json.loads(line) for line in content.decode().split("\n") if line]
        public = [{key: row[key] for key in ("prompt", *SIDES)} for row in rows]
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in public).encode()
    return content


def hide_values(metrics: dict) -> dict:
    """Return metrics without the values of the user's columns, also where the verdict names them."""
    apart = {key: lines for key, lines in metrics.items() if key.startswith("by_")}
    values = {str(line[key.removeprefix("by_")]) for key, lines in apart.items() for line in lines}
    kept = {key: value for key, value in metrics.items() if key not in apart}
    if verdict := kept.get("verdict"):
        reasons = [text for text in verdict["reasons"] if not any(value in text for value in values)]
        kept["verdict"] = verdict | {"reasons": reasons}
    return kept


def _dump(value) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()


def make_zip(folder) -> Path:
    """Pack a run's whole result into one zip beside its folder and return its path; no other file is replaced."""
    folder = Path(folder).resolve()
    if (manifest := verify_folder(folder)) is None:
        raise UserError(f"{folder} の結果が書きかけか壊れています。保存のセルをもう一度実行してください。")
    archive, number = folder.with_name(f"{folder.name}.zip"), 1
    while exists(archive) and not _is_our_zip(archive):
        number += 1
        archive = folder.with_name(f"{folder.name}-{number}.zip")
    aside, names = folder / "zip.partial", [*manifest["files"], *GROWING]
    files = {name: make_public(folder, name) for name in names if exists(folder / name)}
    listed = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in files.items()}
    files[MANIFEST] = _dump(manifest | {"files": {n: e for n, e in listed.items() if n not in GROWING}})
    with tell_full_disk(folder, " zip "):
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as packed:
            packed.comment = ZIP_MARK
            for name, content in files.items():
                packed.writestr(f"{folder.name}/{name}", content)
        aside.replace(archive)
    return archive


def _is_our_zip(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as packed:
            return packed.comment == ZIP_MARK
    except (zipfile.BadZipFile, OSError):
        return False


def download_file(path, wanted: bool, kept: bool = False) -> None:
    """Send a file to the user's own computer where Colab can; else say how, unless the result is `kept` elsewhere."""
    if wanted and in_colab():
        from google.colab import files

        files.download(str(path))
    elif in_colab() and not kept:
        print(f"⚠️ 結果はこのマシンの {path} にしかありません。このマシンはしばらくすると消えます。")
        print('今すぐ、MORE = {"download_zip": True} として設定のセルとこのセルを実行するか、')
        print("左のファイル一覧でこのファイルの ⋮ から「ダウンロード」を選んでください。")
    else:
        print(f"ダウンロードはしていません。ファイルは {path} にあります。")
