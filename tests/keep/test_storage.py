import errno
import os
import zipfile
from pathlib import Path

import pytest
from fake_colab import ANSWERS

from dpo_helpers import files
from dpo_helpers.config import RunConfig
from dpo_helpers.errors import UserError
from dpo_helpers.keep import storage


def test_a_place_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="書き込めません"):
        storage.prepare_run_folder(tmp_path / "file" / "run", RunConfig())


def test_an_incomplete_run_names_what_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        storage.load_run(tmp_path)


def make_run(folder):
    storage.prepare_run_folder(folder, RunConfig())
    for name in ("reference/adapter_model.safetensors", "checkpoints/dpo-000025/optimizer.pt", "run.lock"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"weights")
    return folder


def test_a_copy_holds_the_result_alone_and_is_overwritten_in_place(tmp_path, capsys):
    run, drive = make_run(tmp_path / "run"), tmp_path / "drive"
    assert storage.copy_run(run, drive)
    files = {
        path.relative_to(drive).as_posix(): path.stat().st_ino for path in drive.rglob("*") if path.is_file()
    }
    assert sorted(files) == ["reference/adapter_model.safetensors", "run_config.json"]
    assert (drive / "reference" / "adapter_model.safetensors").read_bytes() == b"weights"
    (run / "reference" / "adapter_model.safetensors").write_bytes(b"new")
    assert (
        storage.copy_run(run, drive)
        and (drive / "reference" / "adapter_model.safetensors").read_bytes() == b"new"
    )
    assert {name: (drive / name).stat().st_ino for name in files} == files
    assert "一致することを確かめました" in capsys.readouterr().out


def test_a_failed_copy_says_where_the_result_is(tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_in_place", fail)
    assert not storage.copy_run(make_run(tmp_path / "run"), tmp_path / "drive")
    assert "No space left" in (text := capsys.readouterr().out) and "zip" in text


def test_a_copy_that_differs_is_noticed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(files, "write_in_place", lambda path, source: path.write_bytes(b"damaged"))
    assert not storage.copy_run(make_run(tmp_path / "run"), tmp_path / "drive")
    assert "一致しません" in capsys.readouterr().out


def test_the_zip_holds_the_result_without_the_checkpoints(tmp_path):
    archive = storage.make_zip(make_run(tmp_path / "run"))
    assert archive == tmp_path / "run.zip"
    assert sorted(zipfile.ZipFile(archive).namelist()) == [
        "run/reference/adapter_model.safetensors",
        "run/run_config.json",
    ]


# Google Drive


def test_drive_is_asked_for_once(colab, capsys):
    for _ in range(2):
        assert storage.mount_drive(True, "runs/first") == colab.drive / "dpo_runs" / "first"
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
    assert storage.mount_drive(True, "run") is None
    assert capsys.readouterr().out.splitlines() == [
        f"Google Drive に接続できませんでした（{ANSWERS[answer]}）。学習はこのまま続けられます。",
        "使いたい場合はこのセルをもう一度実行して許可してください。"
        "使わない場合は最後に zip をダウンロードしてください。",
    ]
    colab.answer = "yes"
    assert storage.mount_drive(True, "run") == colab.drive / "dpo_runs" / "run" and colab.asked == 2


@pytest.mark.parametrize("kind", ["files", "symlink"])
def test_a_mount_point_that_is_taken_is_no_drive(colab, capsys, kind):
    if kind == "files":
        (colab.mount_point / "old").mkdir(parents=True)
    else:
        colab.mount_point.symlink_to(colab.cloud)
    assert storage.mount_drive(True, "run") is None
    assert "Mountpoint must not" in (text := capsys.readouterr().out) and "zip" in text


def test_a_lost_mount_is_mounted_again(colab):
    folder = storage.mount_drive(True, "run")
    folder.mkdir(parents=True)
    colab.lose_mount()
    assert not folder.exists()
    assert storage.mount_drive(True, "run") == folder and folder.is_dir() and colab.asked == 2


def test_a_mount_that_no_longer_answers_is_not_taken_for_one(colab, monkeypatch):
    storage.mount_drive(True, "run")
    stat = os.stat

    def disconnected(path, **options):
        if Path(path) == colab.drive:
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
        return stat(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", disconnected)
        storage.mount_drive(True, "run")
        storage.unmount_drive(True)
    assert colab.asked == 2 and colab.drive.is_dir()


def test_drive_not_wanted_is_not_asked_for(colab, capsys):
    assert storage.mount_drive(False, "run") is None and colab.asked == 0
    assert (
        "Google Drive は使いません" in (text := capsys.readouterr().out)
        and "最後に zip をダウンロードしてください" in text
    )


def test_off_colab_there_is_no_drive(capsys):
    assert storage.mount_drive(True, "run") is None
    assert (
        capsys.readouterr().out
        == "Colab ではないので Google Drive は使いません。結果はこのマシンのフォルダーに残ります。\n"
    )


@pytest.mark.parametrize("seconds", [1, 299, 301, 86_000])
def test_drive_is_let_go_of_within_five_minutes_or_the_user_is_told_to_look(colab, capsys, seconds):
    storage.mount_drive(True, "run")
    colab.flush_seconds = seconds
    capsys.readouterr()
    storage.unmount_drive(True)
    text = capsys.readouterr().out
    if seconds < 300:
        assert (
            text == "Google Drive への書き込みをすべて終え、切り離しました。\n" and not colab.drive.exists()
        )
    else:
        assert "送信が終わったことを確かめられませんでした（flush_and_unmount failed）" in text
        assert "ブラウザーの Google Drive" in text and "zip" in text and colab.drive.is_dir()


def test_drive_is_let_go_of_only_where_wanted_and_there(colab, capsys):
    storage.unmount_drive(True)
    assert capsys.readouterr().out == ""
    storage.mount_drive(True, "run")
    storage.unmount_drive(False)
    assert colab.drive.is_dir()
    storage.unmount_drive(True)
    storage.unmount_drive(True)
    assert capsys.readouterr().out.count("切り離しました") == 1


def test_off_colab_there_is_nothing_to_let_go_of(capsys):
    storage.unmount_drive(True)
    assert capsys.readouterr().out == ""


def test_a_copy_to_a_lost_mount_makes_no_folder_in_its_place(colab, tmp_path, capsys):
    folder = storage.mount_drive(True, "run")
    folder.mkdir(parents=True)
    colab.lose_mount()
    capsys.readouterr()
    assert not storage.copy_run(make_run(tmp_path / "run"), folder)
    assert list(colab.mount_point.iterdir()) == []
    assert (
        "コピーできませんでした" in (text := capsys.readouterr().out)
        and "確かめました" not in text
        and "zip" in text
    )
    assert storage.mount_drive(True, "run") == folder


# Files of the user's own computer


def test_a_download_is_sent_when_wanted(colab, capsys):
    Path("run.zip").write_bytes(b"zip")
    storage.download_file("run.zip", wanted=False)
    assert colab.sent == []
    assert capsys.readouterr().out == "ダウンロードはしていません。ファイルは run.zip にあります。\n"
    storage.download_file(Path("run.zip"), wanted=True)
    assert colab.sent == ["run.zip"] and capsys.readouterr().out == ""


def test_a_download_of_nothing_is_a_mistake_of_ours(colab):
    with pytest.raises(FileNotFoundError, match="Cannot find file"):
        storage.download_file("run.zip", wanted=True)


def test_off_colab_a_download_says_where_the_file_lies(capsys):
    storage.download_file("run.zip", wanted=True)
    assert "run.zip にあります" in capsys.readouterr().out


def test_without_an_upload_the_form_says_which_file(colab):
    assert storage.choose_data_file("  rows.csv ", False, None) == "rows.csv"
    assert storage.choose_data_file("", False, colab.drive) == ""


@pytest.mark.parametrize("names", [[], ["a.csv", "b.csv"]])
def test_an_upload_of_none_or_several_files_says_how_many(colab, names):
    colab.picked = dict.fromkeys(names, b"")
    with pytest.raises(UserError, match=rf"選ばれた数：{len(names)}.*UPLOAD_FILE をオフ"):
        storage.choose_data_file("", True, None)


def test_an_upload_off_colab_says_what_to_do_instead():
    with pytest.raises(UserError, match="UPLOAD_FILE をオフにして、DATA_FILE に"):
        storage.choose_data_file("", True, None)


def test_an_upload_without_drive_stays_on_this_machine(colab, capsys):
    colab.picked = {"rows.csv": b"first"}
    assert Path(storage.choose_data_file("ignored.csv", True, None)).read_bytes() == b"first"
    colab.picked = {"rows.csv": b"corrected"}
    assert Path(storage.choose_data_file("", True, None)).read_bytes() == b"corrected"
    assert capsys.readouterr().out == ""


def test_an_upload_is_kept_on_drive_for_the_next_machine(colab, capsys):
    mirror = storage.mount_drive(True, "run")
    mirror.mkdir(parents=True)
    for content in (b"first", b"corrected"):
        colab.picked = {"rows.csv": content}
        kept = storage.choose_data_file("", True, mirror)
        assert (
            kept == str(colab.drive / "dpo_runs" / "data" / "rows.csv") and Path(kept).read_bytes() == content
        )
    assert f"写しを {kept} に置きました" in capsys.readouterr().out


def test_an_upload_that_drive_does_not_take_is_used_from_this_machine(colab, capsys):
    mirror = storage.mount_drive(True, "run")
    mirror.mkdir(parents=True)
    colab.lose_mount()
    colab.picked = {"rows.csv": b"rows"}
    capsys.readouterr()
    assert Path(storage.choose_data_file("", True, mirror)).read_bytes() == b"rows"
    assert "写しを置けませんでした" in (text := capsys.readouterr().out) and "手元に残して" in text
    assert list(colab.mount_point.iterdir()) == []
