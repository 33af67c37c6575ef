"""Saves a run's result whole, loads it, repairs and delivers it, and packs it without the machine's paths."""

import hashlib
import json
import shutil
from pathlib import Path

from dpo_helpers.config import RunConfig
from dpo_helpers.errors import UserError
from dpo_helpers.files import (
    dump_json,
    exists,
    merge_lines,
    patiently,
    read_bytes,
    tell_full_disk,
    write_json,
    write_rows,
)
from dpo_helpers.folders import (
    MANIFEST,
    copy_in_place,
    copy_whole,
    move_over,
    verify_folder,
    write_manifest,
    write_zip,
)
from dpo_helpers.judge.public import make_public
from dpo_helpers.model.adapters import WEIGHTS, load_adapted

VOTES = ("votes.jsonl", "votes_without_row.jsonl")  # they only grow, and are no part of the manifest
BASE_MODEL = "base_model"  # holds the embedded model, which no other machine could download
SAVE_AGAIN = "保存のセル（ターミナルでは同じ train）をもう一度実行してください。"


def save_model(folder: Path, model, tokenizer) -> None:
    """Save the trained adapter (`default`) in the folder itself and, after a warm-up, `ref` in `reference/`.

    The folder is a new one: what a library writes replaces nothing of the user's.
    """
    model.save_pretrained(folder, selected_adapters=["default"])
    if "ref" in model.peft_config:
        model.save_pretrained(folder, selected_adapters=["ref"])
        (folder / "ref").rename(folder / "reference")
    tokenizer.save_pretrained(folder)
    (folder / "README.md").unlink()  # PEFT's model card to be filled in, which nobody has filled in


def save_run(run, trainer, metrics: dict, logs: tuple, rows: tuple = (), draw=None) -> list[str]:
    """Write a run's result beside its folder, then move it in, its manifest last; return the files' names.

    `logs` are those of DPO and of the warm-up, `rows` those of both sides; `draw` gets the path of a picture.
    """
    aside, base = run.checkpoints / "writing-result", run.find_base()
    with tell_full_disk(run.folder, "結果"):
        with run.clock("saving"):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            save_model(aside, trainer.model, trainer.processing_class)
            if base is not None:  # it exists nowhere else
                shutil.copytree(base, aside / BASE_MODEL)
                for path in aside.rglob("adapter_config.json"):
                    place = {"base_model_name_or_path": str(run.folder.resolve() / BASE_MODEL)}
                    write_json(path, json.loads(path.read_text(encoding="utf-8")) | place)
            for name, side in zip(("train.jsonl", "held_out.jsonl"), rows, strict=False):
                write_rows(aside / name, side)
            for name, log in zip(("log_history.json", "sft_log_history.json"), logs, strict=True):
                write_json(aside / name, log)
            if draw:
                draw(aside / "training")
            run.config.save(aside / "run_config.json")
        metrics["seconds"]["saving"] = run.clock.seconds["saving"]
        metrics["rows_generated"] = run.progress.generated
        write_json(aside / "metrics.json", metrics)
        write_manifest(aside, identity=run.progress.identity)
        names = sorted(verify_folder(aside)["files"])
        move_over(aside, run.folder)
    return names


def read_result(folder: Path, mirror: Path | None) -> dict | None:
    """Return metrics.json of a finished result, fetched from the mirror if it is not whole here, or None."""
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
    """Bring votes and a whole result to the mirror; say what was done and return whether all is there."""
    try:
        deliver_votes(folder, mirror)
        if (manifest := verify_folder(folder)) is None:
            print(f"{folder} の結果が書きかけか壊れているので、{mirror} には書きません。{SAVE_AGAIN}")
            return False
        if patiently(verify_folder, mirror) != manifest:
            copy_in_place(folder, mirror)
    except OSError as error:
        print(f"{mirror} へコピーできませんでした（{error}）。")
        print(f"結果は {folder} に残っています。zip をダウンロードしてください。")
        return False
    print(f"{mirror} に {len(manifest['files'])} 個のファイルがあり、内容が一致することを確かめました。")
    return True


def deliver_votes(folder: Path, mirror: Path, send: bool = True) -> None:
    """Let the folder hold all votes of both places, and the mirror too if `send`."""
    for name in VOTES:
        merge_lines(folder / name, mirror / name, send)


def load_run(folder):
    """Return (PeftModel, tokenizer, RunConfig) of a saved run, ready to answer and to be measured.

    A warmed-up reference, where the run has one, is loaded beside the trained adapter under the name `ref`.
    """
    from dpo_helpers.model.load import find_model, load_tokenizer, load_weights

    folder = Path(folder)
    needed = ("adapter_config.json", WEIGHTS, "run_config.json")
    if missing := ", ".join(name for name in needed if not exists(folder / name)):
        raise UserError(
            f"フォルダ {folder} に学習済みモデルがありません（足りないもの：{missing}）。"
            "保存先のパスを確かめてください。"
        )
    config, base = RunConfig.load(folder / "run_config.json"), folder / BASE_MODEL
    model = load_weights(base if base.is_dir() else find_model(config.model_name), config.model_name)
    return load_adapted(model, folder), load_tokenizer(str(folder)), config


def make_zip(folder) -> Path:
    """Pack a run's whole result into one zip beside its folder and return its path; replace no other file."""
    folder = Path(folder).resolve()
    if (manifest := verify_folder(folder)) is None:
        raise UserError(f"{folder} の結果が書きかけか壊れています。{SAVE_AGAIN}")
    files = {name: make_public(folder, name) for name in manifest["files"]}
    listed = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in files.items()}
    files[MANIFEST] = dump_json(manifest | {"files": listed})
    files |= {name: content for name in VOTES if (content := read_bytes(folder / name)) is not None}
    with tell_full_disk(folder, " zip "):
        return write_zip(folder, files)
