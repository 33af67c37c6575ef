"""A folder that stands for Google Drive, or for this machine's disk, and fails as told."""

import builtins
import errno
import io
import os
import threading
import time
from pathlib import Path

from dpo_helpers.keep.checkpoints import find_valid_slots

OPERATIONS = {"mkdir": "mkdir", "stat": "stat", "lstat": "stat", "listdir": "list", "scandir": "list"}
WEIGHTS = "adapter_model.safetensors"


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def steps(folder):
    """Return (slot, step) of the valid slots, newest first."""
    return [(slot.name, manifest["step"]) for slot, manifest in find_valid_slots(folder)]


def no_fault(operation, path, data):
    return data


class Drive:
    """Stands between the package and one folder: every operation there passes `fault(operation, path, data)`.

    What it returns is written, without a buffer that a kill could still flush; what it raises, the package
    meets. The operations are open, read, write, truncate, fsync, mkdir, stat and list.
    """

    def __init__(self, root, monkeypatch):
        self.root, self.fault, self.numbers = root, no_fault, {}
        self.real_open = builtins.open
        monkeypatch.setattr(builtins, "open", self.open)
        monkeypatch.setattr(io, "open", self.open)  # pathlib's
        for name, operation in OPERATIONS.items():
            monkeypatch.setattr(os, name, self.watch(getattr(os, name), operation))
        # and no waiting for a disk
        monkeypatch.setattr(os, "fsync", lambda number: self.touch("fsync", self.numbers.get(number, "")))

    def watch(self, original, operation):
        def watched(path=".", *rest, **options):
            self.touch(operation, path)
            return original(path, *rest, **options)

        return watched

    def hang(self, *names):
        """Let writes to files of these names wait for the returned event; `hangs` is set once one does."""
        answers, self.hangs = threading.Event(), threading.Event()

        def fault(operation, path, data):
            if operation == "write" and path.name in names:
                self.hangs.set()
                answers.wait(60)
            return data

        self.fault = fault
        return answers

    def touch(self, operation, path, data=b""):
        if isinstance(path, int) or not Path(os.fsdecode(path)).is_relative_to(self.root):
            return data
        return self.fault(operation, Path(os.fsdecode(path)), data)

    def open(self, path, mode="r", *rest, **options):
        reads = not set(mode) & set("wax+")
        self.touch("read" if reads else "open", path)
        if reads or "b" not in mode or not Path(path).is_relative_to(self.root):
            return self.real_open(path, mode, *rest, **options)
        return SlotFile(self, Path(path), self.real_open(path, mode, buffering=0))


class SlotFile:
    def __init__(self, drive, path, raw):
        self.drive, self.path, self.raw = drive, path, raw
        self.fileno, self.flush = raw.fileno, raw.flush
        drive.numbers[raw.fileno()] = path

    def __enter__(self):
        return self

    def __exit__(self, *_):
        del self.drive.numbers[self.fileno()]
        self.raw.close()

    def write(self, data):
        half = len(data) // 2
        for part in (data[:half], data[half:]):
            try:
                part = self.drive.touch("write", self.path, part)
            except Full as error:
                self.raw.write(part[: error.fitting])
                raise
            self.raw.write(part)

    def truncate(self):
        self.drive.touch("truncate", self.path)
        self.raw.truncate()


class Full(OSError):
    """No space left, after the first `fitting` bytes of what was to be written."""

    def __init__(self, fitting):
        super().__init__(errno.ENOSPC, "No space left on device")
        self.fitting = fitting


def fill_up(share):
    """Let the drive take this share of a slot's bytes, and not one more."""

    def make(checkpoint):
        taken, room = 0, int(share * (2 + sum(map(len, contents(checkpoint).values()))))
        room = room - 1 if share == 1 else room

        def fault(operation, path, data):
            nonlocal taken
            fitting = min(len(data), max(0, room - taken))
            taken += fitting
            if fitting < len(data):
                raise Full(fitting)
            return data

        return fault

    return make


def fail(number, *operations, name="", seconds=None):
    """Let operations fail, on files of one name where it is given, and for so many seconds from the first."""
    begun = []

    def fault(operation, path, data):
        if operation in operations and path.name.endswith(name):
            begun.append(time.monotonic())
            if seconds is None or begun[-1] - begun[0] < seconds:
                raise OSError(number, os.strerror(number), str(path))
        return data

    return lambda checkpoint: fault


def change(name, edit):
    """Let the drive store something else than it was given for one file, and say nothing."""

    def fault(operation, path, data):
        return edit(data) if operation == "write" and path.name == name and len(data) > 1 else data

    return lambda checkpoint: fault


FAULTS = {
    "full at the first byte": (fill_up(0), "空き容量が足りません"),
    "full in the middle": (fill_up(0.5), "空き容量が足りません"),
    "full at the last byte": (fill_up(1), "空き容量が足りません"),
    "quota": (fail(errno.EDQUOT, "fsync"), "空き容量が足りません"),
    "input/output error": (fail(errno.EIO, "write"), "つながりません"),
    "input/output error at the end": (fail(errno.EIO, "fsync"), "つながりません"),
    "not connected": (
        fail(errno.ENOTCONN, "mkdir", "stat", "list", "open", "read", "write", "truncate", "fsync"),
        "つながりません",
    ),
    "input/output error at the reading back": (fail(errno.EIO, "read"), "つながりません"),
    "read-only": (fail(errno.EROFS, "mkdir", "open"), "読み取り専用"),
    "forbidden": (fail(errno.EACCES, "open"), "読み取り専用"),
    "lost tail": (change(WEIGHTS, lambda data: data[:-1]), "一致しません"),
    "lost tail of the manifest": (change("manifest.json", lambda data: data[:-1]), "一致しません"),
    "flipped bit": (change(WEIGHTS, lambda data: data[:-1] + bytes([data[-1] ^ 1])), "一致しません"),
    "another error": (fail(errno.ENAMETOOLONG, "open"), "File name too long"),
}
