"""The terminal: what it answers to a problem, what it leaves behind, and how light it is."""

import json
import subprocess
import sys

import pytest

from dpo_helpers.__main__ import main, read_settings
from dpo_helpers.config import RunConfig
from dpo_helpers.errors import UserError


def test_settings_come_as_name_and_value_in_either_case():
    assert read_settings(["BETA=0.2", "model_name=a=b"]) == {"beta": "0.2", "model_name": "a=b"}
    with pytest.raises(UserError, match="名前=値"):
        read_settings(["beta"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "beta=0"], "beta = 0.0"),
        (["--set", "beta"], "名前=値"),
        (["--set", "lora_rank=inf"], "整数で指定"),
        (["--set", "betta=1"], "知らない項目"),
        (["--config", "absent.json"], "absent.json が見つかりません"),
        (["--set", "model_name=./absent"], "フォルダ ./absent が見つかりません"),
        (["--device", "cuda"], "GPU（cuda）が見つかりません"),
        ([], "手元にも保存されていません"),  # the default model, without a network
    ],
)
def test_a_problem_that_the_user_can_solve_ends_with_2_and_its_message(
    arguments, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


@pytest.mark.versions
def test_training_from_a_terminal_leaves_the_same_files_as_the_notebook(tiny_models, tmp_path, capsys):
    RunConfig(model_name=str(tiny_models["gpt2"]), num_samples=30, sft_epochs=0).save(tmp_path / "c.json")
    arguments = [
        "train",
        "--config",
        str(tmp_path / "c.json"),
        "--set",
        "seed=1",
        "--run-dir",
        str(tmp_path / "run"),
        "--device",
        "cpu",
    ]
    assert main(arguments) == 0
    assert json.loads((tmp_path / "run" / "run_config.json").read_text())["seed"] == 1
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["held_out"]["rows"] == 8
    assert not (tmp_path / "run" / "reference").exists()
    assert main([*arguments[:-1], "cpu", "--set", "beta=0.5"]) == 2
    assert "続きにも上書きにも使いません" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["experiment", "--grid", "absent.json", "--results", "r.jsonl"], "absent.json が見つかりません"),
        (["data"], "--output"),
        (["data", "--check", "absent.csv"], "absent.csv"),
        (["judge", "absent"], "学習の記録 absent/metrics.json が見つかりません"),
    ],
)
def test_every_job_says_what_it_lacks(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) in (1, 2)
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


def test_an_experiment_from_a_terminal_ends_with_its_table(tmp_path, monkeypatch, capsys):
    from dpo_helpers.sweep.runs import Workshop

    def measure(self, config, variation):
        if config.beta == 0.5:
            raise RuntimeError("no memory")
        return {"held_out": {"loss": config.beta}}

    monkeypatch.setattr(Workshop, "measure", measure)
    (tmp_path / "grid.json").write_text('{"settings": {"beta": [0.1, 0.5]}, "seeds": [1]}')
    files = ["--grid", str(tmp_path / "grid.json"), "--results", str(tmp_path / "r.jsonl")]
    assert main(["experiment", *files, "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert (
        "設定 β 0.1、回数 1" in out and "評価用の損失 0.10" in out and "問題 RuntimeError: no memory" in out
    )
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 2


def test_the_package_is_light_to_import():
    """In a fresh interpreter: no torch and nothing heavy, because these modules must work where torch is
    broken.
    """
    code = (
        "import sys, time; start = time.perf_counter(); import dpo_helpers; first = "
        "time.perf_counter() - start\n"
        "import dpo_helpers.config, dpo_helpers.machine, dpo_helpers.setup.doctor, "
        "dpo_helpers.data.generate, dpo_helpers.__main__\n"
        "print(first, [n for n in ('torch', 'transformers', 'trl', 'peft', 'datasets', "
        "'pandas', 'matplotlib', 'psutil') if n in sys.modules])"
    )
    seconds, heavy = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split(" ", 1)
    assert float(seconds) < 0.2 and heavy.strip() == "[]"
