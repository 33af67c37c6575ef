"""A finished result is verified, repaired and delivered like a checkpoint, and packed without the machine."""

import json
import os
import zipfile
from pathlib import Path

import pytest
from faulty_drive import fail, no_fault
from made import CONFIG, SIDES, contents, make_checkpoint, make_result

from dpo_helpers import files
from dpo_helpers.errors import UserError
from dpo_helpers.folders import verify_folder
from dpo_helpers.keep.result import load_run, make_zip
from dpo_helpers.keep.run import open_run
from dpo_helpers.machine import find_machine

ADAPTER = "adapter_model.safetensors"


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A function that opens a run with its rows beside a folder that stands for Drive."""
    monkeypatch.setattr(files, "PATIENCE_SECONDS", 1)
    opened = []

    def start(folder="run", mirror="drive"):
        run = open_run(CONFIG, tmp_path / folder, find_machine("cpu"), mirror and tmp_path / mirror)
        opened.append(run)
        run.check_rows(*SIDES)
        return run

    yield start
    for run in opened:
        run.close()


@pytest.fixture
def delivered(start):
    """A run whose result and checkpoint are here and on Drive."""
    run = start()
    run.mirror.submit(make_checkpoint(run.checkpoints / "dpo-000008", step=8, identity=run.progress.identity))
    make_result(run.folder, **run.progress.identity)
    assert run.deliver()
    run.close()
    return run


def test_a_delivery_is_overwritten_in_place_and_compared(delivered, capsys, tmp_path):
    drive = tmp_path / "drive"
    here = {name: content for name, content in contents(delivered.folder).items() if name != "run.json"}
    assert here == {name: (drive / name).read_bytes() for name in here}
    inodes = {name: (drive / name).stat().st_ino for name in contents(drive)}
    (delivered.folder / "reference" / ADAPTER).write_bytes(b"trained again")
    make_result(delivered.folder, **delivered.progress.identity)
    assert delivered.deliver() and "一致することを確かめました" in capsys.readouterr().out
    assert {name: (drive / name).stat().st_ino for name in contents(drive)} == inodes


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("name", [ADAPTER, "metrics.json", "manifest.json", f"reference/{ADAPTER}"])
@pytest.mark.parametrize("harm", [empty, Path.unlink])
def test_a_damaged_result_is_repaired_from_the_mirror_and_never_overwrites_it(
    delivered, start, tmp_path, name, harm
):
    good = contents(tmp_path / "drive")
    harm(delivered.folder / name)
    assert delivered.deliver() is False and contents(tmp_path / "drive") == good
    again = start()
    assert again.read_finished()["steps"] == 8
    assert (again.folder / ADAPTER).read_bytes() == b"adapter" and again.deliver()
    changed = {name for name, content in contents(tmp_path / "drive").items() if good.get(name) != content}
    assert changed <= {"run.json"}


def test_a_damaged_result_without_a_mirror_is_made_again_from_the_checkpoint(delivered, start):
    empty(delivered.folder / ADAPTER)
    again = start(mirror=None)
    assert again.read_finished() is None and again.newest().ends_the_run


def test_a_new_machine_gets_the_whole_result(delivered, start):
    again = start("new machine")
    assert (
        again.read_finished()["steps"] == 8
        and (again.folder / "reference" / ADAPTER).read_bytes() == b"reference"
    )


def test_a_half_delivered_result_is_not_taken_and_is_made_whole(delivered, start, tmp_path):
    (tmp_path / "drive" / "manifest.json").write_text("{}")
    assert start("new machine").read_finished() is None
    assert start().deliver() and verify_folder(tmp_path / "drive")


OPERATIONS = [
    ("read", ADAPTER),
    ("read", "metrics.json"),
    ("read", "manifest.json"),
    ("read", "run.json"),
    ("list", ""),
]
OPERATIONS += [
    ("stat", ADAPTER),
    ("read", "optimizer.pt"),
    ("read", "progress.json"),
    ("read", "votes.jsonl"),
]


@pytest.mark.parametrize(("operation", "name"), OPERATIONS)
@pytest.mark.parametrize("place", ["run", "run.checkpoints", "drive"])
@pytest.mark.parametrize("seconds", [None, 0.5], ids=["lasting", "passing"])
def test_what_cannot_be_read_is_not_written_over(
    delivered, start, tmp_path, monkeypatch, operation, name, place, seconds
):
    """Whatever fails at a start, nothing changes but whose run it is; a fault that passes is waited for."""
    from faulty_drive import Drive

    for folder in (delivered.folder, tmp_path / "drive"):
        (folder / "votes.jsonl").write_text('{"vote": 1}\n' * 50)
    before = {folder: contents(tmp_path / folder) for folder in ("run", "run.checkpoints", "drive")}
    faulty = Drive(tmp_path / place, monkeypatch)
    faulty.fault = fail(5, operation, name=name, seconds=seconds)(None)
    try:
        run = start()
        assert run.newest().step == 8 and run.read_finished()["steps"] == 8
    except UserError as error:
        assert seconds is None and "まだ始めません" in str(error) and "Input/output error" in str(error)
    except OSError as error:  # between the start and the result
        assert seconds is None and error.errno == 5
    faulty.fault = no_fault
    for folder, files_before in before.items():
        now = contents(tmp_path / folder)
        assert {n: c for n, c in now.items() if n != "run.json"} == {
            n: c for n, c in files_before.items() if n != "run.json"
        }


# What only grows


def test_votes_on_drive_come_to_a_new_machine_and_are_never_fewer(delivered, start, tmp_path):
    votes, drive = (
        [json.dumps({"vote": number}) + "\n" for number in range(51)],
        tmp_path / "drive" / "votes.jsonl",
    )
    drive.write_text("".join(votes[:50]))
    again = start("new machine")
    with open(again.folder / "votes.jsonl", "a") as file:
        file.write(votes[50])
    again.deliver_votes()
    assert drive.read_text() == "".join(votes)
    (again.folder / "votes.jsonl").write_text(votes[3])
    assert again.read_finished() and again.deliver()
    assert drive.read_text() == (again.folder / "votes.jsonl").read_text() == "".join(votes)


# Zip and download


def test_the_zip_is_the_result_and_verifies_when_it_is_unpacked(delivered, tmp_path):
    (delivered.folder / "notes.txt").write_text("mine")
    archive = make_zip(delivered.folder)
    assert archive == tmp_path / "run.zip"
    zipfile.ZipFile(archive).extractall(tmp_path / "out")
    names = [ADAPTER, "manifest.json", "metrics.json", f"reference/{ADAPTER}", "run_config.json"]
    assert list(contents(tmp_path / "out" / "run")) == names and verify_folder(tmp_path / "out" / "run")
    before = archive.read_bytes()
    assert make_zip(delivered.folder) == archive and len(archive.read_bytes()) == len(before)


def test_a_zip_of_the_users_of_the_same_name_stays(delivered, tmp_path):
    with zipfile.ZipFile(tmp_path / "run.zip", "w") as mine:
        mine.writestr("mine.txt", "mine")
    (tmp_path / "run-2.zip").write_bytes(b"no zip at all")
    before = (tmp_path / "run.zip").read_bytes()
    assert make_zip(delivered.folder) == tmp_path / "run-3.zip" == make_zip(delivered.folder)
    assert (tmp_path / "run.zip").read_bytes() == before and (
        tmp_path / "run-2.zip"
    ).read_bytes() == b"no zip at all"


def test_a_zip_that_does_not_fit_leaves_the_earlier_one(delivered, monkeypatch):
    before = make_zip(delivered.folder).read_bytes()

    def full(*_, **__):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(UserError, match="いっぱい"):
        make_zip(delivered.folder)
    assert delivered.folder.with_name("run.zip").read_bytes() == before


def test_a_damaged_result_is_not_packed(delivered):
    empty(delivered.folder / ADAPTER)
    with pytest.raises(UserError, match="保存のセル"):
        make_zip(delivered.folder)


def test_an_incomplete_run_names_what_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        load_run(tmp_path)
