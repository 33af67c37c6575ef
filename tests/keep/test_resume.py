"""A run that is cut off goes on to the same bytes, at both ends of the version range."""

import shutil

import pytest
import torch
from tiny_run import Killed, comparable, make_config, save, train, weights

from dpo_helpers.config import RunConfig
from dpo_helpers.errors import UserError
from dpo_helpers.keep.checkpoints import find_valid_slots, list_checkpoints

pytestmark = pytest.mark.versions


@pytest.mark.parametrize(
    ("stage", "step", "sft_epochs"), [("sft", 5, 1), ("dpo", 5, 1), ("dpo", 1, 1), ("dpo", 5, 0)]
)
def test_with_the_mirror_alone_a_killed_run_ends_with_the_same_bytes(
    tiny_models, rows, start_run, tmp_path, kill_at, capsys, stage, step, sft_epochs
):
    config = make_config(tiny_models, sft_epochs=sft_epochs)
    whole = train(start_run(config, rows[:32], rows[32:40], tmp_path / "whole"))
    kill_at(stage, step)
    cut = start_run(config, rows[:32], rows[32:40], tmp_path / "cut", mirror=tmp_path / "drive")
    with pytest.raises(Killed):
        train(cut)
    cut.close()
    shutil.copytree(tmp_path / "drive", tmp_path / "drive copy")
    newest = find_valid_slots(tmp_path / "drive copy")[0][1]
    capsys.readouterr()
    resumed = start_run(
        config, rows[:32], rows[32:40], tmp_path / "new machine", mirror=tmp_path / "drive copy"
    )
    trainer = train(resumed)
    expected_stage, expected_step = ("sft", 8) if step == 1 else (stage, 4)
    assert (newest["stage"], newest["step"]) == (expected_stage, expected_step)
    assert resumed.progress.resumed_at == (
        [] if step == 1 else [4]
    )  # the warm-up had ended: nothing of it is repeated
    assert resumed.progress.steps_executed == {
        "sft": 4 if stage == "sft" else 0,
        "dpo": 4 if step == 5 and stage == "dpo" else 8,
    }
    assert ("ステップ 4 / 8 から再開します" in capsys.readouterr().out) == (step == 5)
    ours, theirs = weights(trainer), weights(whole)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert comparable(trainer.state.log_history) == comparable(whole.state.log_history)
    assert [entry["step"] for entry in comparable(resumed.progress.sft_log)] == (
        [1, 2, 3, 4, 6, 8] if sft_epochs else []
    )


def test_a_finished_run_is_not_trained_again(tiny_models, rows, start_run, tmp_path, capsys):
    config = make_config(tiny_models)
    first = train(start_run(config, rows[:16], rows[16:24], mirror=tmp_path / "drive"))
    shutil.copytree(tmp_path / "drive", tmp_path / "copy") if find_valid_slots(tmp_path / "drive") else None
    run = start_run(config, rows[:16], rows[16:24])
    assert "この学習は終わっています（DPO：ステップ 4 / 4）" in capsys.readouterr().out
    again = train(run)
    assert run.progress.steps_executed == {"sft": 0, "dpo": 0} and run.progress.resumed_at == []
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(first).items())
    assert comparable(again.state.log_history) == comparable(first.state.log_history)


def test_a_damaged_checkpoint_is_announced_and_the_one_before_it_taken(
    tiny_models, rows, start_run, tmp_path, kill_at, capsys
):
    config = make_config(tiny_models, sft_epochs=0)
    kill_at("dpo", 5)
    run = start_run(config, rows[:32], rows[32:40])
    with pytest.raises(Killed):
        train(run)
    newest = list_checkpoints(run.checkpoints)[0] / "optimizer.pt"
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    capsys.readouterr()
    run = start_run(config, rows[:32], rows[32:40])
    train(run)
    assert capsys.readouterr().out.count("dpo-000004 は書きかけか壊れている") == 1
    assert run.progress.resumed_at == [2] and run.progress.steps_executed["dpo"] == 6


def test_other_rows_and_another_base_are_refused(tiny_models, rows, start_run, tmp_path):
    config = make_config(tiny_models, sft_epochs=0, model_name=str(tmp_path / "model"))
    shutil.copytree(tiny_models["gpt2"], tmp_path / "model")
    train(start_run(config, rows[:8], rows[8:16]))
    with pytest.raises(UserError, match="違い：学習データ（8 行、8 行 → 7 行、8 行）"):
        start_run(config, rows[:7], rows[8:16])
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["transformer.ln_f.bias"] += 1
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="違い：ベースモデル"):
        train(start_run(config, rows[:8], rows[8:16]))


def test_an_adapter_that_was_not_loaded_stops_the_run(tiny_models, rows, start_run, kill_at, monkeypatch):
    config = make_config(tiny_models)
    kill_at("dpo", 5)
    with pytest.raises(Killed):
        train(start_run(config, rows[:32], rows[32:40]))
    monkeypatch.setattr("dpo_helpers.train.loop.load_adapters", lambda model, checkpoint: None)
    monkeypatch.setattr(
        "transformers.Trainer._load_from_checkpoint", lambda self, checkpoint, model=None: None
    )
    with pytest.raises(UserError, match="メモリの重み（default）がファイルと一致しません"):
        train(start_run(config, rows[:32], rows[32:40]))


def test_what_a_killed_process_left_half_written_costs_no_checkpoint(
    start_run, embedded_folder, rows, kill_at, monkeypatch, capsys
):
    config = RunConfig(model_name="embedded", sft_epochs=0, checkpoint_steps=2)
    kill_at("dpo", 3)
    run = start_run(config, rows[:16], rows[16:24])
    with pytest.raises(Killed):
        train(run)
    half = run.checkpoints / "writing-dpo" / "checkpoint-4" / "base_model"
    shutil.copytree(embedded_folder, half)
    (half.parent / "left_behind.bin").write_bytes(b"half")
    capsys.readouterr()
    run = start_run(config, rows[:16], rows[16:24])
    train(run)
    assert "保存できませんでした" not in capsys.readouterr().out
    assert run.newest().step == 4 and not (run.newest().path / "left_behind.bin").exists()


@pytest.mark.parametrize("full", [True, False])
def test_a_full_disk_is_told_as_one_and_another_error_is_shown_as_it_is(
    tiny_models, rows, start_run, monkeypatch, full
):
    from transformers import Trainer

    def fail(*_, **__):
        raise RuntimeError("PytorchStreamWriter failed writing file" if full else "a mistake of ours")

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", fail)
    words = r"(?s)いっぱい.*続きから始まります" if full else "a mistake of ours"
    with pytest.raises(UserError if full else RuntimeError, match=words):
        train(start_run(make_config(tiny_models, sft_epochs=0), rows[:8], rows[8:16]))


def test_the_result_goes_to_the_mirror_even_where_its_checkpoint_did_not(
    tiny_models, rows, start_run, tmp_path, monkeypatch, capsys
):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dpo_helpers.keep.drive.copy_in_place", full)
    run = start_run(make_config(tiny_models, sft_epochs=0), rows[:8], rows[8:16], mirror=tmp_path / "drive")
    save(run, train(run))
    assert run.deliver() is False
    assert "空き容量" in capsys.readouterr().out
    name = "adapter_model.safetensors"
    assert (tmp_path / "drive" / name).read_bytes() == (run.folder / name).read_bytes()
