"""Reads and writes single files, and says what a disk that fails did; nothing here knows what is in them.

On this machine a file is written aside and renamed, so that it is whole or not there. On Google Drive, where
what is renamed or deleted fills the bin, files are overwritten in place and read back. "Not found" alone is
absent: every other error is raised, so that nobody takes for missing what could only not be read.
"""

import errno
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path

from dpo_helpers.errors import UserError

PATIENCE_SECONDS = 10  # how long a read that fails is tried again: a busy mount answers after a few seconds
ABSENT = (FileNotFoundError, NotADirectoryError)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LITTLE_SPACE = (
    20_000_000  # bytes: with less than a small checkpoint left, a failed write is taken for a full disk
)
# How libraries word a disk that took no more: safetensors, torch, Python.
FULL_TEXTS = ("os error 28", "os error 122", "os error 27", "No space left", "PytorchStreamWriter failed")


class MismatchError(OSError):
    """What was read back differs from what was written."""


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


def read_bytes(path) -> bytes | None:
    """Return a file's content, or None where there is no such file; any other error is raised."""
    try:
        return Path(path).read_bytes()
    except ABSENT:
        return None


def exists(path) -> bool:
    """Tell whether there is something at a path; Path.exists() would call an unreadable one absent."""
    try:
        os.lstat(path)
    except ABSENT:
        return False
    return True


def list_names(folder) -> list[str]:
    """Return the sorted names in a folder, none where there is no folder."""
    try:
        return sorted(os.listdir(folder))
    except ABSENT:
        return []


def patiently(read, *arguments):
    """Return `read(*arguments)`, tried again for ten seconds where it fails; "not found" is an answer."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return read(*arguments)
        except OSError as error:
            if isinstance(error, ABSENT) or time.monotonic() >= end:
                raise
        time.sleep(0.3)


def write_whole(path, content: str | bytes) -> None:
    """Write a file aside, down to the disk, and rename it: a process that is killed leaves no half of it."""
    aside = Path(f"{path}.new")
    try:
        with open(aside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        with suppress(OSError):
            aside.unlink()
        raise


def dump_json(value) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()


def write_json(path, value) -> None:
    write_whole(path, dump_json(value))


def write_rows(path, rows: list[dict]) -> None:
    """Write rows as JSON Lines, UTF-8, one a line."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_in_place(path: Path, source) -> None:
    """Overwrite a file with what the binary stream `source` holds, down to the disk."""
    with open(path, "r+b" if exists(path) else "wb") as file:
        shutil.copyfileobj(source, file)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())


def copy_file(source: Path, target: Path) -> None:
    """Copy a file over another and read it back; OSError where that does not work or does not match.

    Makes the target's folder, but never one above it: a folder of this machine would replace a lost mount.
    """
    target.parent.mkdir(exist_ok=True)
    with open(source, "rb") as content:
        write_in_place(target, content)
    if hash_file(target) != hash_file(source):
        raise MismatchError(f"{source.name} の内容が一致しません")


def hash_file(path) -> str:
    """Return the SHA-256 of a file's content as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_rows(*sides: list[dict]) -> str:
    """Return a hash of rows, side by side and in their order."""
    digest = hashlib.sha256()
    for rows in sides:
        for row in rows:
            digest.update(json.dumps(row, ensure_ascii=False, sort_keys=True).encode())
        digest.update(b"\0")
    return digest.hexdigest()


# Files that only grow


def read_lines(path) -> list[bytes]:
    """Return a file's lines without their ends; of a last line that was cut off nothing."""
    *lines, last = (read_bytes(path) or b"").split(b"\n")
    with suppress(ValueError, RecursionError):
        lines += [last] if json.loads(last or b"!") else []
    return [line for line in lines if line.strip()]


def merge_lines(here: Path, there: Path, send: bool) -> None:
    """Let `here` hold every line of both files, and `there` too if `send`: neither is ever shortened.

    Lines that are there already stay in front, so that they need not be written again.
    """
    old = patiently(read_lines, there)
    own = patiently(read_lines, here)
    lines = old + list((Counter(own) - Counter(old)).elements())
    content = b"".join(line + b"\n" for line in lines)
    if lines != own:
        write_whole(here, content)
    before = (patiently(read_bytes, there) or b"") if send else content
    if before != content:
        if before and content.startswith(before):
            with open(there, "ab") as file:
                file.write(content[len(before) :])
                file.flush()
                os.fsync(file.fileno())
        else:
            write_in_place(there, BytesIO(content))
        if read_bytes(there) != content:
            raise MismatchError(f"{there.name} の内容が一致しません")


# A disk that takes no more


def is_full(folder, error: BaseException | None) -> bool:
    """Tell whether an error, whichever library worded it, came of a disk or quota that is full."""
    while error is not None:
        if getattr(error, "errno", None) in NO_SPACE or any(text in str(error) for text in FULL_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return shutil.disk_usage(folder).free < LITTLE_SPACE


@contextmanager
def tell_full_disk(folder, what: str):
    """Turn whatever a full disk makes of writing `what` into one sentence; other errors pass as they are."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_full(folder, error):
            raise
        raise describe_full_disk(folder, what) from error


def explain_error(error: BaseException) -> str | None:
    """Say in one sentence what a disk or a cache that cannot be written did; None for any other error."""
    if is_full(".", error):
        return (
            "ディスク（または割り当て）がいっぱいです。"
            "不要なファイルを消してから、もう一度同じように実行してください。"
        )
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO):
        return (
            f"{error.filename or 'ファイル'} を読み書きできません（{error.strerror}）。"
            "権限を確かめるか、書き込める場所を指定してください"
            "（キャッシュの場所は、環境変数 XDG_CACHE_HOME と HF_HOME で変えられます）。"
        )
    return None


def describe_full_disk(folder, what: str) -> UserError:
    return UserError(
        f"このマシンのディスク（または割り当て）がいっぱいで、{folder} に{what}を書けませんでした。"
        "これまでのものは残っています。\n"
        "不要なファイルを消してから、もう一度同じように実行すると、続きから始まります。"
    )


# What happened to a copy on Google Drive, and what to do about it

FULL = "保存先の空き容量が足りません。不要なファイルを削除し、Google Drive の場合はゴミ箱も空にしてください。"
READ_ONLY = "保存先に書き込む許可がありません（読み取り専用です）。書き込める場所を保存先にしてください。"
LOST = (
    "保存先につながりません。Google Drive の場合は、Drive に接続するセルと、その次のデータのセルを、"
    "もう一度実行してください。"
)
MISMATCH = (
    "保存先に書いたものを読み返すと、元の内容と一致しません。続くときは、"
    "最後に zip をダウンロードしてください。"
)
LOCAL = "このマシンのチェックポイントを読めません。学習中のフォルダは、動かしたり消したりしないでください。"
LOST_ERRORS = (errno.ENOTCONN, errno.ENOENT, errno.EIO, errno.ENODEV, errno.ESTALE, errno.ECONNABORTED)
TEXT_OF_ERRNO = {
    **dict.fromkeys(NO_SPACE, FULL),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), READ_ONLY),
    **dict.fromkeys(LOST_ERRORS, LOST),
}


def explain_copy(error: Exception, source: Path) -> str:
    """Return in one Japanese line why a copy of the folder `source` failed, and what to do about it."""
    if not isinstance(error, OSError):
        return f"予期しないエラーです（{error!r}）。この文を添えて報告してください。"
    if isinstance(error, MismatchError):
        return MISMATCH
    if error.filename and Path(error.filename).is_relative_to(source):
        return LOCAL
    other = f"保存先でエラーが起きました（{error}）。続くときは、最後に zip をダウンロードしてください。"
    return TEXT_OF_ERRNO.get(error.errno, other)
