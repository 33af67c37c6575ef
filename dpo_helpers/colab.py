"""What google.colab offers: Google Drive, a file from the user's own computer, and one to it."""

import os
from pathlib import Path

from dpo_helpers.errors import UserError
from dpo_helpers.files import copy_file, read_bytes
from dpo_helpers.machine import in_colab

DRIVE_ROOT = Path("/content/drive")
FLUSH_SECONDS = 300  # Colab's own default is a day


def mount_drive(wanted: bool, run_dir) -> Path | None:
    """Ask for Google Drive and return the folder there for this run, or None with a line that says why.

    A refusal is an answer: training goes on, and the result stays on this machine.
    """
    last = "このマシンはあとで消えるので、最後に zip をダウンロードしてください。"
    if not in_colab():
        print("Colab ではないので Google Drive は使いません。結果はこのマシンのフォルダに残ります。")
        return None
    if not wanted:
        print(f"Google Drive は使いません。{last}")
        return None
    if not os.path.isdir(DRIVE_ROOT / "MyDrive"):  # mount() asks for consent even where it is mounted already
        from google.colab import drive

        try:
            drive.mount(str(DRIVE_ROOT))
        except Exception as error:  # MessageError, ValueError, NotImplementedError: all mean "no Drive"
            print(f"Google Drive に接続できませんでした（{error}）。学習はこのまま続けられます。")
            print("使うなら、このセルをもう一度実行して許可し、次のデータのセルも順に実行してください。")
            print(f"使わないなら、{last}")
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
        print(f"Google Drive への送信が終わったことを確かめられませんでした（{error}）。")
        print("ブラウザの Google Drive に新しいファイルがあるか確かめるか、zip をダウンロードしてください。")
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
            "アップロードは Colab だけで使えます。"
            "UPLOAD_FILE をオフにして、DATA_FILE にファイルのパスを書いてください。"
        )
    from google.colab import files

    uploaded = files.upload()
    if len(uploaded) != 1:
        raise UserError(
            f"ファイルを一つ選んでください（選ばれた数：{len(uploaded)}）。"
            "使わない場合は UPLOAD_FILE をオフにしてください。"
        )
    [(name, content)] = uploaded.items()
    own = _find_free_name(Path(Path(name).name), content)
    own.write_bytes(content)
    try:
        if mirror is None:
            return str(own)
        kept = _find_free_name(mirror.parent / "data" / own.name, content)
        copy_file(own, kept)
    except OSError as error:
        print(f"Google Drive にコピーできませんでした（{error}）。元のファイルを手元に残してください。")
        return str(own)
    print(
        f"コピーを {kept} に置きました。次からは UPLOAD_FILE をオフにして、DATA_FILE にこのパスを書けます。"
    )
    return str(kept)


def _find_free_name(path: Path, content: bytes) -> Path:
    """Return the path, or its first numbered sister, where nothing or this very content lies."""
    number, free = 0, path
    while (there := read_bytes(free)) is not None and there != content:
        number += 1
        free = path.with_name(f"{path.stem} ({number}){path.suffix}")
    return free


def download_file(path, wanted: bool, kept: bool = False) -> None:
    """Send a file to the user's own computer where Colab can; else say how, unless it is `kept` elsewhere."""
    if wanted and in_colab():
        from google.colab import files

        files.download(str(path))
    elif in_colab() and not kept:
        print(f"⚠️ 結果はこのマシンの {path} にしかありません。このマシンはしばらくすると消えます。")
        print('今すぐ、MORE = {"download_zip": True} として設定のセルとこのセルを実行するか、')
        print("左のファイル一覧でこのファイルの ⋮ から「ダウンロード」を選んでください。")
    else:
        print(f"ダウンロードはしていません。ファイルは {path} にあります。")
