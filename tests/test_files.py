"""Folders with a manifest, files that only grow, and what a disk that fails or is full is told as."""

import errno
import os

import pytest
from faulty_drive import fail, no_fault

from dpo_helpers import files
from dpo_helpers.errors import UserError
from dpo_helpers.files import merge_lines, patiently, write_whole
from dpo_helpers.folders import read_manifest, verify_folder, write_manifest

# Unreadable is not absent

ERRORS = [errno.ENOTCONN, errno.EIO, errno.EACCES, errno.ESTALE]


@pytest.fixture
def whole(tmp_path):
    folder = tmp_path / "drive" / "slot-0"
    (folder / "ref").mkdir(parents=True)
    for name in ("a.bin", "ref/b.bin"):
        (folder / name).write_bytes(name.encode() * 100)
    write_manifest(folder, step=3)
    return folder


@pytest.mark.parametrize("number", ERRORS)
@pytest.mark.parametrize("name", ["manifest.json", "a.bin", "b.bin"])
def test_what_cannot_be_read_is_neither_absent_nor_damaged(whole, drive, monkeypatch, name, number):
    monkeypatch.setattr(files, "PATIENCE_SECONDS", 0.6)
    for operation in ("read", "stat") if name != "manifest.json" else ("read",):
        drive.fault = fail(number, operation, name=name)(None)
        with pytest.raises(OSError, match=os.strerror(number)):
            patiently(verify_folder, whole)
        drive.fault = fail(number, operation, name=name, seconds=0.3)(None)  # it passes
        assert patiently(verify_folder, whole)["step"] == 3


def test_absent_is_absent_and_another_content_is_damaged(whole):
    assert read_manifest(whole / "nowhere") is None and read_manifest(whole / "a.bin") is None
    (whole / "ref" / "b.bin").write_bytes(b"other")
    assert verify_folder(whole) is None and read_manifest(whole)["step"] == 3
    (whole / "ref" / "b.bin").unlink()
    assert verify_folder(whole) is None


def test_a_file_that_cannot_be_written_whole_stays_as_it_was_and_leaves_nothing_beside_it(
    tmp_path, monkeypatch
):
    write_whole(tmp_path / "metrics.json", "old")

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "metrics.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]
    assert (tmp_path / "metrics.json").read_text() == "old"


# What only grows


def merge(tmp_path, here: bytes, there: bytes, send=True):
    for name, content in (("here", here), ("there", there)):
        (tmp_path / name).write_bytes(content)
    merge_lines(tmp_path / "here", tmp_path / "there", send)
    return (tmp_path / "here").read_bytes(), (tmp_path / "there").read_bytes()


def test_votes_of_two_machines_are_put_together_and_none_is_lost_or_doubled(tmp_path):
    assert merge(tmp_path, b"3\n", b"1\n2\n") == (b"1\n2\n3\n", b"1\n2\n3\n")
    assert merge(tmp_path, b"3\n", b"1\n2\n", send=False) == (b"1\n2\n3\n", b"1\n2\n")
    assert merge(tmp_path, b"1\n1\n", b"1\n") == (b"1\n1\n", b"1\n1\n")  # two equal votes are two
    assert merge(tmp_path, b"", b"1\n2\n") == (b"1\n2\n", b"1\n2\n")
    assert (
        merge(tmp_path, b'{"a": 1}\n', b'{"b": 2}\n{"c": ') == (b'{"b": 2}\n{"a": 1}\n',) * 2
    )  # a torn line
    assert merge(tmp_path, b"2", b"1") == (b"1\n2\n",) * 2  # whole lines that lack their end


def test_votes_that_cannot_be_read_are_not_written_over(tmp_path, drive, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE_SECONDS", 0.1)
    drive.root.mkdir()
    (drive.root / "votes.jsonl").write_bytes(b"1\n" * 50)
    (tmp_path / "votes.jsonl").write_bytes(b"2\n")
    drive.fault = fail(errno.EIO, "read")(None)
    with pytest.raises(OSError, match="Input/output"):
        merge_lines(tmp_path / "votes.jsonl", drive.root / "votes.jsonl", send=True)
    drive.fault = no_fault
    assert (drive.root / "votes.jsonl").read_bytes() == b"1\n" * 50


# A full disk in the words of each library


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError(
            "[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/0"
        ),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_sentence_whoever_says_it(tmp_path, error):
    words = r"(?s)いっぱいで、.* に結果を書けませんでした。.*続きから始まります"
    with pytest.raises(UserError, match=words), files.tell_full_disk(tmp_path, "結果"):
        raise error
    assert "いっぱいです" in files.explain_error(error)


def test_other_errors_are_not_called_a_full_disk(tmp_path):
    with pytest.raises(KeyError), files.tell_full_disk(tmp_path, "結果"):
        raise KeyError("x")
    assert files.explain_error(KeyError("x")) is None
    assert "書き込める場所" in files.explain_error(
        PermissionError(errno.EACCES, "Permission denied", "/cache")
    )
