"""The copy of the newest checkpoint on an unreliable folder: whatever fails there, training goes on and
one whole copy stays.
"""

import errno
import json
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest
from faulty_drive import FAULTS, WEIGHTS, contents, fail, no_fault, steps
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpo_helpers.files import hash_file
from dpo_helpers.keep import mirror
from dpo_helpers.keep.mirror import (
    Mirror,
    find_valid_slots,
    order_of,
    read_manifest,
    restore_slot,
    verify_folder,
    write_slot,
)


def make_checkpoint(
    folder, step, stage="dpo", extra=("ref/adapter_model.safetensors",), size=3000, log_size=None
):
    """Write a checkpoint whose files have `size` bytes that depend on the step, with its manifest (no
    newline at its end).
    """
    folder.mkdir(parents=True)
    files = {}
    for number, name in enumerate((WEIGHTS, "trainer_state.json", *extra)):
        length = log_size if log_size and name == "trainer_state.json" else size
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(bytes((step * 7 + number + place) % 251 for place in range(length)))
        files[name] = {"bytes": length, "sha256": hash_file(folder / name)}
    (folder / "manifest.json").write_text(json.dumps({"stage": stage, "step": step, "files": files}))
    return folder


@pytest.fixture
def two_slots(tmp_path, drive):
    """A mirror whose slot-0 holds step 1 and whose slot-1 holds step 2, and the lines that it reports from
    now on.
    """
    lines = []
    kept = Mirror(tmp_path / "drive" / "run", report=lines.append)
    for step in (1, 2):
        kept.submit(make_checkpoint(tmp_path / f"local-{step}", step))
        assert kept.finish(5)
    assert steps(kept.folder) == [("slot-1", 2), ("slot-0", 1)]
    assert lines == []
    return kept, lines


# What is kept


def test_a_checkpoint_comes_back_byte_for_byte(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "local", 10)
    kept = Mirror(tmp_path / "drive")
    kept.submit(checkpoint)
    assert kept.finish(5) is True
    [(slot, manifest)] = find_valid_slots(tmp_path / "drive")
    assert manifest == read_manifest(checkpoint)
    restore_slot(slot, tmp_path / "new machine" / "checkpoint")
    assert contents(tmp_path / "new machine" / "checkpoint") == contents(checkpoint)
    assert [path.name for path in (tmp_path / "new machine").iterdir()] == ["checkpoint"]


def test_over_fifty_checkpoints_the_mirror_grows_by_the_log_alone_and_nothing_there_is_deleted_or_renamed(
    tmp_path, monkeypatch
):
    touched = []

    def record(name):
        original = getattr(os, name)

        def recorded(path, *args, **kwargs):
            touched.extend(
                (name, str(place))
                for place in (path, *args)
                if str(place).startswith(str(tmp_path / "drive"))
            )
            return original(path, *args, **kwargs)

        monkeypatch.setattr(os, name, recorded)

    for name in ("remove", "unlink", "rename", "replace", "rmdir"):
        record(name)
    kept, seen = Mirror(tmp_path / "drive"), []
    for step in range(100, 150):
        kept.submit(make_checkpoint(tmp_path / f"local-{step}", step, size=500, log_size=10 * step))
        assert kept.finish(5)
        files = {path: path.stat() for path in (tmp_path / "drive").rglob("*") if path.is_file()}
        inodes = {
            path.relative_to(tmp_path / "drive").as_posix(): stat.st_ino for path, stat in files.items()
        }
        seen.append((inodes, sum(stat.st_size for stat in files.values()), steps(tmp_path / "drive")))
    names = (
        "adapter_model.safetensors",
        "manifest.json",
        "ref/adapter_model.safetensors",
        "trainer_state.json",
    )
    assert sorted(seen[1][0]) == [f"{slot}/{name}" for slot in ("slot-0", "slot-1") for name in names]
    assert all(inodes == seen[1][0] for inodes, *_ in seen[1:])  # the very same files
    assert [size - seen[1][1] for _, size, _ in seen[1:]] == [
        2 * 10 * number for number in range(49)
    ]  # both logs, 10 bytes a step
    assert [found for *_, found in seen][:3] == [
        [("slot-0", 100)],
        [("slot-1", 101), ("slot-0", 100)],
        [("slot-0", 102), ("slot-1", 101)],
    ]
    assert seen[-1][2] == [("slot-1", 149), ("slot-0", 148)]
    assert touched == []


def test_a_shorter_checkpoint_leaves_no_tail_of_the_longer_one(tmp_path):
    for step, size in ((1, 5000), (2, 20)):
        write_slot(make_checkpoint(tmp_path / f"local-{step}", step, size=size), tmp_path / "slot-0")
    assert contents(tmp_path / "slot-0") == contents(tmp_path / "local-2")


def test_a_file_larger_than_what_is_copied_at_once_is_whole(tmp_path):
    write_slot(make_checkpoint(tmp_path / "local", 1, size=3 * shutil.COPY_BUFSIZE + 1), tmp_path / "slot-0")
    assert contents(tmp_path / "slot-0") == contents(tmp_path / "local")


def test_a_preference_checkpoint_may_follow_a_warm_up_with_fewer_files(tmp_path):
    slot = tmp_path / "slot-0"
    write_slot(make_checkpoint(tmp_path / "sft", 40, stage="sft", extra=()), slot)
    write_slot(make_checkpoint(tmp_path / "dpo", 10), slot)
    assert verify_folder(slot) == read_manifest(tmp_path / "dpo")
    write_slot(tmp_path / "sft", slot)  # what it does not list stays where it is, and does not come back
    restore_slot(slot, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "sft")


def test_the_first_preference_step_is_newer_than_the_last_warm_up_step(tmp_path):
    write_slot(make_checkpoint(tmp_path / "dpo", 0, stage="dpo"), tmp_path / "slot-0")
    write_slot(make_checkpoint(tmp_path / "sft", 900, stage="sft"), tmp_path / "slot-1")
    assert [(slot.name, order_of(manifest)) for slot, manifest in find_valid_slots(tmp_path)] == [
        ("slot-0", (1, 0)),
        ("slot-1", (0, 900)),
    ]


def test_after_a_restart_the_older_slot_is_the_one_written(tmp_path):
    for slot, step in (("slot-0", 20), ("slot-1", 10)):
        write_slot(make_checkpoint(tmp_path / f"local-{step}", step), tmp_path / slot)
    kept = Mirror(tmp_path)
    kept.submit(make_checkpoint(tmp_path / "local-30", 30))
    assert kept.finish(5)
    assert steps(tmp_path) == [("slot-1", 30), ("slot-0", 20)]


def damage(path):
    path.write_bytes(b"?" + path.read_bytes()[1:])


@pytest.mark.parametrize(
    "harm",
    [damage, lambda path: path.write_bytes(path.read_bytes()[:-1]), Path.unlink],
    ids=["bit", "tail", "missing"],
)
@pytest.mark.parametrize("name", [WEIGHTS, "ref/adapter_model.safetensors", "manifest.json"])
def test_a_damaged_newest_slot_gives_way_to_the_other_and_is_written_next(two_slots, tmp_path, harm, name):
    kept, _ = two_slots
    harm(kept.folder / "slot-1" / name)
    assert steps(kept.folder) == [("slot-0", 1)]
    again = Mirror(kept.folder)
    again.submit(make_checkpoint(tmp_path / "local-3", 3))
    assert again.finish(5)
    assert steps(kept.folder) == [("slot-1", 3), ("slot-0", 1)]


def test_a_lone_slot_that_does_not_verify_now_is_spared(tmp_path):
    write_slot(make_checkpoint(tmp_path / "local-1", 1), tmp_path / "slot-0")
    damage(tmp_path / "slot-0" / WEIGHTS)
    kept = Mirror(tmp_path)
    kept.submit(make_checkpoint(tmp_path / "local-2", 2))
    assert kept.finish(5)
    assert steps(tmp_path) == [("slot-1", 2)]


def test_a_missing_mirror_has_no_slots(tmp_path):
    assert find_valid_slots(tmp_path / "nowhere") == []


# Restoring


@pytest.mark.parametrize("name", [WEIGHTS, "manifest.json"])
def test_a_restore_that_does_not_verify_leaves_nothing_behind(tmp_path, name):
    write_slot(make_checkpoint(tmp_path / "local", 1), tmp_path / "slot-0")
    damage(tmp_path / "slot-0" / name)
    with pytest.raises(OSError, match="一致しません"):
        restore_slot(tmp_path / "slot-0", tmp_path / "target" / "checkpoint")
    assert list((tmp_path / "target").iterdir()) == []


def test_a_restore_from_nowhere_is_an_oserror(tmp_path):
    with pytest.raises(OSError):
        restore_slot(tmp_path / "slot-0", tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_a_restore_never_replaces_a_checkpoint_and_survives_an_interrupted_one(tmp_path):
    slot = tmp_path / "slot-0"
    write_slot(make_checkpoint(tmp_path / "local", 1), slot)
    make_checkpoint(tmp_path / "other.partial", 7)
    restore_slot(slot, tmp_path / "other")
    assert contents(tmp_path / "other") == contents(slot)
    make_checkpoint(tmp_path / "taken", 8)
    before = contents(tmp_path / "taken")
    with pytest.raises(OSError):
        restore_slot(slot, tmp_path / "taken")
    assert contents(tmp_path / "taken") == before


# What fails


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_costs_one_line_and_neither_training_nor_the_last_good_slot(two_slots, drive, tmp_path, name):
    kept, lines = two_slots
    make_fault, reason = FAULTS[name]
    checkpoint = make_checkpoint(tmp_path / "local-3", 3)
    local, last_good = contents(checkpoint), contents(kept.folder / "slot-1")
    drive.fault = make_fault(checkpoint)
    kept.submit(checkpoint)
    assert kept.finish(5) is False
    assert kept.finish(5) is False  # the same kind of problem is not told twice
    [line] = lines
    assert reason in line and reason in kept.problem and str(kept.folder) in line and "\n" not in line
    assert "学習はこのまま続き、結果はこのマシンに残ります。次のチェックポイントでもう一度試します。" in line
    drive.fault = no_fault
    assert contents(checkpoint) == local
    assert contents(kept.folder / "slot-1") == last_good
    assert steps(kept.folder)[0] == ("slot-1", 2)
    assert kept.in_use() == {checkpoint}

    kept.submit(make_checkpoint(tmp_path / "local-4", 4))
    assert kept.finish(5) is True
    assert lines[1:] == [f"{kept.folder} にまた保存できるようになりました。local-4 を保存しました。"]
    assert steps(kept.folder) == [("slot-0", 4), ("slot-1", 2)]
    assert (kept.problem, kept.in_use()) == (None, set())


def test_finish_tries_again_what_failed(two_slots, drive, tmp_path):
    kept, lines = two_slots
    drive.fault = fail(errno.EIO, "write")(None)
    kept.submit(make_checkpoint(tmp_path / "local-3", 3))
    assert kept.finish(5) is False
    drive.fault = no_fault
    assert kept.finish(5) is True
    assert kept.finish(5) is True
    assert steps(kept.folder) == [("slot-0", 3), ("slot-1", 2)]
    assert len(lines) == 2


def test_another_kind_of_problem_is_told_too_but_each_only_once(two_slots, drive, tmp_path):
    kept, lines = two_slots
    for number in (errno.ENOSPC, errno.EROFS, errno.ENOSPC, errno.EDQUOT):
        drive.fault = fail(number, "open")(None)
        kept.submit(tmp_path / "local-2")
        assert kept.finish(5) is False
    assert len(lines) == 2
    assert "空き容量" in lines[0] and "読み取り専用" in lines[1]


def test_a_problem_that_comes_back_after_a_recovery_is_told_again(two_slots, drive, tmp_path):
    kept, lines = two_slots
    for works in (False, True, False):
        drive.fault = no_fault if works else fail(errno.ENOSPC, "open")(None)
        kept.submit(tmp_path / "local-2")
        assert kept.finish(5) is works
    assert len(lines) == 3
    assert lines[0] == lines[2] and "空き容量" in lines[0] and "また保存できる" in lines[1]


def test_a_lost_mount_is_not_replaced_by_a_folder_on_this_machine(two_slots, tmp_path):
    kept, lines = two_slots
    (tmp_path / "drive").rename(tmp_path / "gone")
    kept.submit(make_checkpoint(tmp_path / "local-3", 3))
    assert kept.finish(5) is False
    assert not (tmp_path / "drive").exists()
    assert len(lines) == 1 and "つながりません" in lines[0]
    (tmp_path / "gone").rename(tmp_path / "drive")
    assert kept.finish(5) is True
    assert steps(kept.folder) == [("slot-0", 3), ("slot-1", 2)]


def test_a_mirror_that_cannot_be_made_says_so_at_the_first_checkpoint(tmp_path, drive):
    lines, drive.fault = [], fail(errno.EROFS, "mkdir")(None)
    kept = Mirror(tmp_path / "drive", report=lines.append)
    kept.submit(make_checkpoint(tmp_path / "local", 1))
    assert kept.finish(5) is False
    assert len(lines) == 1 and "読み取り専用" in lines[0]


def test_a_local_checkpoint_that_is_gone_is_not_blamed_on_the_mirror(two_slots, tmp_path):
    kept, lines = two_slots
    checkpoint = make_checkpoint(tmp_path / "local-3", 3)
    (checkpoint / WEIGHTS).unlink()
    for folder in (checkpoint, tmp_path / "never there"):
        kept.submit(folder)
        assert kept.finish(5) is False
    assert len(lines) == 1 and "このマシンのチェックポイントを読めません" in lines[0]
    assert steps(kept.folder)[0] == ("slot-1", 2)


def test_an_unexpected_error_is_told_and_the_thread_lives_on(two_slots, drive, tmp_path):
    kept, lines = two_slots

    def fault(operation, path, data):
        raise RuntimeError("a mistake of ours")

    drive.fault = fault
    kept.submit(make_checkpoint(tmp_path / "local-3", 3))
    assert kept.finish(5) is False
    assert len(lines) == 1 and "RuntimeError('a mistake of ours')" in lines[0]
    drive.fault = no_fault
    assert kept.finish(5) is True


def test_a_report_that_fails_does_not_end_the_thread(tmp_path):
    def report(line):
        raise BrokenPipeError

    kept = Mirror(tmp_path / "drive", report=report)
    kept.submit(tmp_path / "never there")
    assert kept.finish(5) is False
    kept.submit(make_checkpoint(tmp_path / "local", 1))
    assert kept.finish(5) is True


def test_a_slow_mirror_delays_nothing_but_itself_and_copies_only_the_newest(
    two_slots, drive, tmp_path, monkeypatch
):
    kept, lines = two_slots
    monkeypatch.setattr(mirror, "QUIET_SECONDS", 0.05)
    answers, checkpoints = (
        drive.hang(WEIGHTS),
        [make_checkpoint(tmp_path / f"local-{step}", step) for step in (3, 4, 5)],
    )
    for checkpoint in checkpoints:
        start = time.perf_counter()
        kept.submit(checkpoint)
        assert time.perf_counter() - start < 0.05
        assert drive.hangs.wait(5)
    assert kept.in_use() == {checkpoints[0], checkpoints[2]}
    answers.set()
    assert kept.finish() is True
    assert lines in ([], [f"{kept.folder} への保存が終わるのを待っています（最長 300 秒）。"])
    assert steps(kept.folder) == [("slot-1", 5), ("slot-0", 3)]  # never 4


def test_a_mirror_that_hangs_is_waited_for_once(two_slots, drive, tmp_path, monkeypatch):
    kept, lines = two_slots
    monkeypatch.setattr(mirror, "QUIET_SECONDS", 0.05)
    answers, last = drive.hang(WEIGHTS), make_checkpoint(tmp_path / "local-3", 3)
    kept.submit(last)
    assert kept.finish(0.2) is False and kept.hangs
    start = time.perf_counter()
    assert kept.finish() is False and kept.in_use() == {last}
    assert time.perf_counter() - start < 0.2
    assert lines == [
        f"{kept.folder} への保存が終わるのを待っています（最長 0.2 秒）。",
        f"0.2 秒待ちましたが、{kept.folder} への保存が終わりません。"
        "結果はこのマシンにあるので、zip をダウンロードしてください。",
    ]
    answers.set()
    while kept.hangs and time.perf_counter() < start + 5:
        time.sleep(0.01)
    assert kept.finish(5) is True and len(lines) == 2
    assert steps(kept.folder) == [("slot-0", 3), ("slot-1", 2)]


def test_nothing_submitted_is_nothing_missing(tmp_path):
    kept = Mirror(tmp_path / "drive")
    assert (kept.finish(5), kept.problem, kept.in_use()) == (True, None, set())


# A machine that stops at any moment


class Killed(BaseException):
    """Passes every `except Exception`, as the end of the machine would."""


def kill_at(number):
    count = 0

    def fault(operation, path, data):
        nonlocal count
        if operation in ("stat", "read"):  # changes nothing there
            return data
        if count == number:
            raise Killed
        count += 1
        return data

    return fault


def test_killed_at_any_operation_one_slot_is_whole_and_the_newest_whole_one_is_found(tmp_path, drive):
    first, second, third, fourth = (
        make_checkpoint(tmp_path / f"local-{step}", step, size=40) for step in (1, 2, 3, 4)
    )
    folder = tmp_path / "drive"
    folder.mkdir()
    found = []
    for number in range(1000):
        drive.fault = no_fault
        write_slot(first, folder / "slot-0")
        write_slot(second, folder / "slot-1")
        drive.fault = kill_at(number)
        try:
            write_slot(third, folder / "slot-0")
        except Killed:
            found.append(steps(folder))
            drive.fault = no_fault
            again = Mirror(folder)
            again.submit(fourth)
            assert again.finish(5)
            assert steps(folder)[:1] == [("slot-1" if found[-1][0][1] == 3 else "slot-0", 4)]
            assert len(steps(folder)) == 2
        else:
            break
    # mkdir slot; "{}" is open, 2 halves, truncate, fsync; then 3 files, of which each asks for its folder;
    # then the manifest
    assert len(found) == 1 + 5 + 3 * (1 + 5) + 5
    before, during, after = [("slot-1", 2), ("slot-0", 1)], [("slot-1", 2)], [("slot-0", 3), ("slot-1", 2)]
    assert sorted(found, key=[before, during, after].index) == found
    # Still step 1: up to the second operation on "{}" (half of it equals the old manifest's first byte); step
    # 3: its manifest is written.
    assert [found.count(state) for state in (before, during, after)] == [4, len(found) - 6, 2]


def test_killed_while_a_new_slot_is_made_the_other_stays(tmp_path, drive):
    first, second = (make_checkpoint(tmp_path / f"local-{step}", step, size=40) for step in (1, 2))
    for number in range(1 + 5 + 3 * (1 + 5) + 3):  # as above, up to the last half of the manifest
        folder = tmp_path / "drive" / str(number)
        folder.mkdir(parents=True)
        write_slot(first, folder / "slot-0")
        drive.fault = kill_at(number)
        with pytest.raises(Killed):
            write_slot(second, folder / "slot-1")
        drive.fault = no_fault
        assert steps(folder) == [("slot-0", 1)]


# Manifests that anybody may have written

ENTRY = {"bytes": 3, "sha256": "0" * 64}
PARTS = st.sampled_from(
    ["..", ".", "", "/", "a", "b.json", "ref", "\\", "C:", "\0", "manifest.json", "\ud800", "é"]
)
NAMES = st.lists(PARTS, max_size=4).map("/".join) | st.text(max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ENTRIES = (
    st.just(ENTRY)
    | VALUES
    | st.fixed_dictionaries({"bytes": VALUES | st.just(1), "sha256": VALUES | st.just("a" * 64)})
)
MANIFESTS = st.fixed_dictionaries(
    {
        "stage": st.sampled_from(["sft", "dpo"]) | VALUES,
        "step": st.integers(0, 9) | VALUES,
        "files": st.dictionaries(NAMES, ENTRIES, max_size=3) | VALUES,
    }
)
GARBAGE = st.binary(max_size=60) | (VALUES | MANIFESTS).map(lambda value: json.dumps(value).encode())


def read_bytes_as_manifest(content):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "manifest.json").write_bytes(content)
        assert verify_folder(folder) is None or json.loads(content)["files"] == {}
        return read_manifest(folder)


@settings(max_examples=300, deadline=None)
@example(b"[" * 100_000)
@example(b"{}")
@example(b"\xff\xfe")
@example(b'{"stage": "dpo", "step": ' + b"9" * 5000 + b', "files": {}}')
@given(GARBAGE)
def test_a_manifest_is_accepted_only_with_known_stage_whole_step_and_names_inside_the_folder(content):
    manifest = read_bytes_as_manifest(content)
    if manifest is None:
        return
    assert manifest == json.loads(content)
    assert manifest["stage"] in ("sft", "dpo") and type(manifest["step"]) is int and manifest["step"] >= 0
    for name, entry in manifest["files"].items():
        assert (
            re.fullmatch(r"[^/\\:\0]+(/[^/\\:\0]+)*", name)
            and not {".", ".."} & {*name.split("/")}
            and name != "manifest.json"
        )
        assert os.path.normpath(f"/root/{name}") == f"/root/{name}"
        assert (
            type(entry["bytes"]) is int
            and entry["bytes"] >= 0
            and re.fullmatch("[0-9a-f]{64}", entry["sha256"])
        )


GOOD = {
    "stage": "dpo",
    "step": 3,
    "files": {"a.bin": ENTRY, "ref/a..b": ENTRY, "日本語/manifest.json": ENTRY},
}


def test_a_good_manifest_is_accepted():
    assert read_bytes_as_manifest(json.dumps(GOOD).encode()) == GOOD


@pytest.mark.parametrize(
    "name",
    [
        "..",
        "../x",
        "a/../x",
        "a/..",
        "/x",
        "//x",
        "a\\x",
        "..\\x",
        "C:/x",
        "C:x",
        "",
        ".",
        "./x",
        "a//x",
        "a/",
        "a\0x",
        "\ud800",
        "manifest.json",
    ],
)
def test_a_name_that_could_leave_the_folder_is_refused(name):
    assert (
        read_bytes_as_manifest(json.dumps({**GOOD, "files": {"a.bin": ENTRY, name: ENTRY}}).encode()) is None
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"stage": "ppo"},
        {"stage": ["dpo"]},
        {"step": -1},
        {"step": True},
        {"step": 1.0},
        {"step": "1"},
        {"step": None},
        {"files": []},
    ]
    + [
        {"files": {"a": entry}}
        for entry in (None, {}, {**ENTRY, "bytes": -1}, {**ENTRY, "sha256": "0" * 63}, {**ENTRY, "sha256": 0})
    ],
)
def test_a_manifest_of_another_shape_is_refused(wrong):
    assert read_bytes_as_manifest(json.dumps({**GOOD, **wrong}).encode()) is None


@pytest.mark.parametrize("number", [errno.ENOTCONN, errno.EIO, errno.EACCES])
def test_a_lost_mount_reads_as_no_checkpoint(tmp_path, monkeypatch, number):
    write_slot(make_checkpoint(tmp_path / "local", 1), tmp_path / "slot-0")

    def lost(*_, **__):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(mirror, "hash_file", lost)
        assert (verify_folder(tmp_path / "slot-0"), find_valid_slots(tmp_path)) == (None, [])
        patch.setattr(Path, "read_bytes", lost)
        assert read_manifest(tmp_path / "slot-0") is None


def test_the_module_needs_no_torch():
    import subprocess

    code = "import sys, dpo_helpers.keep.mirror; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
