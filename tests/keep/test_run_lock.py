import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_helpers.errors import UserError
from dpo_helpers.keep import run_lock
from dpo_helpers.keep.run_lock import RunLock

ROOT = Path(__file__).parent.parent.parent
NOW = 1_000_000.0
WHOLE = {"host": "colab-b", "boot": "b-b-b", "pid": 77, "process_started": 5.0, "heartbeat": NOW, "beats": 3}
HOLDER = """
import sys, time
from dpo_helpers.keep.run_lock import RunLock
RunLock([sys.argv[1]]).acquire()
print("ready", flush=True)
time.sleep(60)
"""


class Clock:
    """A time that only sleep() moves; `events` are {seconds since the start: a call to make then}."""

    def __init__(self, events=()):
        self.now, self.sleeps, self.events = NOW, [], dict(events)

    def time(self):
        return self.now

    def sleep(self, seconds):
        self.sleeps.append(seconds)
        self.now += seconds
        for at in [at for at in self.events if NOW + at <= self.now]:
            self.events.pop(at)()


def make_lock(folders, clock=None, **options):
    clock, lines = clock or Clock(), []
    lock = RunLock(folders, report=lines.append, clock=clock.time, sleep=clock.sleep, **options)
    return lock, lines, clock


def write_other(folder, **changes):
    """Write the lock of another machine, whose heartbeat is fresh."""
    (folder / "run.lock").write_text(json.dumps(WHOLE | changes))


def read(folder):
    return json.loads((folder / "run.lock").read_text())


@pytest.fixture(autouse=True)
def synced(monkeypatch):
    """Count the calls of fsync without making them: on a busy disk each takes a tenth of a second."""
    calls = []
    monkeypatch.setattr(os, "fsync", calls.append)
    return calls


@pytest.fixture(autouse=True)
def no_thread_stays(monkeypatch, synced):
    made, acquire = [], RunLock.acquire
    monkeypatch.setattr(RunLock, "acquire", lambda self: (made.append(self), acquire(self))[1])
    yield
    for lock in made:
        lock.release()


@pytest.fixture
def start_holder(tmp_path):
    """Start a process that holds the lock of a folder and return it once it does."""
    started = []

    def start(folder):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_first_take_writes_who_holds_the_folder(tmp_path):
    lock, lines, clock = make_lock([tmp_path])
    lock.acquire()
    assert read(tmp_path) == {
        "host": os.uname().nodename,
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "pid": os.getpid(),
        "process_started": pytest.approx(psutil.Process().create_time() - psutil.boot_time(), abs=1),
        "heartbeat": NOW,
        "beats": 0,
    }
    assert lines == [] and clock.sleeps == [0.2] and lock.lost is False


def test_both_folders_are_locked_the_local_one_first(tmp_path):
    for name in ("local", "mirror"):
        (tmp_path / name).mkdir()
    write_other(tmp_path / "mirror")
    seen = []
    clock = Clock({2: lambda: seen.append(read(tmp_path / "local")["pid"])})
    make_lock([tmp_path / "local", tmp_path / "mirror"], clock)[0].acquire()
    assert seen == [os.getpid()]
    assert read(tmp_path / "mirror")["pid"] == os.getpid()


def test_a_released_lock_is_taken_without_a_word(tmp_path):
    lock, lines, _ = make_lock([tmp_path])
    lock.acquire()
    lock.release()
    assert read(tmp_path) == {"released": True}
    lock.release()
    lock.acquire()
    assert read(tmp_path)["pid"] == os.getpid() and lines == []


DAMAGED = [json.dumps({k: v for k, v in WHOLE.items() if k != name}) for name in WHOLE]
DAMAGED += [
    json.dumps(WHOLE | {name: bad})
    for name in WHOLE
    for bad in (None, [], {}, True, float("nan"), "\ud800", -(10**400))
]
DAMAGED += [json.dumps(WHOLE | {"pid": pid}) for pid in (0, 2**31, 1.5, "77")]
DAMAGED += [json.dumps(WHOLE | {"heartbeat": heartbeat}) for heartbeat in (float("inf"), 10**400, "now")]
DAMAGED += [
    "",
    " ",
    "null",
    "0",
    "[]",
    "{}",
    '"x"',
    '{"released": false}',
    '{"released": 1}',
    "[" * 100_000,
    "9" * 5000,
    '{"host"',
    "\0" * 600,
]


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_lock_is_taken_without_waiting(tmp_path, text):
    (tmp_path / "run.lock").write_text(text)
    lock, lines, clock = make_lock([tmp_path])
    lock.acquire()
    assert read(tmp_path)["pid"] == os.getpid() and lines == [] and clock.sleeps == [0.2]


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
NEAR_LOCKS = st.fixed_dictionaries({}, optional={name: SCALARS for name in (*WHOLE, "released")})
CONTENTS = st.binary(max_size=300) | NEAR_LOCKS.map(lambda value: json.dumps(WHOLE | value).encode())


@settings(max_examples=150, deadline=None)
@given(CONTENTS)
def test_whatever_the_file_holds_there_is_an_answer_within_90_seconds(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    (folder / "run.lock").write_bytes(content)
    lock, _, clock = make_lock([folder])
    lock.acquire()
    assert read(folder)["pid"] == os.getpid()
    assert sum(clock.sleeps) <= 90.2 + 1e-6
    lock.release()


def test_a_cell_that_is_run_again_keeps_its_own_lock(tmp_path):
    first, _, _ = make_lock([tmp_path])
    first.acquire()
    second, lines, clock = make_lock([tmp_path])
    second.acquire()
    second.acquire()
    assert lines == [] and clock.sleeps == []


def test_the_lock_left_by_the_first_run_of_a_cell_neither_beats_nor_releases_the_second(tmp_path):
    first, lines, _ = make_lock([tmp_path])
    first.acquire()
    second, _, _ = make_lock([tmp_path])
    second.acquire()
    first.release()
    assert read(tmp_path)["pid"] == os.getpid()
    first.acquire()
    second.beat()
    assert read(tmp_path)["beats"] == 0
    first.release()
    second.beat()
    assert read(tmp_path) == {"released": True}
    assert lines == [] and second.lost is False


def test_a_living_process_on_this_machine_is_refused_at_once_with_its_number(tmp_path, start_holder):
    holder = start_holder(tmp_path)
    before = read(tmp_path)
    lock, lines, clock = make_lock([tmp_path])
    with pytest.raises(UserError, match=f"プロセス番号 {holder.pid}") as error:
        lock.acquire()
    for words in (os.uname().nodename, "ランタイムを接続解除して削除", "RUN_DIR"):
        assert words in str(error.value)
    assert read(tmp_path) == before and lines == [] and clock.sleeps == []


@pytest.mark.parametrize("reaped", [True, False], ids=["gone", "zombie"])
def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path, start_holder, reaped):
    holder = start_holder(tmp_path)
    os.kill(holder.pid, signal.SIGKILL)
    if reaped:
        holder.wait()
    else:
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    lock, lines, clock = make_lock([tmp_path])
    lock.acquire()
    assert read(tmp_path)["pid"] == os.getpid() and clock.sleeps == [0.2]
    assert len(lines) == 1 and "引き継ぎます" in lines[0] and str(holder.pid) in lines[0]


def test_a_process_number_that_was_reused_is_a_dead_holder(tmp_path, start_holder):
    holder = start_holder(tmp_path)
    old = read(tmp_path)
    write_other(tmp_path, **old | {"process_started": old["process_started"] - 5})
    lock, lines, _ = make_lock([tmp_path])
    lock.acquire()
    assert read(tmp_path)["pid"] == os.getpid() != holder.pid and len(lines) == 1


def test_an_earlier_process_with_our_own_number_is_a_dead_holder(tmp_path):
    make_lock([tmp_path])[0].acquire()
    write_other(tmp_path, **read(tmp_path) | {"process_started": 0.5})
    lock, lines, clock = make_lock([tmp_path])
    lock.acquire()
    assert read(tmp_path)["process_started"] > 0.5 and len(lines) == 1 and clock.sleeps == [0.2]


def test_another_container_on_this_machine_is_judged_by_its_heartbeat_not_by_its_process_number(tmp_path):
    make_lock([tmp_path])[0].acquire()
    write_other(tmp_path, boot=read(tmp_path)["boot"], pid=2**31 - 1)  # a number that does not exist here
    lock, lines, clock = make_lock([tmp_path])
    lock.acquire()
    assert clock.now - NOW == pytest.approx(90.2) and len(lines) == 2


@pytest.mark.parametrize(
    ("heartbeat", "waits"),
    [
        (NOW - 1000, 0),
        (NOW - 90.001, 0),
        (NOW - 90, 0),
        (NOW - 89, 1),
        (NOW - 10, 80),
        (NOW, 90),
        (NOW + 1, 90),
        (NOW + 1e9, 90),
    ],
)
def test_another_machine_is_watched_until_its_heartbeat_is_90_seconds_old(tmp_path, heartbeat, waits):
    write_other(tmp_path, heartbeat=heartbeat)
    lock, lines, clock = make_lock([tmp_path])
    lock.acquire()
    assert clock.now - NOW == pytest.approx(waits + 0.2)
    assert read(tmp_path)["pid"] == os.getpid()
    assert "引き継ぎます" in lines[-1] and "colab-b" in lines[-1]
    assert [f"最大 {waits} 秒待ちます" in line for line in lines[:-1]] == ([True] if waits else [])


@pytest.mark.parametrize(
    "change",
    [{"heartbeat": NOW + 15}, {"beats": 4}, {"boot": "c-c-c", "host": "colab-c"}],
    ids=["time", "beats", "another"],
)
def test_a_lock_that_beats_while_it_is_watched_is_refused(tmp_path, change):
    write_other(tmp_path, heartbeat=NOW - 5)
    lock, lines, clock = make_lock(
        [tmp_path], Clock({15: lambda: write_other(tmp_path, **{"heartbeat": NOW - 5} | change)})
    )
    with pytest.raises(UserError, match="プロセス番号 77"):
        lock.acquire()
    assert clock.now == NOW + 16 and len(lines) == 1
    assert read(tmp_path) == WHOLE | {"heartbeat": NOW - 5} | change


def test_a_beat_at_the_last_moment_of_the_wait_is_still_seen(tmp_path):
    write_other(tmp_path)
    with pytest.raises(UserError):
        make_lock([tmp_path], Clock({90: lambda: write_other(tmp_path, beats=4)}))[0].acquire()


@pytest.mark.parametrize("ending", ["released", "deleted"])
def test_a_lock_that_is_given_up_while_it_is_watched_is_taken(tmp_path, ending):
    write_other(tmp_path)
    path = tmp_path / "run.lock"
    end = path.unlink if ending == "deleted" else lambda: path.write_text('{"released": true}')
    lock, lines, clock = make_lock([tmp_path], Clock({10: end}))
    lock.acquire()
    assert clock.now - NOW == pytest.approx(10.2) and read(tmp_path)["pid"] == os.getpid() and len(lines) == 1


def test_a_clock_that_is_set_back_during_the_wait_does_not_prolong_it(tmp_path):
    write_other(tmp_path)
    clock = Clock()
    clock.events[20] = lambda: setattr(clock, "now", NOW - 5000)
    make_lock([tmp_path], clock)[0].acquire()
    assert sum(clock.sleeps) == pytest.approx(90.2)


def test_reading_that_takes_time_does_not_prolong_the_wait(tmp_path, monkeypatch):
    write_other(tmp_path)
    clock, plain = Clock(), run_lock.read_lock

    def slow(path):
        clock.now += 5
        return plain(path)

    monkeypatch.setattr(run_lock, "read_lock", slow)
    make_lock([tmp_path], clock)[0].acquire()
    assert clock.now < NOW + 5 + 90 + 7 + 0.2 + 5 + 1


def test_the_slower_of_two_that_take_a_stale_lock_together_is_refused_and_leaves_the_file(tmp_path):
    write_other(tmp_path, heartbeat=NOW - 200)
    lock, _, _ = make_lock(
        [tmp_path], Clock({0.1: lambda: write_other(tmp_path, host="colab-c", boot="c-c-c")})
    )
    with pytest.raises(UserError, match="colab-c"):
        lock.acquire()
    assert read(tmp_path)["boot"] == "c-c-c"


def test_a_file_that_appears_just_before_the_first_take_is_not_overwritten(tmp_path, monkeypatch):
    plain = run_lock.read_lock

    def read_then_be_overtaken(path):
        found = plain(path)
        if found is None:
            write_other(tmp_path)
        return found

    monkeypatch.setattr(run_lock, "read_lock", read_then_be_overtaken)
    with pytest.raises(UserError, match="colab-b"):
        make_lock([tmp_path])[0].acquire()
    assert read(tmp_path) == WHOLE


def test_of_several_processes_that_start_together_at_most_one_gets_the_folder(tmp_path):
    code = HOLDER.replace(
        "RunLock([sys.argv[1]]).acquire()",
        "time.sleep(max(0, float(sys.argv[2]) - time.time()))\nRunLock([sys.argv[1]]).acquire()",
    )
    command = [
        sys.executable,
        "-c",
        code.replace("time.sleep(60)", "sys.stdin.read()"),
        str(tmp_path),
        str(time.time() + 1.5),
    ]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    processes = [subprocess.Popen(command, cwd=ROOT, text=True, **pipes) for _ in range(3)]
    try:
        winners = [process.stdout.readline() for process in processes].count("ready\n")
        assert winners == 1
    finally:
        for process in processes:
            process.communicate()


def test_a_beat_counts_reaches_the_disk_and_stays_in_the_same_file(tmp_path, synced):
    write_other(tmp_path, heartbeat=NOW - 200, host="x" * 2000)
    path = tmp_path / "run.lock"
    inode = path.stat().st_ino
    lock, _, clock = make_lock([tmp_path])
    lock.acquire()
    sizes = {path.stat().st_size}
    clock.now += 15.123456
    lock.beat()
    assert (read(tmp_path)["beats"], read(tmp_path)["heartbeat"]) == (1, clock.now)
    sizes.add(path.stat().st_size)
    assert len(synced) == 2
    lock.release()
    sizes.add(path.stat().st_size)
    assert path.stat().st_ino == inode and sizes == {512}
    assert os.listdir(tmp_path) == ["run.lock"]


def test_the_thread_beats_until_release(tmp_path):
    lock, _, _ = make_lock([tmp_path], interval=0.01)
    lock.acquire()
    limit = time.time() + 5
    while read(tmp_path)["beats"] < 3 and time.time() < limit:
        time.sleep(0.01)
    assert read(tmp_path)["beats"] >= 3
    lock.release()
    while any(thread.name == "run-lock" for thread in threading.enumerate()) and time.time() < limit:
        time.sleep(0.01)
    assert time.time() < limit
    assert read(tmp_path) == {"released": True}


def test_the_local_lock_beats_while_the_mirror_is_watched(tmp_path):
    for name in ("local", "mirror"):
        (tmp_path / name).mkdir()
    write_other(tmp_path / "mirror")
    seen = []
    clock = Clock({10: lambda: (time.sleep(0.2), seen.append(read(tmp_path / "local")["beats"]))})
    make_lock([tmp_path / "local", tmp_path / "mirror"], clock, interval=0.01)[0].acquire()
    assert seen[0] > 0


@pytest.mark.parametrize(
    "taken", [{"host": "colab-b"}, {"released": True}], ids=["holds it", "has finished with it"]
)
def test_a_beat_that_finds_a_takeover_says_so_once_and_leaves_the_file(tmp_path, taken):
    lock, lines, _ = make_lock([tmp_path])
    lock.acquire()
    write_other(tmp_path, **taken)
    before = read(tmp_path)
    lock.beat()
    lock.beat()
    assert lock.lost is True
    assert len(lines) == 1 and "引き継ぎました" in lines[0] and "止めてください" in lines[0]
    lock.release()
    assert read(tmp_path) == before


def test_a_takeover_of_the_mirror_leaves_the_local_lock_beating(tmp_path):
    for name in ("local", "mirror"):
        (tmp_path / name).mkdir()
    lock, lines, _ = make_lock([tmp_path / "local", tmp_path / "mirror"])
    lock.acquire()
    write_other(tmp_path / "mirror")
    lock.beat()
    assert lock.lost is True and read(tmp_path / "local")["beats"] == 1 and len(lines) == 1
    lock.release()
    assert read(tmp_path / "local") == {"released": True} and read(tmp_path / "mirror") == WHOLE


def test_a_takeover_of_both_folders_is_said_once(tmp_path):
    for name in ("local", "mirror"):
        (tmp_path / name).mkdir()
    lock, lines, _ = make_lock([tmp_path / "local", tmp_path / "mirror"])
    lock.acquire()
    write_other(tmp_path / "local")
    write_other(tmp_path / "mirror")
    lock.beat()
    assert lock.lost is True and len(lines) == 1


def test_a_release_leaves_a_lock_that_was_taken_over_since_the_last_beat(tmp_path):
    lock, _, _ = make_lock([tmp_path])
    lock.acquire()
    write_other(tmp_path)
    lock.release()
    assert read(tmp_path) == WHOLE


def test_acquire_after_a_lost_lock_starts_afresh(tmp_path):
    lock, _, _ = make_lock([tmp_path])
    lock.acquire()
    write_other(tmp_path, heartbeat=NOW - 100)
    lock.beat()
    lock.acquire()
    assert lock.lost is False and read(tmp_path)["pid"] == os.getpid()


def test_a_refused_mirror_frees_the_local_folder_again(tmp_path):
    for name in ("local", "mirror"):
        (tmp_path / name).mkdir()
    write_other(tmp_path / "mirror")
    clock = Clock({4: lambda: write_other(tmp_path / "mirror", beats=4)})
    with pytest.raises(UserError, match="mirror"):
        make_lock([tmp_path / "local", tmp_path / "mirror"], clock)[0].acquire()
    assert read(tmp_path / "local") == {"released": True}
    assert read(tmp_path / "mirror")["beats"] == 4


def test_stopping_the_cell_during_the_wait_frees_the_local_folder_again(tmp_path):
    for name in ("local", "mirror"):
        (tmp_path / name).mkdir()
    write_other(tmp_path / "mirror")

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_lock([tmp_path / "local", tmp_path / "mirror"], Clock({4: interrupt}))[0].acquire()
    assert read(tmp_path / "local") == {"released": True}


@pytest.mark.parametrize("kind", ["missing folder", "lock is a folder"])
def test_a_local_folder_that_cannot_be_written_says_so(tmp_path, kind):
    folder = tmp_path / "run"
    if kind == "lock is a folder":
        (folder / "run.lock").mkdir(parents=True)
    with pytest.raises(UserError, match=r"run に書き込めません（.+）。書き込める場所を RUN_DIR に"):
        make_lock([folder])[0].acquire()


@pytest.mark.parametrize("kind", ["missing folder", "lock is a folder", "I/O error"])
def test_a_mirror_that_cannot_be_used_is_left_out_with_one_line(tmp_path, kind, monkeypatch):
    local, mirror = tmp_path / "local", tmp_path / "mirror"
    local.mkdir()
    if kind == "lock is a folder":
        (mirror / "run.lock").mkdir(parents=True)
    if kind == "I/O error":
        mirror.mkdir()
        lose_mount(monkeypatch, mirror)
    lock, lines, _ = make_lock([local, mirror])
    lock.acquire()
    lock.beat()
    assert read(local)["beats"] == 1 and lock.lost is False
    assert len(lines) == 1 and str(mirror) in lines[0]
    lock.release()
    assert read(local) == {"released": True}


def lose_mount(monkeypatch, mirror):
    plain = run_lock._write

    def fail(path, *arguments):
        if path.parent == mirror:
            raise OSError(107, "Transport endpoint is not connected")
        plain(path, *arguments)

    monkeypatch.setattr(run_lock, "_write", fail)


def test_a_mirror_lost_during_the_run_stops_neither_the_beats_nor_the_release(tmp_path, monkeypatch):
    for name in ("local", "mirror"):
        (tmp_path / name).mkdir()
    lock, lines, _ = make_lock([tmp_path / "local", tmp_path / "mirror"])
    lock.acquire()
    with monkeypatch.context() as patch:
        lose_mount(patch, tmp_path / "mirror")
        lock.beat()
    assert (read(tmp_path / "local")["beats"], read(tmp_path / "mirror")["beats"]) == (1, 0)
    lock.beat()
    assert (read(tmp_path / "local")["beats"], read(tmp_path / "mirror")["beats"]) == (2, 2)
    lose_mount(monkeypatch, tmp_path / "mirror")
    lock.release()
    assert read(tmp_path / "local") == {"released": True} and read(tmp_path / "mirror")["beats"] == 2
    assert lines == [] and lock.lost is False


def test_release_before_acquire_does_nothing(tmp_path):
    lock, _, _ = make_lock([tmp_path])
    lock.release()
    lock.beat()
    assert os.listdir(tmp_path) == []


def test_without_a_boot_id_the_host_and_the_start_of_the_machine_name_the_boot(monkeypatch):
    monkeypatch.setattr(run_lock.Path, "is_file", lambda self: False)
    boot = run_lock._identity.__wrapped__(os.getpid())["boot"]
    assert boot == f"{os.uname().nodename}-{int(psutil.boot_time())}"
