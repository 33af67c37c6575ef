"""Handles whole folders: a manifest with the hash of every file, and copies that are compared.

A folder is whole when its manifest, which is written last, tells the truth. Nothing here knows what is in it.
"""

import errno
import json
import os
import re
import shutil
import zipfile
from io import BytesIO
from pathlib import Path, PurePosixPath

from dpo_helpers.files import ABSENT, MismatchError, exists, hash_file, read_bytes, write_in_place, write_json

MANIFEST = "manifest.json"
ZIP_MARK = b"dpo_helpers"  # the comment of a zip that is ours to write over


def list_files(folder) -> list[str]:
    """Return the names of all files below a folder, as a manifest has them; OSError: unreadable."""
    found = []
    for root, _, names in os.walk(folder, onerror=raise_error):
        found += [(Path(root) / name).relative_to(folder).as_posix() for name in names]
    return sorted(found)


def raise_error(error: OSError):
    """Let os.walk stop at a folder that cannot be read; a missing one is empty."""
    if not isinstance(error, ABSENT):
        raise error


def write_manifest(folder: Path, **label) -> None:
    """Bring a folder's files down to the disk, and their sizes and hashes, with `label`, in its manifest."""
    files = {}
    for name in list_files(folder):
        if name != MANIFEST:
            with open(folder / name, "rb") as file:
                os.fsync(file.fileno())
            files[name] = {"bytes": (folder / name).stat().st_size, "sha256": hash_file(folder / name)}
    write_json(folder / MANIFEST, {**label, "files": files})


def read_manifest(folder) -> dict | None:
    """Return a folder's manifest, or None where it is missing, malformed, or names a file outside."""
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
    """Tell whether a name is relative, normal, and the same everywhere; a lone surrogate is a ValueError."""
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
    """Overwrite a folder's files by those of a whole folder and read every byte back; OSError if that fails.

    The target has no valid manifest from before its first file changes until all files have been compared.
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
    """Copy a whole folder to the new folder `target`, which appears when the copy verifies, or OSError."""
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
    """Move a whole folder's files into `target`, which may hold others; the manifest comes last."""
    (target / MANIFEST).unlink(missing_ok=True)
    for name in (*read_manifest(source)["files"], MANIFEST):
        (target / name).parent.mkdir(exist_ok=True)
        os.replace(source / name, target / name)
    shutil.rmtree(source)


def write_zip(folder: Path, files: dict[str, bytes]) -> Path:
    """Write {name: content} as a zip beside a folder and return its path; a file that is not ours stays."""
    archive, number, aside = folder.with_name(f"{folder.name}.zip"), 1, folder / "zip.partial"
    while exists(archive) and not _is_our_zip(archive):
        number += 1
        archive = folder.with_name(f"{folder.name}-{number}.zip")
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
    except (zipfile.BadZipFile, IsADirectoryError):
        return False
