"""Folders with a manifest: whole or damaged, never outside themselves, and copied byte by byte."""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpo_helpers.folders import copy_in_place, copy_whole, read_manifest, verify_folder, write_manifest

WEIGHTS = "adapter_model.safetensors"


def contents(folder):
    paths = sorted(folder.rglob("*"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if path.is_file()}


def make_folder(folder, step=1, extra=("ref/adapter_model.safetensors",), size=3000):
    for number, name in enumerate((WEIGHTS, "trainer_state.json", *extra)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes((step * 7 + number + place) % 251 for place in range(size)))
    write_manifest(folder, step=step)
    return folder


def damage(path):
    path.write_bytes(b"?" + path.read_bytes()[1:])


def test_a_shorter_checkpoint_leaves_no_tail_of_the_longer_one(tmp_path):
    for step, size in ((1, 5000), (2, 20)):
        copy_in_place(make_folder(tmp_path / f"local-{step}", step, size=size), tmp_path / "slot-0")
    assert contents(tmp_path / "slot-0") == contents(tmp_path / "local-2")


def test_a_file_larger_than_what_is_copied_at_once_is_whole(tmp_path):
    copy_in_place(make_folder(tmp_path / "local", 1, size=3 * shutil.COPY_BUFSIZE + 1), tmp_path / "slot-0")
    assert contents(tmp_path / "slot-0") == contents(tmp_path / "local")


def test_a_preference_checkpoint_may_follow_a_warm_up_with_fewer_files(tmp_path):
    slot = tmp_path / "slot-0"
    copy_in_place(make_folder(tmp_path / "sft", 40, extra=()), slot)
    copy_in_place(make_folder(tmp_path / "dpo", 10), slot)
    assert verify_folder(slot) == read_manifest(tmp_path / "dpo")
    copy_in_place(tmp_path / "sft", slot)  # what it does not list stays where it is, and does not come back
    copy_whole(slot, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "sft")


@pytest.mark.parametrize("name", [WEIGHTS, "manifest.json"])
def test_a_restore_that_does_not_verify_leaves_nothing_behind(tmp_path, name):
    copy_in_place(make_folder(tmp_path / "local", 1), tmp_path / "slot-0")
    damage(tmp_path / "slot-0" / name)
    with pytest.raises(OSError, match="一致しません"):
        copy_whole(tmp_path / "slot-0", tmp_path / "target" / "checkpoint")
    assert list((tmp_path / "target").iterdir()) == []


def test_a_restore_from_nowhere_is_an_oserror(tmp_path):
    with pytest.raises(OSError):
        copy_whole(tmp_path / "slot-0", tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_a_restore_never_replaces_a_checkpoint_and_survives_an_interrupted_one(tmp_path):
    slot = tmp_path / "slot-0"
    copy_in_place(make_folder(tmp_path / "local", 1), slot)
    make_folder(tmp_path / "other.partial", 7)
    copy_whole(slot, tmp_path / "other")
    assert contents(tmp_path / "other") == contents(slot)
    make_folder(tmp_path / "taken", 8)
    before = contents(tmp_path / "taken")
    with pytest.raises(OSError):
        copy_whole(slot, tmp_path / "taken")
    assert contents(tmp_path / "taken") == before


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
