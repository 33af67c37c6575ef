"""Folders with a manifest, files that only grow, and what a disk that fails or is full is told as."""

import errno
import json
import os
import re
import tempfile
from pathlib import Path

import pytest
from faulty_drive import fail, no_fault
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpo_helpers import files
from dpo_helpers.errors import UserError
from dpo_helpers.files import merge_lines, patiently, write_whole
from dpo_helpers.folders import read_manifest, verify_folder, write_manifest

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
MANIFESTS = st.fixed_dictionaries({"files": st.dictionaries(NAMES, ENTRIES, max_size=3) | VALUES})
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
def test_a_manifest_is_accepted_only_with_whole_sizes_and_names_inside_the_folder(content):
    manifest = read_bytes_as_manifest(content)
    if manifest is None:
        return
    assert manifest == json.loads(content)
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


GOOD = {"step": 3, "files": {"a.bin": ENTRY, "ref/a..b": ENTRY, "日本語/manifest.json": ENTRY}}
NAMES_OUTSIDE = [
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
]


def test_a_good_manifest_is_accepted():
    assert read_bytes_as_manifest(json.dumps(GOOD).encode()) == GOOD


@pytest.mark.parametrize("name", [*NAMES_OUTSIDE, "a\0x", "\ud800", "manifest.json"])
def test_a_name_that_could_leave_the_folder_is_refused(name):
    content = json.dumps({**GOOD, "files": {"a.bin": ENTRY, name: ENTRY}}).encode()
    assert read_bytes_as_manifest(content) is None


WRONG_ENTRIES = [None, {}, {**ENTRY, "bytes": -1}, {**ENTRY, "sha256": "0" * 63}, {**ENTRY, "sha256": 0}]


@pytest.mark.parametrize("files", [[], *({"a": entry} for entry in WRONG_ENTRIES)])
def test_a_manifest_of_another_shape_is_refused(files):
    assert read_bytes_as_manifest(json.dumps({**GOOD, "files": files}).encode()) is None


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
    with pytest.raises(UserError, match=r"(?s)いっぱいで、.* に結果を書けませんでした。.*続きから始まります"):
        with files.tell_full_disk(tmp_path, "結果"):
            raise error
    assert "いっぱいです" in files.explain_error(error)


def test_other_errors_are_not_called_a_full_disk(tmp_path):
    with pytest.raises(KeyError), files.tell_full_disk(tmp_path, "結果"):
        raise KeyError("x")
    assert files.explain_error(KeyError("x")) is None
    assert "書き込める場所" in files.explain_error(
        PermissionError(errno.EACCES, "Permission denied", "/cache")
    )
