"""Keeps a copy of the newest training checkpoint on a slow, unreliable folder (Google Drive) and never stops
training for it.

The copy lives in two slots that are overwritten in place by turns: nothing there is deleted or renamed, since
Drive moves what is deleted to its bin, and while one slot is written the other still holds a whole
checkpoint. It makes no checkpoints, removes none, and takes no lock.
"""

import errno
import json
import re
import shutil
import threading
from contextlib import suppress
from io import BytesIO
from pathlib import Path, PurePosixPath

from dpo_helpers.files import hash_file, write_in_place

STAGES = ("sft", "dpo")  # in the order of training
SLOT_NAMES = ("slot-0", "slot-1")
MANIFEST = "manifest.json"
QUIET_SECONDS = 2  # a wait longer than this is announced
FINISH_SECONDS = 300  # a mount that hangs never answers, so waiting for it needs an end

FULL = "保存先の空き容量が足りません。不要なファイルを削除し、Google Drive の場合はゴミ箱も空にしてください。"
READ_ONLY = "保存先に書き込む許可がありません（読み取り専用です）。書き込める場所を保存先にしてください。"
LOST = (
    "保存先につながりません。Google Drive の場合は、学習のあとで Drive "
    "に接続するセルをもう一度実行してください。"
)
MISMATCH = (
    "保存先に書いたものを読み返すと、元の内容と一致しません。続くときは、"
    "最後に zip をダウンロードしてください。"
)
LOCAL = "このマシンのチェックポイントを読めません。学習中のフォルダーは、動かしたり消したりしないでください。"
TEXT_OF_ERRNO = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), FULL),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), READ_ONLY),
    **dict.fromkeys(
        (errno.ENOTCONN, errno.ENOENT, errno.EIO, errno.ENODEV, errno.ESTALE, errno.ECONNABORTED), LOST
    ),
}


class MismatchError(OSError):
    """A copy differs from what its manifest says."""


def read_manifest(folder) -> dict | None:
    """Return a checkpoint's manifest, or None where there is none, it is malformed, or it names a file
    outside the folder.
    """
    try:
        value = json.loads((Path(folder) / MANIFEST).read_bytes().decode())
        entries = value["files"].values()
        well_formed = (
            value["stage"] in STAGES
            and all(
                type(number) is int and number >= 0
                for number in (value["step"], *(entry["bytes"] for entry in entries))
            )
            and all(re.fullmatch("[0-9a-f]{64}", entry["sha256"]) for entry in entries)
            and all(_is_inside(name) for name in value["files"])
        )
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
    ):  # unreadable, not JSON, another shape
        return None
    return value if well_formed else None


def _is_whole(folder: Path, manifest: dict) -> bool:
    return all(
        (folder / name).stat().st_size == entry["bytes"] and hash_file(folder / name) == entry["sha256"]
        for name, entry in manifest["files"].items()
    )


def verify_folder(folder) -> dict | None:
    """Return the manifest if every file that it lists has the listed size and SHA-256, else None."""
    manifest = read_manifest(folder)
    with suppress(OSError):
        return manifest if manifest and _is_whole(Path(folder), manifest) else None


def order_of(manifest: dict) -> tuple:
    """Return the key that sorts manifests from the oldest to the newest."""
    return STAGES.index(manifest["stage"]), manifest["step"]


def find_valid_slots(mirror_folder) -> list[tuple[Path, dict]]:
    """Return (slot, manifest) of the slots that verify, newest first."""
    slots = [(slot, verify_folder(slot)) for slot in (Path(mirror_folder) / name for name in SLOT_NAMES)]
    return sorted((found for found in slots if found[1]), key=lambda found: order_of(found[1]), reverse=True)


def restore_slot(slot, target) -> None:
    """Copy a slot to the new local folder `target`, which appears only once the copy verifies; OSError if
    it does not.
    """
    slot, target = Path(slot), Path(target)
    aside = target.with_name(target.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        for name in (MANIFEST, *(read_manifest(slot) or {"files": {}})["files"]):
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(slot / name, aside / name)
        if verify_folder(aside) is None:
            raise MismatchError(f"{slot} の内容が一致しません。")
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_slot(checkpoint: Path, slot: Path) -> None:
    """Overwrite a slot by a checkpoint and read every byte back; OSError if anything fails.

    The slot has no valid manifest from before its first file changes until all its files have been compared.
    """
    if (manifest := read_manifest(checkpoint)) is None:
        raise FileNotFoundError(errno.ENOENT, "no usable manifest", str(checkpoint / MANIFEST))
    slot.mkdir(
        exist_ok=True
    )  # here and below never with parents: a lost mount would be replaced by a folder on this machine
    write_in_place(slot / MANIFEST, BytesIO(b"{}"))
    for name in manifest["files"]:
        (slot / name).parent.mkdir(exist_ok=True)
        with open(checkpoint / name, "rb") as source:
            write_in_place(slot / name, source)
    if not _is_whole(slot, manifest):
        raise MismatchError
    write_in_place(slot / MANIFEST, BytesIO((checkpoint / MANIFEST).read_bytes()))
    if read_manifest(slot) != manifest:
        raise MismatchError


class Mirror:
    """One daemon thread that copies the newest submitted checkpoint to a folder.

    `problem` says why the last copy failed; `hangs`, that finish() has waited in vain for one that still goes
    on.
    """

    def __init__(self, folder, report=print):
        self.folder, self.report = Path(folder), report
        self.problem: str | None = None
        self.hangs = False
        self._said: set[str] = set()  # problems reported since the last success
        self._slot: Path | None = None  # the one to write next
        self._pending: Path | None = None  # the newest submitted checkpoint, until it is safely there
        self._copying: Path | None = None
        self._due = False  # an attempt is asked for
        self._changed = threading.Condition()
        with suppress(OSError):  # the first copy meets the same error and reports it
            self.folder.mkdir(parents=True, exist_ok=True)
        threading.Thread(target=self._work, name="mirror", daemon=True).start()

    def submit(self, checkpoint) -> None:
        """Ask for a copy and return at once; a checkpoint that still waits is given up for this one."""
        with self._changed:
            self._pending, self._due = Path(checkpoint), True
            self._changed.notify_all()

    def in_use(self) -> set[Path]:
        """Return the checkpoints that must not be removed: being copied, waiting, or to be tried again."""
        with self._changed:
            return {self._copying, self._pending} - {None}

    def finish(self, timeout: float | None = None) -> bool:
        """Try again what failed, wait at most `timeout` seconds (default 300), and return whether the newest
        checkpoint is there.

        A copy that was waited for in vain is not waited for again.
        """
        limit = FINISH_SECONDS if timeout is None else timeout
        quiet = min(limit, QUIET_SECONDS)
        with self._changed:
            self._due = self._pending is not None  # during an attempt: taken up if that one fails
            self._changed.notify_all()
            if self.hangs:
                return False
        if not (idle := self._wait_idle(quiet)) and quiet < limit:
            self.report(f"{self.folder} への保存が終わるのを待っています（最長 {limit:g} 秒）。")
            idle = self._wait_idle(limit - quiet)
        if not idle:
            self.report(
                f"{limit:g} 秒待ちましたが、{self.folder} への保存が終わりません。"
                "結果はこのマシンにあるので、zip をダウンロードしてください。"
            )
        return self._pending is None

    def _wait_idle(self, seconds: float) -> bool:
        with self._changed:
            idle = self._changed.wait_for(lambda: not self._due and self._copying is None, seconds)
            self.hangs = not idle
            return idle

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._due)
                self._due, self._copying = False, self._pending
            line = self._attempt(self._copying)
            with suppress(Exception):  # an output that is gone must not end the thread; `problem` still tells
                if line:
                    self.report(line)
            with self._changed:
                self._copying, self.hangs = None, False
                self._changed.notify_all()

    def _attempt(self, checkpoint: Path) -> str | None:
        """Copy one checkpoint; return the line to report, if something has changed."""
        try:
            self.folder.mkdir(exist_ok=True)
            self._slot = self._slot or _choose_slot(self.folder)
            write_slot(checkpoint, self._slot)
        except (
            Exception
        ) as error:  # whatever it is, it is told, and the next checkpoint finds the thread alive
            self.problem = _explain(error, checkpoint)
            told = self.problem in self._said
            self._said.add(self.problem)
            after = "学習はこのまま続き、結果はこのマシンに残ります。次のチェックポイントでもう一度試します。"
            return None if told else f"{self.folder} に保存できませんでした：{self.problem}{after}"
        recovered, self.problem = self.problem is not None, None
        self._said.clear()
        self._slot = _other_slot(self._slot)
        with self._changed:
            if self._pending is checkpoint:  # the same object: one that was submitted again is copied again
                self._pending, self._due = None, False
        return (
            f"{self.folder} にまた保存できるようになりました。{checkpoint.name} を保存しました。"
            if recovered
            else None
        )


def _choose_slot(folder: Path) -> Path:
    """Return the slot to write first, which is not the newest good one."""
    first = folder / SLOT_NAMES[0]
    newest = next((slot for slot, _ in find_valid_slots(folder)), first if read_manifest(first) else None)
    return (
        _other_slot(newest) if newest else first
    )  # a `first` that does not verify may be good, and unreadable only now


def _other_slot(slot: Path) -> Path:
    return slot.with_name(SLOT_NAMES[1 - SLOT_NAMES.index(slot.name)])


def _explain(error: Exception, checkpoint: Path) -> str:
    """Return in one Japanese line what happened and what to do about it."""
    if not isinstance(error, OSError):
        return f"予期しないエラーです（{error!r}）。この文を添えて報告してください。"
    if isinstance(error, MismatchError):
        return MISMATCH
    if error.filename and Path(error.filename).is_relative_to(checkpoint):
        return LOCAL
    return TEXT_OF_ERRNO.get(
        error.errno,
        f"保存先でエラーが起きました（{error}）。続くときは、最後に zip をダウンロードしてください。",
    )


def _is_inside(name: str) -> bool:
    """Tell whether a name is relative, normal, and means the same on every system; a lone surrogate raises
    ValueError.
    """
    path, _ = PurePosixPath(name), name.encode()
    odd = path.is_absolute() or ".." in path.parts or set(name) & set("\\:\0")
    return not odd and str(path) == name and path.parts[:1] not in ((), (MANIFEST,))
