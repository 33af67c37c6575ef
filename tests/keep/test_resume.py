"""A run that is cut off goes on to the same bytes, at both ends of the version range."""

import itertools
import json
import shutil
import signal

import pytest
import torch
from tiny_run import build, comparable, losses, make_config, save, train, weights

from dpo_helpers.config import RunConfig
from dpo_helpers.errors import TrainingStopped, UserError
from dpo_helpers.keep.checkpoints import find_valid_slots, list_checkpoints
from dpo_helpers.keep.run import open_run
from dpo_helpers.machine import find_machine
from dpo_helpers.train.trainers import evaluate_curve_rows

pytestmark = pytest.mark.versions


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package catches it."""


@pytest.fixture
def kill_at(monkeypatch):
    """A function that makes the training of one stage die in the middle of a step."""
    from transformers import Trainer

    def arm(stage, step):
        original = Trainer.training_step

        def training_step(self, *arguments, **options):
            if self.args.output_dir.endswith(stage) and self.state.global_step == step:
                monkeypatch.setattr(Trainer, "training_step", original)
                raise Killed
            return original(self, *arguments, **options)

        monkeypatch.setattr(Trainer, "training_step", training_step)

    return arm


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


@pytest.fixture
def out_of_memory(monkeypatch):
    """A function that lets training steps on more than `fits` rows, and evaluations on more than
    `fits_evaluation`, fail.
    """
    from transformers import Trainer
    from trl import DPOTrainer

    def arm(fits, fits_evaluation=8, from_step=0):
        for trainer, name, limit in (
            (Trainer, "training_step", fits),
            (DPOTrainer, "prediction_step", fits_evaluation),
        ):
            original = getattr(trainer, name)

            def checked(self, model, inputs, *rest, original=original, limit=limit, **options):
                sides = 2 if isinstance(self, DPOTrainer) else 1  # chosen and rejected lie in one batch
                if len(inputs["input_ids"]) > limit * sides and self.state.global_step >= from_step:
                    raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
                return original(self, model, inputs, *rest, **options)

            monkeypatch.setattr(trainer, name, checked)

    return arm


@pytest.fixture
def out_of_memory_once(monkeypatch):
    """A function that lets one stage run out of memory in its n-th call of a method of the trainer, once
    it has computed.
    """

    def arm(trainer_class, method, stage, number):
        original, calls = getattr(trainer_class, method), itertools.count()

        def checked(self, *arguments, **options):
            result = original(self, *arguments, **options)
            if self.args.output_dir.endswith(stage) and next(calls) == number:
                raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
            return result

        monkeypatch.setattr(trainer_class, method, checked)

    return arm


def assert_same_losses(run, trainer, undisturbed):
    whole_run, whole = undisturbed
    for ours, theirs, count in (
        (run.progress.sft_log, whole_run.progress.sft_log, 8),
        (trainer.state.log_history, whole.state.log_history, 8),
    ):
        assert len(losses(ours)) == count and losses(ours) == pytest.approx(losses(theirs), abs=1e-4)
    assert losses(trainer.state.log_history, "eval_loss") == pytest.approx(
        losses(whole.state.log_history, "eval_loss"), abs=1e-4
    )


@pytest.mark.parametrize(("fits", "from_step"), [(2, 0), (1, 0), (1, 3)])
def test_out_of_memory_halves_the_micro_batch_and_changes_no_loss(
    tiny_models, rows, start_run, out_of_memory, capsys, undisturbed, fits, from_step
):
    out_of_memory(fits, from_step=from_step)
    run = start_run(make_config(tiny_models, logging_steps=1), rows[:32], rows[32:40])
    trainer = train(run)
    assert run.progress.micro_batch == fits
    assert_same_losses(run, trainer, undisturbed)
    assert "4 から 2 に減らし、ためる回数を 1 から 2 に増やして" in capsys.readouterr().out


@pytest.mark.parametrize("number", [0, 5, 15], ids=["first", "in the middle of a step", "last"])
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_out_of_memory_at_any_micro_batch_changes_no_loss(
    tiny_models, rows, start_run, out_of_memory_once, capsys, undisturbed, stage, number
):
    from transformers import Trainer

    out_of_memory_once(Trainer, "training_step", stage, number)
    config = make_config(
        tiny_models, logging_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    run = start_run(config, rows[:32], rows[32:40])
    trainer = train(run)
    assert (run.progress.micro_batch, run.progress.eval_batch) == (1, 8)
    assert run.progress.resumed_at == {0: [], 5: [2], 15: [6]}[number]
    assert_same_losses(run, trainer, undisturbed)
    assert (
        capsys.readouterr().out.count(
            "2 から 1 に減らし、ためる回数を 2 から 4 に増やして続けます。1 回の更新に使うのは 4 ペアのまま"
        )
        == 1
    )


@pytest.mark.parametrize("number", [0, 2, 4], ids=["before the first step", "in the middle", "last"])
def test_out_of_memory_in_any_evaluation_halves_that_alone(
    tiny_models, rows, start_run, out_of_memory_once, capsys, undisturbed, number
):
    from trl import DPOTrainer

    out_of_memory_once(DPOTrainer, "prediction_step", "dpo", number)
    run = start_run(make_config(tiny_models, logging_steps=1), rows[:32], rows[32:40])
    trainer = train(run)
    assert (run.progress.micro_batch, run.progress.eval_batch) == (4, 4)
    assert_same_losses(run, trainer, undisturbed)
    assert capsys.readouterr().out.count("評価で一度に計算する行を 8 から 4 に減らして") == 1


def test_out_of_memory_in_the_look_before_training_changes_no_figure(
    tiny_models, rows, start_run, out_of_memory, capsys
):
    trainer = build(start_run(make_config(tiny_models, sft_epochs=0), rows[:8], rows[32:40]))
    whole = evaluate_curve_rows(trainer)
    out_of_memory(4, fits_evaluation=2)
    figures = evaluate_curve_rows(trainer)
    assert all(
        figures[name] == pytest.approx(whole[name], abs=1e-4)
        for name in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen")
    )
    assert trainer.args.per_device_eval_batch_size == 2
    assert "評価で一度に計算する数を 2 に減らして" in capsys.readouterr().out


def test_out_of_memory_at_one_row_says_what_else_can_be_done(tiny_models, rows, start_run, out_of_memory):
    out_of_memory(0)
    with pytest.raises(UserError, match="MAX_LENGTH"):
        train(start_run(make_config(tiny_models), rows[:8], rows[8:16]))


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_nan_stops_at_once_and_keeps_what_was_good(tiny_models, rows, start_run, monkeypatch, stage):
    from transformers import Trainer

    original = Trainer.training_step

    def training_step(self, model, *rest, **options):
        loss = original(self, model, *rest, **options)
        if self.state.global_step == 5 and self.args.output_dir.endswith(stage):
            next(p for p in model.parameters() if p.grad is not None).grad[0, 0] = float("nan")
        return loss

    monkeypatch.setattr(Trainer, "training_step", training_step)
    run = start_run(make_config(tiny_models), rows[:32], rows[32:40])
    with pytest.raises(TrainingStopped, match="NaN") as stopped:
        train(run)
    assert (stopped.value.reason, stopped.value.step) == ("nan", 5) and "LEARNING_RATE" in str(stopped.value)
    metrics = json.loads((run.folder / "metrics.json").read_text())
    assert metrics["stopped"] == {"reason": "nan", "step": 5, "stage": stage}
    assert (run.newest().stage, run.newest().step) == (stage, 4)
    from safetensors.torch import load_file

    assert all(
        value.isfinite().all() for value in load_file(run.folder / "adapter_model.safetensors").values()
    )
    assert run.read_finished() is None


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_stop_button_leaves_a_checkpoint_plots_and_a_usable_adapter_and_can_go_on(
    tiny_models, rows, start_run, monkeypatch, undisturbed, stage
):
    from transformers import Trainer

    original = Trainer.training_step

    def training_step(self, *rest, **options):
        if self.state.global_step == 2 and self.args.output_dir.endswith(stage) and not pressed:
            pressed.append(signal.raise_signal(signal.SIGINT))
        return original(self, *rest, **options)

    pressed = []
    monkeypatch.setattr(Trainer, "training_step", training_step)
    run = start_run(make_config(tiny_models), rows[:32], rows[32:40])
    with pytest.raises(TrainingStopped) as stopped:
        train(run)
    assert (stopped.value.reason, stopped.value.step) == ("interrupted", 3)
    assert (run.newest().stage, run.newest().step) == (stage, 3)
    assert json.loads((run.folder / "metrics.json").read_text())["stopped"]["reason"] == "interrupted"
    assert (run.folder / "training.png").stat().st_size > 1000 and (
        run.folder / "adapter_model.safetensors"
    ).is_file()
    trainer = train(run)
    assert run.progress.resumed_at == [3]
    assert all(torch.equal(value, weights(trainer)[name]) for name, value in weights(undisturbed[1]).items())


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
