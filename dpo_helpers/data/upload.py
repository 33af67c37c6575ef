"""Takes a file of the user's own computer into Colab, and keeps it on Google Drive; it does not read its rows."""

from pathlib import Path

from dpo_helpers.errors import UserError
from dpo_helpers.files import copy_file, read_bytes
from dpo_helpers.machine import in_colab


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
        print(f"Google Drive にコピーできませんでした（{error}）。切断に備えて、元のファイルを手元に残してください。")
        return str(own)
    print(f"コピーを {kept} に置きました。次からは UPLOAD_FILE をオフにして、DATA_FILE にこのパスを書けます。")
    return str(kept)


def _find_free_name(path: Path, content: bytes) -> Path:
    """Return the path, or its first numbered sister, where nothing or this very content lies."""
    number, free = 0, path
    while (there := read_bytes(free)) is not None and there != content:
        number += 1
        free = path.with_name(f"{path.stem} ({number}){path.suffix}")
    return free
