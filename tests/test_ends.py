"""However a command ends (full disk, Ctrl-C, an ascii terminal): one sentence, and the right exit code."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import make_config

from dpo_helpers.__main__ import main

ROOT = Path(__file__).parent.parent
# Runs the command line in a process whose disk takes no file above `limit` bytes; "0" for no limit.
LIMITED = """
import resource, signal, sys
limit = int(sys.argv.pop(1))
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from dpo_helpers.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def start(tmp_path, *arguments, limit=0, **environment):
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            LIMITED,
            str(limit),
            "train",
            "--config",
            str(tmp_path / "config.json"),
            "--run-dir",
            str(tmp_path / "run"),
            "--device",
            "cpu",
            *arguments,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
    )


def end(process, code):
    """Return standard error of a process that must end with `code`, without a traceback."""
    _, error = process.communicate(timeout=300)
    assert process.returncode == code, error.decode("utf-8", "replace")[-3000:]
    assert b"Traceback" not in error
    return error.decode("utf-8", "replace")


@pytest.mark.versions
def test_a_full_disk_and_a_stop_end_in_one_sentence_and_the_same_command_goes_on(tiny_models, tmp_path):
    make_config(tiny_models, num_samples=40).save(tmp_path / "config.json")
    assert "いっぱい" in end(start(tmp_path, limit=40_000), 2)  # what torch writes does not fit
    process = start(tmp_path)
    while not list((tmp_path / "run.checkpoints").glob("sft-*")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert "停止しました" in end(process, 130)
    process = start(tmp_path, PYTHONIOENCODING="ascii")
    time.sleep(1)
    process.send_signal(signal.SIGINT)  # while it is setting up
    process.communicate(timeout=300)
    assert process.returncode in (130, -signal.SIGINT)  # the latter before the first line of ours has run
    end(start(tmp_path, PYTHONIOENCODING="ascii"), 0)
    assert (tmp_path / "run" / "metrics.json").is_file()


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "中断しました"),
        (OSError(28, "No space left on device"), 2, "いっぱい"),
        (PermissionError(13, "Permission denied", "/home/x/.cache"), 2, "XDG_CACHE_HOME"),
    ],
)
def test_whatever_ends_a_command_is_one_sentence(tmp_path, monkeypatch, capsys, error, code, words):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("dpo_helpers.keep.run._start", fail)
    assert main(["train", "--run-dir", str(tmp_path / "run"), "--device", "cpu"]) == code
    assert words in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_mistake_of_ours_is_shown_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("dpo_helpers.keep.run._start", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["train", "--run-dir", str(tmp_path / "run"), "--device", "cpu"])
