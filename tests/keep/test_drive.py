"""The copy of the newest checkpoint on an unreliable folder: whatever fails there, training goes on and
one whole copy stays.
"""

import errno
import os
import time
from pathlib import Path

import pytest
from faulty_drive import FAULTS, WEIGHTS, contents, fail, no_fault, steps

from dpo_helpers import background
from dpo_helpers.folders import copy_in_place, copy_whole, read_manifest, write_manifest
from dpo_helpers.keep.checkpoints import find_valid_slots, order_of
from dpo_helpers.keep.drive import Mirror
from dpo_helpers.places import read_record

RECORD = {"format": 2, "first": "run", "number": 1, "settings": {}, "owner": "me"}


def open_mirror(folder, owner="me", report=print):
    return Mirror(folder, RECORD | {"owner": owner}, report)


def make_checkpoint(
    folder, step, stage="dpo", extra=("ref/adapter_model.safetensors",), size=3000, log_size=None
):
    """Write files of `size` bytes that depend on the step, with their manifest: a mirror reads no more."""
    for number, name in enumerate((WEIGHTS, "trainer_state.json", *extra)):
        length = log_size if log_size and name == "trainer_state.json" else size
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes((step * 7 + number + place) % 251 for place in range(length)))
    write_manifest(folder, stage=stage, step=step)
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().strip())  # no newline at its end: its last byte matters
    return folder


@pytest.fixture
def two_slots(tmp_path, drive):
    """A mirror whose slot-0 holds step 1 and whose slot-1 holds step 2, and the lines that it reports from
    now on.
    """
    lines = []
    kept = open_mirror(tmp_path / "drive" / "run", report=lines.append)
    for step in (1, 2):
        kept.submit(make_checkpoint(tmp_path / f"local-{step}", step))
        assert kept.finish(5)
    assert steps(kept.folder) == [("slot-1", 2), ("slot-0", 1)]
    assert lines == []
    return kept, lines


# What is kept


def test_a_checkpoint_comes_back_byte_for_byte(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "local", 10)
    kept = open_mirror(tmp_path / "drive")
    kept.submit(checkpoint)
    assert kept.finish(5) is True
    [(slot, manifest)] = find_valid_slots(tmp_path / "drive")
    assert manifest == read_manifest(checkpoint)
    copy_whole(slot, tmp_path / "new machine" / "checkpoint")
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
    kept, seen = open_mirror(tmp_path / "drive"), []
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
    slots = [f"{slot}/{name}" for slot in ("slot-0", "slot-1") for name in names]
    assert sorted(seen[1][0]) == ["run.json", *slots]
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


def test_the_first_preference_step_is_newer_than_the_last_warm_up_step(tmp_path):
    copy_in_place(make_checkpoint(tmp_path / "dpo", 0, stage="dpo"), tmp_path / "slot-0")
    copy_in_place(make_checkpoint(tmp_path / "sft", 900, stage="sft"), tmp_path / "slot-1")
    assert [(slot.name, order_of(manifest)) for slot, manifest in find_valid_slots(tmp_path)] == [
        ("slot-0", (1, 0)),
        ("slot-1", (0, 900)),
    ]


def test_after_a_restart_the_older_slot_is_the_one_written(tmp_path):
    for slot, step in (("slot-0", 20), ("slot-1", 10)):
        copy_in_place(make_checkpoint(tmp_path / f"local-{step}", step), tmp_path / slot)
    kept = open_mirror(tmp_path)
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
    again = open_mirror(kept.folder)
    again.submit(make_checkpoint(tmp_path / "local-3", 3))
    assert again.finish(5)
    assert steps(kept.folder) == [("slot-1", 3), ("slot-0", 1)]


def test_a_lone_slot_that_does_not_verify_now_is_spared(tmp_path):
    copy_in_place(make_checkpoint(tmp_path / "local-1", 1), tmp_path / "slot-0")
    damage(tmp_path / "slot-0" / WEIGHTS)
    kept = open_mirror(tmp_path)
    kept.submit(make_checkpoint(tmp_path / "local-2", 2))
    assert kept.finish(5)
    assert steps(tmp_path) == [("slot-1", 2)]


def test_a_missing_mirror_has_no_slots(tmp_path):
    assert find_valid_slots(tmp_path / "nowhere") == []


# Restoring


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
    kept = open_mirror(tmp_path / "drive", report=lines.append)
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

    kept = open_mirror(tmp_path / "drive", report=report)
    kept.submit(tmp_path / "never there")
    assert kept.finish(5) is False
    kept.submit(make_checkpoint(tmp_path / "local", 1))
    assert kept.finish(5) is True


def test_a_slow_mirror_delays_nothing_but_itself_and_copies_only_the_newest(
    two_slots, drive, tmp_path, monkeypatch
):
    kept, lines = two_slots
    monkeypatch.setattr(background, "QUIET_SECONDS", 0.05)
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
    monkeypatch.setattr(background, "QUIET_SECONDS", 0.05)
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
    kept = open_mirror(tmp_path / "drive")
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
        copy_in_place(first, folder / "slot-0")
        copy_in_place(second, folder / "slot-1")
        drive.fault = kill_at(number)
        try:
            copy_in_place(third, folder / "slot-0")
        except Killed:
            found.append(steps(folder))
            drive.fault = no_fault
            again = open_mirror(folder)
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
        copy_in_place(first, folder / "slot-0")
        drive.fault = kill_at(number)
        with pytest.raises(Killed):
            copy_in_place(second, folder / "slot-1")
        drive.fault = no_fault
        assert steps(folder) == [("slot-0", 1)]


# The newer notebook wins


def test_the_newer_notebook_takes_the_mirror_and_the_older_one_writes_no_more(tmp_path):
    lines = []
    older = open_mirror(tmp_path / "drive", "older", lines.append)
    older.submit(make_checkpoint(tmp_path / "local-1", 1))
    assert older.finish(5)
    newer = open_mirror(tmp_path / "drive", "newer")
    newer.submit(make_checkpoint(tmp_path / "local-2", 2))
    assert newer.finish(5)
    before = contents(tmp_path / "drive")
    older.submit(make_checkpoint(tmp_path / "local-3", 3))
    assert older.finish(5) is False and older.taken and contents(tmp_path / "drive") == before
    assert len(lines) == 1 and "あとから始めた別のノートブックが引き継ぎました" in lines[0]
    assert "もう一度試します" not in lines[0]
    newer.submit(tmp_path / "local-3")
    assert newer.finish(5) and not newer.taken and steps(tmp_path / "drive")[0] == ("slot-0", 3)


def test_a_token_that_cannot_be_read_stops_the_copy_and_one_that_is_torn_or_gone_is_written_again(
    tmp_path, drive
):
    kept = open_mirror(drive.root)
    for damage in (lambda path: path.write_text('{"owner": "m'), Path.unlink):
        damage(drive.root / "run.json")
        kept.submit(make_checkpoint(tmp_path / f"local-{damage.__name__}", 1))
        assert kept.finish(5) and read_record(drive.root)["owner"] == "me"
    before = contents(drive.root)
    drive.fault = fail(errno.EIO, "read", name="run.json")(None)
    kept.submit(make_checkpoint(tmp_path / "local-2", 2))
    assert kept.finish(5) is False and not kept.taken
    drive.fault = no_fault
    assert contents(drive.root) == before and kept.finish(5)


def test_a_mirror_that_could_not_be_claimed_at_the_start_is_claimed_at_the_first_copy(tmp_path, drive):
    open_mirror(drive.root, "older")
    drive.fault = fail(errno.EIO, "open")(None)
    newer = open_mirror(drive.root, "newer")
    drive.fault = no_fault
    newer.submit(make_checkpoint(tmp_path / "local", 1))
    assert newer.finish(5) and read_record(drive.root)["owner"] == "newer"


def test_a_slot_that_cannot_be_read_is_not_written(tmp_path, drive):
    drive.root.mkdir()
    copy_in_place(make_checkpoint(tmp_path / "local-1", 1), drive.root / "slot-0")
    before = contents(drive.root)
    drive.fault = fail(errno.EIO, "read", name=WEIGHTS)(None)
    kept = open_mirror(drive.root)
    kept.submit(make_checkpoint(tmp_path / "local-2", 2))
    assert kept.finish(5) is False
    drive.fault = no_fault
    assert {name: data for name, data in contents(drive.root).items() if name != "run.json"} == before
    assert kept.finish(5) and steps(drive.root) == [("slot-1", 2), ("slot-0", 1)]
