"""A stage is trained to its end or stopped well: too little memory, NaN, the stop button."""

import itertools
import json
import signal

import pytest
import torch
from tiny_run import build, losses, make_config, train, weights

from dpo_helpers.errors import TrainingStopped, UserError
from dpo_helpers.train.trainers import evaluate_curve_rows

pytestmark = pytest.mark.versions


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
