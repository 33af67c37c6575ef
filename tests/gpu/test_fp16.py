"""A checkpoint of a T4 (fp16) goes on on a CPU and back, with the scaler's state where there is a scaler."""

import pytest
import torch
from gpu.fake_fp16 import FakeFp16
from tiny_run import Killed, losses, make_config, train, weights

pytestmark = pytest.mark.versions


@pytest.fixture
def precision(monkeypatch):
    return FakeFp16(monkeypatch)


@pytest.mark.parametrize("way", [("fp16", "fp32", "fp16"), ("fp32", "fp16"), ("fp16", "fp16")], ids="-".join)
def test_a_training_goes_on_in_another_precision_and_back(
    tiny_models, rows, start_run, tmp_path, kill_at, precision, capsys, way
):
    config = make_config(tiny_models, logging_steps=1)
    precision.choose(way[0])
    whole = train(start_run(config, rows[:32], rows[32:40], tmp_path / "whole"))
    for step, name in zip((5, 7), way[:-1], strict=False):
        precision.choose(name)
        kill_at("dpo", step)
        run = start_run(config, rows[:32], rows[32:40], tmp_path / "run")
        with pytest.raises(Killed):
            train(run)
        run.close()
        assert (run.newest().path / "scaler.pt").is_file() == (name == "fp16")
        capsys.readouterr()
    precision.choose(way[-1])
    trainer = train(start_run(config, rows[:32], rows[32:40], tmp_path / "run"))
    told = f"{way[-2]} の計算で学習したものです。ここでは {way[-1]} で続ける" in capsys.readouterr().out
    assert told == (way[-1] != way[-2])
    assert trainer.state.global_step == 8 and len(losses(trainer.state.log_history)) == 8
    assert losses(trainer.state.log_history) == pytest.approx(losses(whole.state.log_history), abs=0.02)
    if set(way) == {"fp16"}:
        assert all(torch.equal(value, weights(trainer)[name]) for name, value in weights(whole).items())
