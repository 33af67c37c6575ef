"""Google Drive is asked for, lost and let go of; files come from the user's computer and go to it."""

import errno
import os
from pathlib import Path

import pytest
from fake_colab import ANSWERS

from dpo_helpers import colab as colab_module
from dpo_helpers.errors import UserError

# Google Drive


def test_drive_is_asked_for_once(colab, capsys):
    for _ in range(2):
        assert colab_module.mount_drive(True, "runs/first") == colab.drive / "dpo_runs" / "first"
    assert colab.asked == 1
    assert (
        capsys.readouterr().out.count(
            "Google Drive に接続しました。途中経過と結果は マイドライブ/dpo_runs/first に保存します。"
        )
        == 2
    )


@pytest.mark.parametrize("answer", ANSWERS)
def test_no_is_an_answer_and_can_be_taken_back(colab, capsys, answer):
    colab.answer = answer
    assert colab_module.mount_drive(True, "run") is None
    assert capsys.readouterr().out.splitlines() == [
        f"Google Drive に接続できませんでした（{ANSWERS[answer]}）。学習はこのまま続けられます。",
        "使うなら、このセルをもう一度実行して許可し、次のデータのセルも順に実行してください。",
        "使わないなら、このマシンはあとで消えるので、最後に zip をダウンロードしてください。",
    ]
    colab.answer = "yes"
    assert colab_module.mount_drive(True, "run") == colab.drive / "dpo_runs" / "run" and colab.asked == 2


@pytest.mark.parametrize("kind", ["files", "symlink"])
def test_a_mount_point_that_is_taken_is_no_drive(colab, capsys, kind):
    if kind == "files":
        (colab.mount_point / "old").mkdir(parents=True)
    else:
        colab.mount_point.symlink_to(colab.cloud)
    assert colab_module.mount_drive(True, "run") is None
    assert "Mountpoint must not" in (text := capsys.readouterr().out) and "zip" in text


def test_a_lost_mount_is_mounted_again(colab):
    folder = colab_module.mount_drive(True, "run")
    folder.mkdir(parents=True)
    colab.lose_mount()
    assert not folder.exists()
    assert colab_module.mount_drive(True, "run") == folder and folder.is_dir() and colab.asked == 2


def test_a_mount_that_no_longer_answers_is_not_taken_for_one(colab, monkeypatch):
    colab_module.mount_drive(True, "run")
    stat = os.stat

    def disconnected(path, **options):
        if Path(path) == colab.drive:
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
        return stat(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", disconnected)
        colab_module.mount_drive(True, "run")
        colab_module.unmount_drive(True)
    assert colab.asked == 2 and colab.drive.is_dir()


def test_drive_not_wanted_is_not_asked_for(colab, capsys):
    assert colab_module.mount_drive(False, "run") is None and colab.asked == 0
    assert (
        "Google Drive は使いません" in (text := capsys.readouterr().out)
        and "最後に zip をダウンロードしてください" in text
    )


def test_off_colab_there_is_no_drive(capsys):
    assert colab_module.mount_drive(True, "run") is None
    assert (
        capsys.readouterr().out
        == "Colab ではないので Google Drive は使いません。結果はこのマシンのフォルダに残ります。\n"
    )


@pytest.mark.parametrize("seconds", [1, 299, 301, 86_000])
def test_drive_is_let_go_of_within_five_minutes_or_the_user_is_told_to_look(colab, capsys, seconds):
    colab_module.mount_drive(True, "run")
    colab.flush_seconds = seconds
    capsys.readouterr()
    colab_module.unmount_drive(True)
    text = capsys.readouterr().out
    if seconds < 300:
        assert (
            text == "Google Drive への書き込みをすべて終え、切り離しました。\n" and not colab.drive.exists()
        )
    else:
        assert "送信が終わったことを確かめられませんでした（flush_and_unmount failed）" in text
        assert "ブラウザの Google Drive" in text and "zip" in text and colab.drive.is_dir()


def test_drive_is_let_go_of_only_where_wanted_and_there(colab, capsys):
    colab_module.unmount_drive(True)
    assert capsys.readouterr().out == ""
    colab_module.mount_drive(True, "run")
    colab_module.unmount_drive(False)
    assert colab.drive.is_dir()
    colab_module.unmount_drive(True)
    colab_module.unmount_drive(True)
    assert capsys.readouterr().out.count("切り離しました") == 1


def test_off_colab_there_is_nothing_to_let_go_of(capsys):
    colab_module.unmount_drive(True)
    assert capsys.readouterr().out == ""


def test_without_an_upload_the_form_says_which_file(colab):
    assert colab_module.choose_data_file("  rows.csv ", False, None) == "rows.csv"
    assert colab_module.choose_data_file("", False, colab.drive) == ""


@pytest.mark.parametrize("names", [[], ["a.csv", "b.csv"]])
def test_an_upload_of_none_or_several_files_says_how_many(colab, names):
    colab.picked = dict.fromkeys(names, b"")
    with pytest.raises(UserError, match=rf"選ばれた数：{len(names)}.*UPLOAD_FILE をオフ"):
        colab_module.choose_data_file("", True, None)


def test_an_upload_off_colab_says_what_to_do_instead():
    with pytest.raises(UserError, match="UPLOAD_FILE をオフにして、DATA_FILE に"):
        colab_module.choose_data_file("", True, None)


def test_an_upload_without_drive_stays_on_this_machine(colab, capsys):
    colab.picked = {"rows.csv": b"first"}
    assert Path(colab_module.choose_data_file("ignored.csv", True, None)).read_bytes() == b"first"
    colab.picked = {"rows.csv": b"corrected"}  # the earlier one stays, here and on Drive
    assert Path(colab_module.choose_data_file("", True, None)).read_bytes() == b"corrected"
    assert capsys.readouterr().out == ""


def test_an_upload_is_kept_on_drive_for_the_next_machine(colab, capsys):
    mirror = colab_module.mount_drive(True, "run")
    mirror.mkdir(parents=True)
    for content, name in ((b"first", "rows.csv"), (b"other", "rows (1).csv"), (b"first", "rows.csv")):
        colab.picked = {"rows.csv": content}
        kept = colab_module.choose_data_file("", True, mirror)
        assert kept == str(colab.drive / "dpo_runs" / "data" / name) and Path(kept).read_bytes() == content
    assert f"コピーを {kept} に置きました" in capsys.readouterr().out


def test_an_upload_that_drive_does_not_take_is_used_from_this_machine(colab, capsys):
    mirror = colab_module.mount_drive(True, "run")
    mirror.mkdir(parents=True)
    colab.lose_mount()
    colab.picked = {"rows.csv": b"rows"}
    capsys.readouterr()
    assert Path(colab_module.choose_data_file("", True, mirror)).read_bytes() == b"rows"
    assert "コピーできませんでした" in (text := capsys.readouterr().out) and "手元に残して" in text
    assert list(colab.mount_point.iterdir()) == []


def test_a_download_is_sent_when_wanted(colab, capsys):
    Path("run.zip").write_bytes(b"zip")
    colab_module.download_file(Path("run.zip"), wanted=True)
    assert colab.sent == ["run.zip"] and capsys.readouterr().out == ""
    colab_module.download_file("run.zip", wanted=False, kept=True)
    assert capsys.readouterr().out == "ダウンロードはしていません。ファイルは run.zip にあります。\n"


def test_where_the_machine_alone_has_the_result_the_end_says_that_it_goes_away_and_how_to_get_it(
    colab, capsys
):
    colab_module.download_file("run.zip", wanted=False)
    text = capsys.readouterr().out
    assert (
        "しばらくすると消えます" in text and '{"download_zip": True}' in text and "「ダウンロード」" in text
    )


def test_off_colab_a_download_says_where_the_file_lies(capsys):
    colab_module.download_file("run.zip", wanted=True)
    assert "run.zip にあります" in capsys.readouterr().out
