"""Keeps two programs from training in one run folder; a lock is a file with a heartbeat, and it protects
no single write.
"""

import json
import math
import os
import socket
import threading
import time
from collections import defaultdict
from contextlib import suppress
from functools import cache
from io import BytesIO
from pathlib import Path

import psutil

from dpo_helpers.errors import UserError
from dpo_helpers.files import write_in_place

LOCK_NAME = "run.lock"
STALE_SECONDS = 90.0  # six heartbeats: a busy Drive loses one or two
RELEASED = {"released": True}
_FILES = defaultdict(
    threading.RLock
)  # one thread of this process at a time reads and then writes a lock file
# lock file -> the RunLock that beats it: a cell that is run again leaves the thread of the first run behind
_OWNERS = {}


def read_lock(path) -> dict | None:
    """Return a lock file's content: a whole lock, RELEASED, {} for anything else, or None where there is
    no file.
    """
    try:
        value = json.loads(Path(path).read_bytes())
        if value.get("released") is True:
            return RELEASED
        texts = all(value[name].isprintable() for name in ("host", "boot"))
        numbers = [value[name] for name in ("pid", "process_started", "heartbeat", "beats")]
        sound = all(type(number) in (int, float) and 0 <= number < 1e15 for number in numbers)
        return value if texts and sound and type(value["pid"]) is int and 0 < value["pid"] < 2**31 else {}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _write(path: Path, value: dict, mode: str = "r+b") -> None:
    text = json.dumps(value).ljust(512)  # of one length, so that no reader meets the tail of an older text
    write_in_place(path, BytesIO(text.encode()), mode)


def _started(pid: int) -> float:
    """Return seconds from the machine's start to the process's: unlike a time of day, a corrected clock
    does not move it.
    """
    return round(psutil.Process(pid).create_time() - psutil.boot_time(), 2)


@cache
def _identity(pid: int) -> dict:
    host, boot = socket.gethostname(), Path("/proc/sys/kernel/random/boot_id")
    boot_id = boot.read_text().strip() if boot.is_file() else f"{host}-{int(psutil.boot_time())}"
    return {"host": host, "boot": boot_id, "pid": pid, "process_started": _started(pid)}


def _is_alive(lock: dict) -> bool:
    """Tell whether the process of a lock of this machine still runs; another start time means that its
    number was reused.
    """
    try:
        zombie = psutil.Process(lock["pid"]).status() == psutil.STATUS_ZOMBIE
        return not zombie and abs(_started(lock["pid"]) - lock["process_started"]) <= 1
    except psutil.Error as error:
        return isinstance(
            error, psutil.AccessDenied
        )  # another user's process; any other error means that there is none


def _refusal(path: Path, lock: dict | None) -> UserError:
    holder = f"マシン {lock['host']}、プロセス番号 {lock['pid']}" if lock and "pid" in lock else "相手は不明"
    return UserError(
        f"フォルダー {path.parent} は、別のノートブックかターミナルが学習に"
        f"使っています（{holder}）。結果が混ざるので、始めません。\n"
        "そちらを止めるか（Colab なら、そのノートブックのメニューで「ランタイム」"
        "→「ランタイムを接続解除して削除」）、"
        "別の名前（例：run-2）を RUN_DIR に書いてから、もう一度実行してください。"
    )


class RunLock:
    """Holds `run.lock` in every folder, the local one first, and beats in a daemon thread every `interval`
    seconds.

    A process on this machine is looked up; another machine is judged by its heartbeat, for which acquire()
    may wait 90 s. Of two that take one stale lock at the same moment, the later writer wins, and the other
    sees it when it looks again after 0.2 s. That is good enough, not perfect: another machine's write reaches
    Drive later than that, and then the loser learns of it at one of its heartbeats, which sets `lost`.
    """

    def __init__(
        self, folders: list[Path], report=print, clock=time.time, sleep=time.sleep, interval: float = 15.0
    ):
        self.paths = [Path(folder).absolute() / LOCK_NAME for folder in folders]
        self.report, self.clock, self.sleep, self.interval = report, clock, sleep, interval
        self.lost, self._held, self._beats, self._stop = False, set(), 0, threading.Event()

    def acquire(self) -> None:
        """Lock every folder, which must exist, or raise UserError and hold none; a mirror that cannot be
        used is left out.
        """
        self._stop.set()
        self._me, self._stop, self.lost, self._held = _identity(os.getpid()), threading.Event(), False, set()
        # Before the first lock is taken: while acquire() waits for the mirror, the local lock must not go
        # stale.
        threading.Thread(target=self._beat_until, args=(self._stop,), daemon=True, name="run-lock").start()
        try:
            for path in self.paths:
                try:
                    self._take(path)
                except OSError as error:
                    problem = f"フォルダー {path.parent} に書き込めません（{error.strerror}）。"
                    if path == self.paths[0]:
                        raise UserError(f"{problem}書き込める場所を RUN_DIR に指定してください。") from None
                    self.report(
                        f"{problem}使用中かどうかを確かめられないので、同じ名前の学習を別のノートブックで"
                        "動かさないでください。"
                    )
        except BaseException:
            self.release()
            raise

    def beat(self) -> None:
        """Write the heartbeat into every folder held; give up a folder that somebody else has taken over,
        and set `lost`.
        """
        self._beats += 1
        for path in self.paths:
            with (
                _FILES[path],
                suppress(OSError),
            ):  # on purpose: whatever mirrors the run to that folder reports a lost mount
                if path not in self._held:
                    continue
                found, owned = read_lock(path), _OWNERS.get(path) is self
                if owned and (not found or self._is_mine(found)):
                    _write(path, self._content())
                    continue
                self._held.remove(path)
                if owned and not self.lost:
                    self.lost = True
                    self.report(
                        f"別のノートブックが {path.parent} での学習を引き継ぎました。"
                        "このノートブックの学習は止めてください。"
                    )

    def release(self) -> None:
        """Mark every lock that is still ours as released and stop beating; a second call does nothing."""
        self._stop.set()
        for path in self.paths:
            with (
                _FILES[path],
                suppress(OSError),
            ):  # as in beat(); the lock on a lost mount goes stale by itself
                if path in self._held:
                    self._held.remove(path)
                    if _OWNERS.get(path) is self and self._is_mine(read_lock(path)):
                        _write(path, RELEASED)

    def _beat_until(self, stop: threading.Event) -> None:
        while not stop.wait(self.interval):
            self.beat()

    def _content(self) -> dict:
        return {**self._me, "heartbeat": self.clock(), "beats": self._beats}

    def _is_mine(self, found: dict | None) -> bool:
        return bool(found) and all(found.get(name) == value for name, value in self._me.items())

    def _take(self, path: Path) -> None:
        found = read_lock(path)
        again = self._is_mine(found)
        if found and "pid" in found and not again:
            found = self._wait_until_free(path, found)
        with (
            _FILES[path],
            suppress(FileExistsError),
        ):  # somebody was faster than our exclusive creation: the look below says who
            _write(path, self._content(), "xb" if found is None else "r+b")
            _OWNERS[path] = self
        if not again:
            self.sleep(0.2)
            if not self._is_mine(found := read_lock(path)):
                raise _refusal(path, found)
        self._held.add(path)

    def _wait_until_free(self, path: Path, lock: dict) -> dict | None:
        """Return what is to be overwritten, or raise UserError where the other program is at work."""
        here = all(
            lock[name] == self._me[name] for name in ("host", "boot")
        )  # containers on one machine share its boot id
        if here and _is_alive(lock):
            raise _refusal(path, lock)
        start, waited = self.clock(), 0.0
        # A heartbeat from the future, by a clock that runs ahead, counts as a fresh one.
        wait = 0.0 if here else min(STALE_SECONDS, STALE_SECONDS - start + lock["heartbeat"])
        if wait > 0:
            used = f"{path.parent} は、別のマシン（{lock['host']}）が使っていました。"
            self.report(f"{used}動いていないことを確かめるため、最大 {math.ceil(wait)} 秒待ちます。")
        while (
            waited < wait and self.clock() < start + wait
        ):  # both: reading may be slow, and a clock may be set back
            self.sleep(pause := min(2.0, wait - waited))
            waited += pause
            if (found := read_lock(path)) != lock:
                if found and "pid" in found:
                    raise _refusal(path, found)
                return found
        self.report(
            f"{path.parent} を使っていたプログラム（マシン {lock['host']}、"
            f"番号 {lock['pid']}）は動いていないので、引き継ぎます。"
        )
        return lock
