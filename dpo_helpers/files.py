"""Reads and writes files, and folders whose manifest holds the hash of every file; nothing here knows what is in them.

On this machine a file is written aside and renamed, so that it is whole or not there. On Google Drive, where what is
renamed or deleted fills the bin, files are overwritten in place and read back. "Not found" alone means absent: every
other error is raised, so that nobody takes for missing what could only not be read.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections import Counter
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path, PurePosixPath

from dpo_helpers.errors import UserError

MANIFEST = "manifest.json"
PATIENCE_SECONDS = 10  # how long a read that fails is tried again: a busy mount answers after a few seconds
ABSENT = (FileNotFoundError, NotADirectoryError)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LITTLE_SPACE = 20_000_000  # bytes: with less than a small checkpoint left, a failed write is taken for a full disk
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
    """Write a file aside, down to the disk, and rename it: a process killed meanwhile leaves no half of it."""
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


def write_json(path, value) -> None:
    write_whole(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


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
    """Copy a file over another and read it back; raises OSError where that does not work or does not match.

    Makes the target's folder, but never one above it: a lost mount would be replaced by a folder on this machine.
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


# Folders with a manifest


def list_files(folder) -> list[str]:
    """Return the names of all files below a folder, as a manifest has them; an unreadable folder raises OSError."""
    found = []
    for root, _, names in os.walk(folder, onerror=raise_error):
        found += [(Path(root) / name).relative_to(folder).as_posix() for name in names]
    return sorted(found)


def raise_error(error: OSError):
    """Let os.walk stop at a folder that cannot be read; a missing one is empty."""
    if not isinstance(error, ABSENT):
        raise error


def write_manifest(folder: Path, **label) -> None:
    """Bring a folder's files down to the disk and write their sizes and hashes, with `label`, into its manifest."""
    files = {}
    for name in list_files(folder):
        if name != MANIFEST:
            with open(folder / name, "rb") as file:
                os.fsync(file.fileno())
            files[name] = {"bytes": (folder / name).stat().st_size, "sha256": hash_file(folder / name)}
    write_json(folder / MANIFEST, {**label, "files": files})


def read_manifest(folder) -> dict | None:
    """Return a folder's manifest, or None where there is none, it is malformed, or names a file outside the folder."""
    content = read_bytes(Path(folder) / MANIFEST)
    try:
        value = json.loads((content or b"").decode())
        entries = value["files"].values()
        well_formed = (
            all(type(entry["bytes"]) is int and entry["bytes"] >= 0 for entry in entries)
            and all(re.fullmatch("[0-9a-f]{64}", entry["sha256"]) for entry in entries)
            and all(_is_inside(name) for name in value["files"])
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):  # not JSON, or another shape
        return None
    return value if well_formed else None


def _is_inside(name: str) -> bool:
    """Tell whether a name is relative, normal, and the same on every system; a lone surrogate raises ValueError."""
    path, _ = PurePosixPath(name), name.encode()
    odd = path.is_absolute() or ".." in path.parts or set(name) & set("\\:\0")
    return not odd and str(path) == name and path.parts[:1] not in ((), (MANIFEST,))


def is_whole(folder: Path, manifest: dict) -> bool:
    """Tell whether every file that a manifest lists has the listed size and hash."""
    try:
        return all(
            (folder / name).stat().st_size == entry["bytes"] and hash_file(folder / name) == entry["sha256"]
            for name, entry in manifest["files"].items()
        )
    except (*ABSENT, IsADirectoryError):
        return False


def verify_folder(folder) -> dict | None:
    """Return a folder's manifest if the folder is whole, else None."""
    manifest = read_manifest(folder)
    return manifest if manifest and is_whole(Path(folder), manifest) else None


def copy_in_place(source: Path, target: Path) -> None:
    """Overwrite a folder's files by those of a whole folder and read every byte back; OSError if anything fails.

    The target has no valid manifest from before its first file changes until all its files have been compared.
    """
    if (manifest := read_manifest(source)) is None:
        raise FileNotFoundError(errno.ENOENT, "no usable manifest", str(source / MANIFEST))
    target.mkdir(exist_ok=True)  # never with parents, as in copy_file
    write_in_place(target / MANIFEST, BytesIO(b"{}"))
    for name in manifest["files"]:
        (target / name).parent.mkdir(exist_ok=True)
        with open(source / name, "rb") as content:
            write_in_place(target / name, content)
    if not is_whole(target, manifest):
        raise MismatchError
    write_in_place(target / MANIFEST, BytesIO((source / MANIFEST).read_bytes()))
    if read_manifest(target) != manifest:
        raise MismatchError


def copy_whole(source: Path, target: Path) -> None:
    """Copy a whole folder to the new folder `target`, which appears only once the copy verifies; OSError if not."""
    aside = target.with_name(f"{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        for name in (MANIFEST, *(read_manifest(source) or {"files": {}})["files"]):
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, aside / name)
        if verify_folder(aside) is None:
            raise MismatchError(f"{source} の内容が一致しません。")
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def move_over(source: Path, target: Path) -> None:
    """Put a whole folder's files into `target`, which may hold others; it is whole again when the last one is there."""
    (target / MANIFEST).unlink(missing_ok=True)
    for name in (*read_manifest(source)["files"], MANIFEST):
        (target / name).parent.mkdir(exist_ok=True)
        os.replace(source / name, target / name)
    shutil.rmtree(source)


# Files that only grow


def read_lines(path) -> list[bytes]:
    """Return a file's lines without their ends; of a last line that was cut off nothing."""
    *lines, last = (read_bytes(path) or b"").split(b"\n")
    with suppress(ValueError, RecursionError):
        lines += [last] if json.loads(last or b"!") else []
    return [line for line in lines if line.strip()]


def merge_lines(here: Path, there: Path, send: bool) -> None:
    """Let `here` hold every line of both files, and `there` too if `send`: what only grows is never shortened.

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
    """Say in one sentence what a disk, a cache or a home that cannot be written did; None for any other error."""
    if is_full(".", error):
        return "ディスク（または割り当て）がいっぱいです。不要なファイルを消してから、もう一度同じように実行してください。"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO):
        return (
            f"{error.filename or 'ファイル'} を読み書きできません（{error.strerror}）。権限と空き容量を確かめるか、"
            "書き込める場所を指定してください（キャッシュの場所は、環境変数 XDG_CACHE_HOME と HF_HOME で変えられます）。"
        )
    return None


def describe_full_disk(folder, what: str) -> UserError:
    return UserError(
        f"このマシンのディスク（または割り当て）がいっぱいで、{folder} に{what}を書けませんでした。"
        "これまでのものは残っています。\n"
        "不要なファイルを消してから、もう一度同じように実行すると、続きから始まります。"
    )
