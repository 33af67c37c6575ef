"""Reads and writes single files; nothing here knows what is in them.

A file on this machine is written aside and renamed, so that it is whole or not there. On Google Drive, where
what is renamed or deleted fills the bin, files are overwritten in place and read back.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

from dpo_helpers.errors import UserError


def read_json(path, what: str):
    """Return what a JSON file holds, with or without a byte order mark; `what` names it in the UserError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{what} {path} が見つかりません。パスを確かめてください。") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{what} {path} を読めません（{error}）。JSON の書き方を確かめてください。") from None


def read_rows(path, what: str) -> list[dict]:
    """Return the objects of a JSON Lines file; a line ends at "\\n" alone, since texts may hold U+2028."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines if line.strip()]
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{what} {path} を読めません（{error}）。壊れていないか確かめてください。") from None


def write_whole(path, text: str) -> None:
    """Write a text file aside, down to the disk, and rename it: a process killed meanwhile leaves no half
    of it.
    """
    aside = Path(f"{path}.new")
    with open(aside, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def write_json(path, value) -> None:
    write_whole(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_rows(path, rows: list[dict]) -> None:
    """Write rows as JSON Lines, UTF-8, one a line."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


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
