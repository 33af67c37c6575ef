import sys
import types
import zipfile

import pytest

from dpo_helpers import storage
from dpo_helpers.config import RunConfig, UserError


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
    run, drive = make_run(tmp_path / "run"), tmp_path / "drive" / "run"
    assert storage.copy_run(run, drive)
    files = {path.relative_to(drive).as_posix(): path.stat().st_ino for path in drive.rglob("*") if path.is_file()}
    assert sorted(files) == ["reference/adapter_model.safetensors", "run_config.json"]
    assert (drive / "reference" / "adapter_model.safetensors").read_bytes() == b"weights"
    (run / "reference" / "adapter_model.safetensors").write_bytes(b"new")
    assert storage.copy_run(run, drive) and (drive / "reference" / "adapter_model.safetensors").read_bytes() == b"new"
    assert {name: (drive / name).stat().st_ino for name in files} == files
    assert "一致することを確かめました" in capsys.readouterr().out


def test_a_failed_copy_says_where_the_result_is(tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.shutil, "copyfile", fail)
    assert not storage.copy_run(make_run(tmp_path / "run"), tmp_path / "drive")
    assert "No space left" in (text := capsys.readouterr().out) and "zip" in text


def test_a_copy_that_differs_is_noticed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(storage.shutil, "copyfile", lambda source, target: target.write_bytes(b"damaged"))
    assert not storage.copy_run(make_run(tmp_path / "run"), tmp_path / "drive")
    assert "一致しません" in capsys.readouterr().out


def test_the_zip_holds_the_result_without_the_checkpoints(tmp_path):
    archive = storage.make_zip(make_run(tmp_path / "run"))
    assert archive == tmp_path / "run.zip"
    assert sorted(zipfile.ZipFile(archive).namelist()) == ["run/reference/adapter_model.safetensors", "run/run_config.json"]


@pytest.fixture
def colab(monkeypatch, tmp_path):
    """A google.colab whose drive and files behave as told, and a Drive that lies in tmp_path."""
    package, drive, files = (types.ModuleType(name) for name in ("google.colab", "google.colab.drive", "google.colab.files"))
    package.drive, package.files = drive, files
    files.sent = []
    files.download = files.sent.append
    drive.mounts = 0

    def mount(path):
        drive.mounts += 1
        (tmp_path / "MyDrive").mkdir()

    drive.mount = mount
    for module in (package, drive, files):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(storage, "DRIVE_ROOT", tmp_path)
    return package


def test_drive_is_asked_for_once(colab, tmp_path, capsys):
    assert storage.mount_drive(True, "run") == storage.mount_drive(True, "run") == tmp_path / "MyDrive" / "dpo_runs" / "run"
    assert colab.drive.mounts == 1 and "接続しました" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error", [ValueError("mount failed"), type("MessageError", (Exception,), {})("credential propagation was unsuccessful")]
)
def test_no_is_an_answer(colab, capsys, error):
    def refuse(path):
        raise error

    colab.drive.mount = refuse
    assert storage.mount_drive(True, "run") is None
    text = capsys.readouterr().out
    assert str(error) in text and "このまま続けられます" in text and "zip" in text


def test_drive_not_wanted_is_not_asked_for(colab, capsys):
    assert storage.mount_drive(False, "run") is None and colab.drive.mounts == 0
    assert "zip" in capsys.readouterr().out


def test_off_colab_there_is_no_drive(capsys):
    assert storage.mount_drive(True, "run") is None
    assert "Colab ではない" in capsys.readouterr().out


def test_a_download_is_sent_when_wanted(colab, capsys):
    storage.download_file("run.zip", wanted=False)
    assert colab.files.sent == [] and "run.zip" in capsys.readouterr().out
    storage.download_file("run.zip", wanted=True)
    assert colab.files.sent == ["run.zip"]
