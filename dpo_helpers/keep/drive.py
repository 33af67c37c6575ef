"""Keeps the newest checkpoint's copy on Google Drive (the mirror), and never stops the training for it.

The copy lies in two slots that are overwritten in place by turns: nothing there is deleted or renamed, since
Drive moves what is deleted to its bin, and while one slot is written the other holds a whole checkpoint. The
mirror belongs to the notebook that opened it last: its token in run.json is read before each copy.
"""

import errno
import json
import os
import time
from contextlib import suppress
from io import BytesIO
from pathlib import Path

from dpo_helpers.background import NewestJob
from dpo_helpers.colab import DRIVE_ROOT
from dpo_helpers.files import exists, explain_copy, write_in_place
from dpo_helpers.folders import copy_in_place, read_manifest
from dpo_helpers.keep.checkpoints import SLOT_NAMES, find_valid_slots
from dpo_helpers.places import RECORD, read_record

TAKEN = (
    "{} の学習は、あとから始めた別のノートブックが引き継ぎました。こちらの保存は止めました。"
    "こちらで続けるには、もう一方を止めてから、Drive に接続するセルから順に実行してください。"
)


class TakenError(Exception):
    """Another notebook has opened this mirror since."""


class Mirror(NewestJob):
    """Copies the newest submitted checkpoint to a folder, in a thread of its own.

    `problem` says why the last copy failed; `taken`, that another notebook has opened the folder since.
    """

    def __init__(self, folder, record: dict, report=print):
        self.folder, self.record = Path(folder), record
        self.problem: str | None = None
        self.taken = self._claimed = False
        self._said: set[str] = set()  # problems reported since the last success
        self._slot: Path | None = None  # the one to write next
        with suppress(OSError):  # the first copy meets the same error and reports it
            self._claim()
        super().__init__(self._copy, str(self.folder), report)

    def _claim(self) -> None:
        """Write run.json: whoever opened the mirror before finds another token there, and stops."""
        if self.folder.is_relative_to(DRIVE_ROOT) and not exists(DRIVE_ROOT / "MyDrive"):
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN), str(self.folder))
        self.folder.mkdir(parents=True, exist_ok=True)
        write_in_place(self.folder / RECORD, BytesIO(json.dumps(self.record).encode()))
        self._claimed = True

    def check_owner(self) -> None:
        """Raise TakenError where another notebook's token is there; OSError where that cannot be read."""
        if not self._claimed:
            return self._claim()
        if (found := read_record(self.folder)) == {}:  # cut off, or just being written
            time.sleep(1)
            found = read_record(self.folder)
        if found and found["owner"] != self.record["owner"]:
            self.taken = True
            raise TakenError
        if not found:
            self._claim()

    def _copy(self, checkpoint: Path) -> tuple[bool, str | None]:
        """Copy one checkpoint; return whether it is there, and a line to report, if something has changed."""
        try:
            self.folder.mkdir(exist_ok=True)
            self.check_owner()
            self._slot = self._slot or _choose_slot(self.folder)
            copy_in_place(checkpoint, self._slot)
        except (
            Exception
        ) as error:  # whatever it is, it is told, and the next checkpoint finds the thread alive
            self.problem = TAKEN.format(self.folder) if self.taken else explain_copy(error, checkpoint)
            told = self.problem in self._said
            self._said.add(self.problem)
            after = "学習はこのまま続き、結果はこのマシンに残ります。次のチェックポイントでもう一度試します。"
            text = f"{self.folder} に保存できませんでした：{self.problem}{'' if self.taken else after}"
            return False, None if told else text
        recovered, self.problem = self.problem is not None, None
        self._said.clear()
        self._slot = _other_slot(self._slot)
        text = f"{self.folder} にまた保存できるようになりました。{checkpoint.name} を保存しました。"
        return True, text if recovered else None


def _choose_slot(folder: Path) -> Path:
    """Return the slot to write first, which is not the newest good one; OSError where one cannot be read."""
    first, valid = folder / SLOT_NAMES[0], find_valid_slots(folder)
    newest = valid[0][0] if valid else first if read_manifest(first) else None
    return _other_slot(newest) if newest else first


def _other_slot(slot: Path) -> Path:
    return slot.with_name(SLOT_NAMES[1 - SLOT_NAMES.index(slot.name)])
