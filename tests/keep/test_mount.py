"""Google Drive is asked for, lost and let go of."""

import errno
import os
from pathlib import Path

import pytest
from fake_colab import ANSWERS

from dpo_helpers import colab as drive_module

# Google Drive


def test_drive_is_asked_for_once(colab, capsys):
    for _ in range(2):
        assert drive_module.mount_drive(True, "runs/first") == colab.drive / "dpo_runs" / "first"
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
    assert drive_module.mount_drive(True, "run") is None
    assert capsys.readouterr().out.splitlines() == [
        f"Google Drive に接続できませんでした（{ANSWERS[answer]}）。学習はこのまま続けられます。",
        "使うなら、このセルをもう一度実行して許可し、次のデータのセルも順に実行してください。",
        "使わないなら、このマシンはあとで消えるので、最後に zip をダウンロードしてください。",
    ]
    colab.answer = "yes"
    assert drive_module.mount_drive(True, "run") == colab.drive / "dpo_runs" / "run" and colab.asked == 2


@pytest.mark.parametrize("kind", ["files", "symlink"])
def test_a_mount_point_that_is_taken_is_no_drive(colab, capsys, kind):
    if kind == "files":
        (colab.mount_point / "old").mkdir(parents=True)
    else:
        colab.mount_point.symlink_to(colab.cloud)
    assert drive_module.mount_drive(True, "run") is None
    assert "Mountpoint must not" in (text := capsys.readouterr().out) and "zip" in text


def test_a_lost_mount_is_mounted_again(colab):
    folder = drive_module.mount_drive(True, "run")
    folder.mkdir(parents=True)
    colab.lose_mount()
    assert not folder.exists()
    assert drive_module.mount_drive(True, "run") == folder and folder.is_dir() and colab.asked == 2


def test_a_mount_that_no_longer_answers_is_not_taken_for_one(colab, monkeypatch):
    drive_module.mount_drive(True, "run")
    stat = os.stat

    def disconnected(path, **options):
        if Path(path) == colab.drive:
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
        return stat(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", disconnected)
        drive_module.mount_drive(True, "run")
        drive_module.unmount_drive(True)
    assert colab.asked == 2 and colab.drive.is_dir()


def test_drive_not_wanted_is_not_asked_for(colab, capsys):
    assert drive_module.mount_drive(False, "run") is None and colab.asked == 0
    assert (
        "Google Drive は使いません" in (text := capsys.readouterr().out)
        and "最後に zip をダウンロードしてください" in text
    )


def test_off_colab_there_is_no_drive(capsys):
    assert drive_module.mount_drive(True, "run") is None
    assert (
        capsys.readouterr().out
        == "Colab ではないので Google Drive は使いません。結果はこのマシンのフォルダに残ります。\n"
    )


@pytest.mark.parametrize("seconds", [1, 299, 301, 86_000])
def test_drive_is_let_go_of_within_five_minutes_or_the_user_is_told_to_look(colab, capsys, seconds):
    drive_module.mount_drive(True, "run")
    colab.flush_seconds = seconds
    capsys.readouterr()
    drive_module.unmount_drive(True)
    text = capsys.readouterr().out
    if seconds < 300:
        assert (
            text == "Google Drive への書き込みをすべて終え、切り離しました。\n" and not colab.drive.exists()
        )
    else:
        assert "送信が終わったことを確かめられませんでした（flush_and_unmount failed）" in text
        assert "ブラウザの Google Drive" in text and "zip" in text and colab.drive.is_dir()


def test_drive_is_let_go_of_only_where_wanted_and_there(colab, capsys):
    drive_module.unmount_drive(True)
    assert capsys.readouterr().out == ""
    drive_module.mount_drive(True, "run")
    drive_module.unmount_drive(False)
    assert colab.drive.is_dir()
    drive_module.unmount_drive(True)
    drive_module.unmount_drive(True)
    assert capsys.readouterr().out.count("切り離しました") == 1


def test_off_colab_there_is_nothing_to_let_go_of(capsys):
    drive_module.unmount_drive(True)
    assert capsys.readouterr().out == ""
