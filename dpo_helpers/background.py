"""Does one job after another in a thread of its own; of those that wait, only the newest counts."""

import threading
from collections.abc import Callable
from contextlib import suppress

QUIET_SECONDS = 2  # a wait longer than this is announced
FINISH_SECONDS = 300  # a mount that hangs never answers, so waiting for it needs an end


class NewestJob:
    """One daemon thread that calls `work` with the newest submitted job, again at finish() where it failed.

    `work` returns whether the job is done, and a line to report or None; it raises nothing. `hangs` says that
    finish() has waited in vain for a job that still goes on.
    """

    def __init__(self, work: Callable, name: str, report=print):
        self.work, self.name, self.report, self.hangs = work, name, report, False
        self._pending = None  # the newest submitted job, until it is done
        self._doing = None
        self._due = False  # an attempt is asked for
        self._changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, job) -> None:
        """Ask for a job and return at once; one that still waits is given up for this one."""
        with self._changed:
            self._pending, self._due = job, True
            self._changed.notify_all()

    def in_use(self) -> set:
        """Return the jobs that are being done, waiting, or to be tried again."""
        with self._changed:
            return {self._doing, self._pending} - {None}

    def finish(self, timeout: float | None = None) -> bool:
        """Try again what failed, wait (at most 300 s), and return whether the newest job is done.

        One that was waited for in vain is not waited for again.
        """
        limit = FINISH_SECONDS if timeout is None else timeout
        quiet = min(limit, QUIET_SECONDS)
        with self._changed:
            self._due = self._pending is not None  # during an attempt: taken up if that one fails
            self._changed.notify_all()
            if self.hangs:
                return False
        if not (idle := self._wait_idle(quiet)) and quiet < limit:
            self.report(f"{self.name} への保存が終わるのを待っています（最長 {limit:g} 秒）。")
            idle = self._wait_idle(limit - quiet)
        if not idle:
            self.report(
                f"{limit:g} 秒待ちましたが、{self.name} への保存が終わりません。"
                "結果はこのマシンにあるので、zip をダウンロードしてください。"
            )
        return self._pending is None

    def _wait_idle(self, seconds: float) -> bool:
        with self._changed:
            idle = self._changed.wait_for(lambda: not self._due and self._doing is None, seconds)
            self.hangs = not idle
            return idle

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._due)
                self._due, self._doing = False, self._pending
            done, line = self.work(self._doing)
            with suppress(Exception):  # an output that is gone must not end the thread
                if line:
                    self.report(line)
            with self._changed:
                if (
                    done and self._pending is self._doing
                ):  # the same object: one submitted again is done again
                    self._pending, self._due = None, False
                self._doing, self.hangs = None, False
                self._changed.notify_all()
