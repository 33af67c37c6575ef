"""Whole trainings beside a Drive that fails: the result on this machine is that of a training that nothing
disturbs.
"""

import errno
import os
import time
import zipfile
from pathlib import Path

import pytest
from faulty_drive import FAULTS, WEIGHTS, fail, no_fault, steps
from tiny_run import comparable, make_config, save, train

from dpo_helpers import background, files
from dpo_helpers.errors import UserError
from dpo_helpers.folders import verify_folder
from dpo_helpers.keep.checkpoints import list_checkpoints
from dpo_helpers.keep.result import make_zip

pytestmark = pytest.mark.versions


@pytest.fixture
def open_tiny(tiny_models, rows, start_run, drive):
    """A function that opens the run of `undisturbed` in a folder of its own, beside a Drive that may fail."""
    return lambda: start_run(
        make_config(tiny_models, logging_steps=1), rows[:32], rows[32:40], mirror=drive.root / "run"
    )


@pytest.fixture
def finish(undisturbed):
    """A function that trains a run to its end, saves it, and compares its result with the undisturbed one,
    byte by byte.
    """
    whole, whole_trainer = undisturbed

    def finish(run):
        trainer = train(run)
        assert set(save(run, trainer)) == {
            path.relative_to(whole.folder).as_posix() for path in result_files(whole.folder)
        }
        for name in (
            "adapter_model.safetensors",
            "reference/adapter_model.safetensors",
            "tokenizer.json",
            "train.jsonl",
            "held_out.jsonl",
        ):
            assert (run.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name
        assert comparable(trainer.state.log_history) == comparable(whole_trainer.state.log_history)
        assert comparable(run.progress.sft_log) == comparable(whole.progress.sft_log)
        assert run.progress.steps_executed == {"sft": 8, "dpo": 8}

    return finish


def result_files(folder):
    return [
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("run.json", "manifest.json")
    ]


def wait_for_each_copy(run, monkeypatch, before=lambda checkpoint: None, after=lambda: None):
    """Let every checkpoint reach the mirror, or fail to, before training goes on; return {checkpoint: (is
    there, valid slots)}.
    """
    submit, seen = run.mirror.submit, {}

    def submit_and_wait(checkpoint):
        before(checkpoint)
        submit(checkpoint)
        done = run.mirror.finish(10)
        after()
        seen[checkpoint.name] = done, steps(run.mirror.folder)

    monkeypatch.setattr(run.mirror, "submit", submit_and_wait)
    return seen


def lines_about(folder, capsys):
    return [line for line in capsys.readouterr().out.splitlines() if str(folder) in line]


@pytest.mark.parametrize("name", ["full in the middle", "not connected", "flipped bit"])
def test_a_fault_on_drive_costs_one_copy_and_the_next_one_succeeds(
    open_tiny, finish, drive, monkeypatch, capsys, name
):
    make_fault, reason = FAULTS[name]

    def before(checkpoint):
        if checkpoint.name == "dpo-000004":
            drive.fault = make_fault(checkpoint)

    run = open_tiny()
    seen = wait_for_each_copy(run, monkeypatch, before, lambda: setattr(drive, "fault", no_fault))
    finish(run)
    assert run.deliver() is True
    assert [checkpoint for checkpoint, (done, _) in seen.items() if not done] == ["dpo-000004"]
    assert ("slot-0", 2) in seen["dpo-000004"][1]  # the last good one
    assert seen["dpo-000006"][1] == [("slot-1", 6), ("slot-0", 2)]
    assert steps(run.mirror.folder) == [("slot-0", 8), ("slot-1", 6)]
    failed, recovered, delivered = lines_about(run.mirror.folder, capsys)
    assert reason in failed and failed.startswith(f"{run.mirror.folder} に保存できませんでした：")
    assert failed.endswith(
        "学習はこのまま続き、結果はこのマシンに残ります。次のチェックポイントでもう一度試します。"
    )
    assert recovered == f"{run.mirror.folder} にまた保存できるようになりました。dpo-000006 を保存しました。"
    assert delivered.endswith("個のファイルがあり、内容が一致することを確かめました。")
    for path in result_files(run.folder):
        assert (run.mirror.folder / path.relative_to(run.folder)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOTCONN, errno.EROFS])
def test_a_drive_that_fails_to_the_end_leaves_a_zip_and_gets_its_copy_when_it_is_back(
    open_tiny, finish, drive, capsys, number
):
    run = open_tiny()
    drive.fault = fail(number, "open", "write", "mkdir")(None)
    finish(run)
    capsys.readouterr()
    assert run.deliver() is False
    missing, failed = capsys.readouterr().out.splitlines()
    assert missing.startswith(f"チェックポイントのコピーは {run.mirror.folder} にありません：")
    assert os.strerror(number) in failed and failed.endswith(
        f"結果は {run.folder} に残っています。zip をダウンロードしてください。"
    )
    name = "run/adapter_model.safetensors"
    assert (
        zipfile.ZipFile(make_zip(run.folder)).read(name)
        == (run.folder / "adapter_model.safetensors").read_bytes()
    )
    drive.fault = no_fault
    again = open_tiny()
    assert "この学習は終わっています" in capsys.readouterr().out
    assert again.deliver() is True and steps(again.mirror.folder) == [("slot-0", 8)]


def test_training_does_not_wait_for_a_write_that_takes_long(open_tiny, finish, drive, capsys):
    run, answers = open_tiny(), drive.hang(WEIGHTS)
    finish(run)
    assert drive.hangs.is_set() and run.mirror.in_use() == {
        run.checkpoints / "sft-000002",
        run.checkpoints / "dpo-000008",
    }
    assert verify_folder(run.checkpoints / "sft-000002")  # spared while it is read
    answers.set()
    assert run.deliver() is True
    assert steps(run.mirror.folder) == [("slot-1", 8), ("slot-0", 2)]
    assert "確かめました" in lines_about(run.mirror.folder, capsys)[-1]


def test_a_drive_that_hangs_is_waited_for_once_and_the_folder_is_let_go_of(
    open_tiny, finish, drive, monkeypatch, capsys
):
    monkeypatch.setattr(background, "FINISH_SECONDS", 0.4)
    monkeypatch.setattr(background, "QUIET_SECONDS", 0.1)
    run, answers = open_tiny(), drive.hang(WEIGHTS)
    finish(run)
    start = time.perf_counter()
    assert run.deliver() is False
    run.close()
    assert 0.4 <= time.perf_counter() - start < 1.2
    assert [
        line.removeprefix(f"{run.mirror.folder} ") for line in lines_about(run.mirror.folder, capsys)
    ] == [
        "への保存が終わるのを待っています（最長 0.4 秒）。",
        f"0.4 秒待ちましたが、{run.mirror.folder} への保存が終わりません。"
        "結果はこのマシンにあるので、zip をダウンロードしてください。",
    ]
    assert not run.lock.is_locked
    answers.set()


@pytest.mark.parametrize("seconds", [None, 0.5], ids=["lasting", "passing"])
def test_a_drive_that_gives_no_answer_at_the_start_is_not_written_over(
    open_tiny, drive, monkeypatch, seconds
):
    monkeypatch.setattr(files, "PATIENCE_SECONDS", 1)
    (drive.root / "run").mkdir(parents=True)
    drive.fault = fail(errno.ENOTCONN, "stat", "list", "read", seconds=seconds)(None)
    if seconds is None:
        words = r"(?s)drive.* を読み書きできません（Transport endpoint is not connected）。.*USE_DRIVE をオフ"
        with pytest.raises(UserError, match=words):
            open_tiny()
        drive.fault = no_fault
        assert os.listdir(drive.root / "run") == []
    else:
        assert open_tiny().mirror.finish(5)


def test_a_checkpoint_that_cannot_be_renamed_costs_itself_and_not_the_run(
    open_tiny, finish, monkeypatch, capsys
):
    rename = Path.rename

    def fail_once(self, target):
        if Path(target).name == "dpo-000004":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    run = open_tiny()
    seen = wait_for_each_copy(run, monkeypatch)
    finish(run)
    assert list(seen)[-3:] == ["dpo-000002", "dpo-000006", "dpo-000008"] and all(
        done for done, _ in seen.values()
    )
    assert [path.name for path in list_checkpoints(run.checkpoints)] == ["dpo-000008", "dpo-000006"]
    assert (
        "ステップ 4 のチェックポイントを保存できませんでした" in (text := capsys.readouterr().out)
        and "学習は続け" in text
    )
