"""Mounts Google Drive, and keeps the newest checkpoint's copy there (the mirror) without ever stopping training for it.

The copy lies in two slots that are overwritten in place by turns: nothing there is deleted or renamed, since Drive
moves what is deleted to its bin, and while one slot is written the other still holds a whole checkpoint. The mirror
belongs to the notebook that opened it last: its token in run.json is read before each copy.
"""

import errno
import json
import os
import threading
import time
from contextlib import suppress
from io import BytesIO
from pathlib import Path

from dpo_helpers.files import (
    NO_SPACE,
    MismatchError,
    copy_in_place,
    exists,
    read_bytes,
    read_manifest,
    write_in_place,
)
from dpo_helpers.keep.checkpoints import SLOT_NAMES, find_valid_slots
from dpo_helpers.machine import in_colab

RECORD = "run.json"  # says whose folder it is: the run it is a start of, its settings, the owner's token
DRIVE_ROOT = Path("/content/drive")
FLUSH_SECONDS = 300  # Colab's own default is a day
QUIET_SECONDS = 2  # a wait longer than this is announced
FINISH_SECONDS = 300  # a mount that hangs never answers, so waiting for it needs an end

FULL = "保存先の空き容量が足りません。不要なファイルを削除し、Google Drive の場合はゴミ箱も空にしてください。"
READ_ONLY = "保存先に書き込む許可がありません（読み取り専用です）。書き込める場所を保存先にしてください。"
LOST = (
    "保存先につながりません。Google Drive の場合は、Drive に接続するセルと、その次のデータのセルを、"
    "もう一度実行してください。"
)
MISMATCH = "保存先に書いたものを読み返すと、元の内容と一致しません。続くときは、最後に zip をダウンロードしてください。"
LOCAL = "このマシンのチェックポイントを読めません。学習中のフォルダは、動かしたり消したりしないでください。"
TAKEN = (
    "{} の学習は、あとから始めた別のノートブックが引き継ぎました。二重に書かないように、こちらの保存は止めました。"
    "こちらで続けるには、もう一方を止めてから、Drive に接続するセルから順に実行してください。"
)
TEXT_OF_ERRNO = {
    **dict.fromkeys(NO_SPACE, FULL),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), READ_ONLY),
    **dict.fromkeys(
        (errno.ENOTCONN, errno.ENOENT, errno.EIO, errno.ENODEV, errno.ESTALE, errno.ECONNABORTED), LOST
    ),
}


class TakenError(Exception):
    """Another notebook has opened this mirror since."""


def read_record(folder) -> dict | None:
    """Return a folder's run.json, {} where it is cut off or garbage, None where there is none."""
    if (content := read_bytes(Path(folder) / RECORD)) is None:
        return None
    try:
        value = json.loads(content)
        sound = type(value["number"]) is int and all(type(value[key]) is str for key in ("first", "owner"))
        return value if sound and type(value["settings"]) is dict else {}
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}


def claim_mirror(folder: Path, record: dict) -> None:
    """Write run.json into the mirror: whoever opened it before finds another token there, and stops."""
    if folder.is_relative_to(DRIVE_ROOT) and not exists(DRIVE_ROOT / "MyDrive"):
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN), str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, ensure_ascii=False).encode()
    write_in_place(folder / RECORD, BytesIO(text))


class Mirror:
    """One daemon thread that copies the newest submitted checkpoint to a folder.

    `problem` says why the last copy failed; `hangs`, that finish() has waited in vain for one that still goes
    on; `taken`, that another notebook has opened the folder since.
    """

    def __init__(self, folder, record: dict, report=print):
        self.folder, self.record, self.report = Path(folder), record, report
        self.problem: str | None = None
        self.hangs = self.taken = self._claimed = False
        self._said: set[str] = set()  # problems reported since the last success
        self._slot: Path | None = None  # the one to write next
        self._pending: Path | None = None  # the newest submitted checkpoint, until it is safely there
        self._copying: Path | None = None
        self._due = False  # an attempt is asked for
        self._changed = threading.Condition()
        with suppress(OSError):  # the first copy meets the same error and reports it
            self._claim()
        threading.Thread(target=self._work, name="mirror", daemon=True).start()

    def _claim(self) -> None:
        claim_mirror(self.folder, self.record)
        self._claimed = True

    def check_owner(self) -> None:
        """Raise TakenError where another notebook's token is in the mirror; OSError where that cannot be read."""
        if not self._claimed:
            return self._claim()
        found = read_record(self.folder)
        if found == {}:  # cut off, or just being written
            time.sleep(1)
            found = read_record(self.folder)
        if found and found["owner"] != self.record["owner"]:
            self.taken, self.problem = True, TAKEN.format(self.folder)
            raise TakenError
        if not found:
            self._claim()

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
            self.check_owner()
            self._slot = self._slot or _choose_slot(self.folder)
            copy_in_place(checkpoint, self._slot)
        except Exception as error:  # whatever it is, it is told, and the next checkpoint finds the thread alive
            self.problem = _explain(error, checkpoint, self.folder)
            told = self.problem in self._said
            self._said.add(self.problem)
            after = "学習はこのまま続き、結果はこのマシンに残ります。次のチェックポイントでもう一度試します。"
            text = f"{self.folder} に保存できませんでした：{self.problem}{'' if self.taken else after}"
            return None if told else text
        recovered, self.problem = self.problem is not None, None
        self._said.clear()
        self._slot = _other_slot(self._slot)
        with self._changed:
            if self._pending is checkpoint:  # the same object: one that was submitted again is copied again
                self._pending, self._due = None, False
        text = f"{self.folder} にまた保存できるようになりました。{checkpoint.name} を保存しました。"
        return text if recovered else None


def _choose_slot(folder: Path) -> Path:
    """Return the slot to write first, which is not the newest good one; OSError where one cannot be read."""
    first, valid = folder / SLOT_NAMES[0], find_valid_slots(folder)
    newest = valid[0][0] if valid else first if read_manifest(first) else None
    return _other_slot(newest) if newest else first


def _other_slot(slot: Path) -> Path:
    return slot.with_name(SLOT_NAMES[1 - SLOT_NAMES.index(slot.name)])


def _explain(error: Exception, checkpoint: Path, folder: Path) -> str:
    """Return in one Japanese line what happened and what to do about it."""
    if isinstance(error, TakenError):
        return TAKEN.format(folder)
    if not isinstance(error, OSError):
        return f"予期しないエラーです（{error!r}）。この文を添えて報告してください。"
    if isinstance(error, MismatchError):
        return MISMATCH
    if error.filename and Path(error.filename).is_relative_to(checkpoint):
        return LOCAL
    other = f"保存先でエラーが起きました（{error}）。続くときは、最後に zip をダウンロードしてください。"
    return TEXT_OF_ERRNO.get(error.errno, other)


def mount_drive(wanted: bool, run_dir) -> Path | None:
    """Ask for Google Drive and return the folder there for this run, or None with a line that says why.

    A refusal is an answer: training goes on, and the result stays on this machine.
    """
    if not in_colab():
        if wanted:
            print("Colab ではないので Google Drive は使いません。結果はこのマシンのフォルダに残ります。")
        return None
    if not wanted:
        print("Google Drive は使いません。このマシンはあとで消えるので、最後に zip をダウンロードしてください。")
        return None
    if not os.path.isdir(DRIVE_ROOT / "MyDrive"):  # mount() asks for consent even where it is mounted already
        from google.colab import drive

        try:
            drive.mount(str(DRIVE_ROOT))
        except Exception as error:  # MessageError, ValueError, NotImplementedError: all mean "no Drive"
            print(f"Google Drive に接続できませんでした（{error}）。学習はこのまま続けられます。")
            print("使いたい場合は、このセルをもう一度実行して許可し、次のデータのセルも順に実行してください。")
            print("使わない場合、このマシンはあとで消えるので、最後に zip をダウンロードしてください。")
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
        print(f"Google Drive への送信が終わったことを確かめられませんでした（{error}）。まだ続いているかもしれません。")
        print("ブラウザの Google Drive に新しいファイルがあることを確かめるか、zip をダウンロードしてください。")
    else:
        print("Google Drive への書き込みをすべて終え、切り離しました。")
