"""Writes, copies and compares single files; a file that is there already is overwritten in place.

On Google Drive every file that is replaced, renamed or deleted goes to the bin and fills it.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path


def write_json(path, value) -> None:
    Path(path).write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def write_rows(path, rows: list[dict]) -> None:
    """Write rows as JSON Lines, UTF-8, one a line."""
    Path(path).write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )


def write_in_place(path: Path, source, mode: str | None = None) -> None:
    """Overwrite a file with what the binary stream `source` holds, down to the disk."""
    with open(path, mode or ("r+b" if path.exists() else "wb")) as file:
        shutil.copyfileobj(source, file)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())


def copy_file(source: Path, target: Path) -> None:
    """Copy a file over another and read it back; raises OSError where that does not work or does not match.

    Makes the target's folder, but never one above it: a lost mount would be replaced by a folder on this
    machine.
    """
    target.parent.mkdir(exist_ok=True)
    with open(source, "rb") as content:
        write_in_place(target, content)
    if hash_file(target) != hash_file(source):
        raise OSError(f"{source.name} の内容が一致しません")


def hash_file(path) -> str:
    """Return the SHA-256 of a file's content as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
