"""A file of the user's own computer comes to Colab and to Drive, and replaces no other."""

from pathlib import Path

import pytest

from dpo_helpers import colab as upload
from dpo_helpers.errors import UserError
from dpo_helpers.colab import mount_drive


def test_without_an_upload_the_form_says_which_file(colab):
    assert upload.choose_data_file("  rows.csv ", False, None) == "rows.csv"
    assert upload.choose_data_file("", False, colab.drive) == ""


@pytest.mark.parametrize("names", [[], ["a.csv", "b.csv"]])
def test_an_upload_of_none_or_several_files_says_how_many(colab, names):
    colab.picked = dict.fromkeys(names, b"")
    with pytest.raises(UserError, match=rf"選ばれた数：{len(names)}.*UPLOAD_FILE をオフ"):
        upload.choose_data_file("", True, None)


def test_an_upload_off_colab_says_what_to_do_instead():
    with pytest.raises(UserError, match="UPLOAD_FILE をオフにして、DATA_FILE に"):
        upload.choose_data_file("", True, None)


def test_an_upload_without_drive_stays_on_this_machine(colab, capsys):
    colab.picked = {"rows.csv": b"first"}
    assert Path(upload.choose_data_file("ignored.csv", True, None)).read_bytes() == b"first"
    colab.picked = {"rows.csv": b"corrected"}  # the earlier one stays, here and on Drive
    assert Path(upload.choose_data_file("", True, None)).read_bytes() == b"corrected"
    assert capsys.readouterr().out == ""


def test_an_upload_is_kept_on_drive_for_the_next_machine(colab, capsys):
    mirror = mount_drive(True, "run")
    mirror.mkdir(parents=True)
    for content, name in ((b"first", "rows.csv"), (b"other", "rows (1).csv"), (b"first", "rows.csv")):
        colab.picked = {"rows.csv": content}
        kept = upload.choose_data_file("", True, mirror)
        assert kept == str(colab.drive / "dpo_runs" / "data" / name) and Path(kept).read_bytes() == content
    assert f"コピーを {kept} に置きました" in capsys.readouterr().out


def test_an_upload_that_drive_does_not_take_is_used_from_this_machine(colab, capsys):
    mirror = mount_drive(True, "run")
    mirror.mkdir(parents=True)
    colab.lose_mount()
    colab.picked = {"rows.csv": b"rows"}
    capsys.readouterr()
    assert Path(upload.choose_data_file("", True, mirror)).read_bytes() == b"rows"
    assert "コピーできませんでした" in (text := capsys.readouterr().out) and "手元に残して" in text
    assert list(colab.mount_point.iterdir()) == []
