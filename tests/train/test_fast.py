"""The fast trainer against TRL's own: the same losses, gradients, log and evaluation, at both ends of the
version range.
"""

import math

import pytest
from tiny_run import build as build_trainer
from tiny_run import train_on, warm_up

from dpo_helpers.config import RunConfig
from dpo_helpers.machine import choose_micro_batch

pytestmark = pytest.mark.versions


def make_config(model, **changes):
    values = {
        "model_name": str(model),
        "learning_rate": 1e-2,
        "lora_rank": 4,
        "lora_scale": 4.0,
        "sft_learning_rate": 1e-2,
        "logging_steps": 1,
    }
    return RunConfig(
        **{
            **values,
            "sft_epochs": 0,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            **changes,
        }
    )


@pytest.fixture
def build(start_run, tmp_path):
    """A function that returns the trainers "fast" and "stock" of one configuration, on the same rows.

    Each comes with what it was built from: (trainer, run, folder of the warm-up).
    """

    def make(config, train_rows, held_out_rows):
        trainers = {}
        for name in ("fast", "stock"):
            run = start_run(config.replace({"trainer": name}), train_rows, held_out_rows, tmp_path / name)
            warmed_up = warm_up(run)
            trainers[name] = build_trainer(run, warmed_up), run, warmed_up
        return trainers

    return make


def scramble_adapter(model):
    """Move the trained adapter away from the reference, so that no difference is zero."""
    import torch

    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".default." in name:
            parameter.data += 0.1 * torch.randn_like(parameter)


def loss_and_gradient(trainer, rows):
    import torch

    trainer.model.zero_grad()
    loss = trainer.compute_loss(
        trainer.model, trainer.data_collator([trainer.train_dataset[i] for i in rows])
    )
    loss.backward()
    return loss.item(), torch.cat(
        [p.grad.flatten() for _, p in sorted(trainer.model.named_parameters()) if p.grad is not None]
    )


def test_a_batch_of_two_pairs_becomes_one_row():
    import torch

    from dpo_helpers.train.fast import pack_pairs

    # pair 0: prompt 1 2, chosen 3 4, rejected 5; pair 1: prompt 6, chosen 7, rejected 8 9; 0 pads
    ids = torch.tensor([[1, 2, 3, 4], [6, 7, 0, 0], [1, 2, 5, 0], [6, 8, 9, 0]])
    answers = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 1, 1, 0]])
    pack = pack_pairs(ids, (ids > 0).long(), answers)
    assert pack.model_inputs["input_ids"].tolist() == [
        [1, 2, 3, 6, 8]
    ]  # an answer's last token predicts nothing
    assert pack.model_inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert pack.targets.tolist() == [3, 4, 7, 5, 8, 9] and pack.owners.tolist() == [0, 0, 1, 2, 3, 3]
    assert pack.model_inputs["logits_to_keep"].tolist() == [
        1,
        2,
        3,
        1,
        3,
        4,
    ]  # where each of them is predicted
    assert (pack.model_inputs["attention_mask"][0, 0] == 0).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


def test_a_rejected_answer_sees_the_prompt_and_not_the_chosen_one():
    import torch

    from dpo_helpers.train.fast import pack_pairs

    ids = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 6, 7, 8]])
    pack = pack_pairs(ids, torch.ones_like(ids), torch.tensor([[0, 0, 1, 1, 1]] * 2))
    assert pack.model_inputs["input_ids"].tolist() == [[1, 2, 3, 4, 6, 7]]
    assert pack.model_inputs["position_ids"].tolist() == [[0, 1, 2, 3, 2, 3]]
    assert (pack.model_inputs["attention_mask"][0, 0, 5] == 0).int().tolist() == [1, 1, 0, 0, 1, 1]


def test_the_loss_worked_by_hand(tiny_models, rows, build, monkeypatch):
    import torch

    trainer = build(make_config(tiny_models["gpt2"], beta=0.5), rows[:4], rows[4:8])["fast"][0]
    scores = {
        "policy": torch.tensor([[-2.0, -5.0], [-6.0, -4.0]]),
        "reference": torch.tensor([[-3.0, -3.0], [-5.0, -5.0]]),
    }
    monkeypatch.setattr(
        trainer, "_score", lambda model, inputs, sums: sums.append(torch.ones(2, 4)) or scores["policy"]
    )
    monkeypatch.setattr(trainer, "_score_reference", lambda inputs: scores["reference"])
    loss = trainer.compute_loss(trainer.model, {"attention_mask": torch.ones(4, 3)})
    # margins 0.5 * ((-2 + 3) - (-6 + 5)) = 1 and 0.5 * ((-5 + 3) - (-4 + 5)) = -1.5
    assert loss.item() == pytest.approx((math.log1p(math.exp(-1)) + math.log1p(math.exp(1.5))) / 2)
    measured = trainer.measured[trainer.model.training]
    assert (
        measured["rewards/accuracies"] == [0.5]
        and measured["rewards/margins"] == [-0.25]
        and measured["logps/rejected"] == [-5.0]
    )


def test_the_sum_with_the_sft_loss_worked_by_hand(tiny_models, rows, build, monkeypatch):
    import torch

    config = make_config(tiny_models["gpt2"], beta=0.5, loss_type="sigmoid+sft")
    trainer = build(config, rows[:4], rows[4:8])["fast"][0]
    policy, reference = torch.tensor([[-2.0, -5.0], [-6.0, -4.0]]), torch.tensor([[-3.0, -3.0], [-5.0, -5.0]])
    monkeypatch.setattr(
        trainer, "_score", lambda model, inputs, sums: sums.append(torch.ones(2, 4)) or policy
    )
    monkeypatch.setattr(trainer, "_score_reference", lambda inputs: reference)
    answers = torch.zeros(4, 9)
    answers[0, 3:5] = answers[1, 2:7] = 1  # the chosen answers have two and five tokens
    loss = trainer.compute_loss(
        trainer.model, {"attention_mask": torch.ones(4, 9), "completion_mask": answers}
    )
    preference = (math.log1p(math.exp(-1)) + math.log1p(math.exp(1.5))) / 2
    sft = (2 / 2 + 5 / 5) / 2
    assert loss.item() == pytest.approx(preference + sft)
    measured = trainer.measured[trainer.model.training]
    assert measured["loss"] == [pytest.approx(preference)] and measured["sft_loss"] == [pytest.approx(sft)]


def test_the_sum_of_one_pair_and_its_gradient_are_those_of_trl(tiny_models, rows, build):
    trainers = build(make_config(tiny_models["gpt2"], loss_type="sigmoid+sft"), rows[:16], rows[16:24])
    results = []
    for trainer, _, _ in trainers.values():
        scramble_adapter(trainer.model)
        results.append(loss_and_gradient(trainer, [3]))
    (fast, fast_gradient), (stock, stock_gradient) = results
    assert trainers["fast"][0].is_exact and fast == pytest.approx(stock, abs=1e-4) and fast > 2
    assert (fast_gradient - stock_gradient).norm() < 1e-4 * stock_gradient.norm()


@pytest.mark.parametrize("layout", ["gpt2", "llama"])
@pytest.mark.parametrize("sft_epochs", [0, 1])
@pytest.mark.parametrize("max_length", [128, 24])
def test_losses_and_gradients_are_those_of_trl(tiny_models, rows, build, layout, sft_epochs, max_length):
    trainers = build(
        make_config(tiny_models[layout], sft_epochs=sft_epochs, max_length=max_length), rows[:16], rows[16:24]
    )
    results = []
    for trainer, _, _ in trainers.values():
        lengths = [len(row["prompt_ids"]) + len(row["chosen_ids"]) for row in trainer.train_dataset]
        assert min(lengths) < max(lengths) and (max(lengths) > max_length) == (
            max_length == 24
        )  # padding, and rows that are cut
        scramble_adapter(trainer.model)
        results.append(loss_and_gradient(trainer, range(8)))
        assert ("ref" in trainer.model.peft_config) == bool(sft_epochs)
    (fast, fast_gradient), (stock, stock_gradient) = results
    assert trainers["fast"][0].is_exact
    assert fast == pytest.approx(stock, abs=1e-4) and abs(fast - math.log(2)) > 1e-3
    assert (
        fast_gradient - stock_gradient
    ).norm() < 1e-4 * stock_gradient.norm() and stock_gradient.norm() > 0.1


@pytest.mark.parametrize("sft_epochs", [0, 1])
def test_a_whole_run_logs_the_names_and_values_of_trl(tiny_models, rows, build, sft_epochs):
    logs = {}
    config = make_config(
        tiny_models["gpt2"], sft_epochs=sft_epochs, num_train_epochs=2, checkpoint_steps=4, max_length=64
    )
    for name, (trainer, run, warmed_up) in build(config, rows[:32], rows[32:48]).items():
        logs[name] = train_on(run, trainer, warmed_up).state.log_history
    times = {
        "train_runtime",
        "train_samples_per_second",
        "train_steps_per_second",
        "total_flos",
        "eval_runtime",
        "eval_samples_per_second",
        "eval_steps_per_second",
        "eval_model_preparation_time",
    }
    assert len(logs["fast"]) == len(logs["stock"]) == 16 + 5 + 1
    for fast, stock in zip(logs["fast"], logs["stock"], strict=True):
        assert set(fast) == set(stock)
        # before the first update every margin is 0, and whose rounding is above it is chance
        chance = {"rewards/accuracies"} if fast.get("step") == 1 else set()
        for name in set(fast) - times - chance:
            assert fast[name] == pytest.approx(stock[name], rel=2e-3, abs=1e-3), name
    assert logs["fast"][-2]["eval_loss"] != pytest.approx(math.log(2), abs=5e-3)


def test_the_references_of_an_evaluation_are_computed_once(tiny_models, rows, build, monkeypatch):
    from dpo_helpers.train.fast import FastDPOTrainer

    config, calls = make_config(tiny_models["gpt2"], checkpoint_steps=2), []
    trainer, run, _ = build(config, rows[:16], rows[16:32])["fast"]
    original = FastDPOTrainer._score_reference
    monkeypatch.setattr(
        FastDPOTrainer,
        "_score_reference",
        lambda self, inputs: calls.append(len(inputs["input_ids"])) or original(self, inputs),
    )
    train_on(run, trainer)
    assert (
        calls == [16, 16] + [8] * 4
    )  # two batches of 8 held-out pairs for three evaluations, and four steps of 4 pairs
    assert {"ref_chosen_logps", "ref_rejected_logps"} <= set(trainer.eval_dataset.column_names)


def test_rows_that_are_cut_before_their_answers_stay_at_ln_2(tiny_models, rows, build):
    import torch

    trainer = build(make_config(tiny_models["gpt2"]), rows[:4], rows[4:8])["fast"][0]
    inputs = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    inputs["completion_mask"] = torch.zeros_like(
        inputs["completion_mask"]
    )  # TRL 0.29 keeps such rows, 1.16 drops them
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert all(not p.grad.any() for p in trainer.model.parameters() if p.grad is not None)


def test_half_precision_keeps_the_log_softmax_in_float32(tiny_models, rows, build):
    import torch

    trainers, losses = build(make_config(tiny_models["gpt2"]), rows[:16], rows[16:24]), {}
    for name, (trainer, _, _) in trainers.items():
        scramble_adapter(trainer.model)
        exact = loss_and_gradient(trainer, range(8))[0]
        with torch.autocast("cpu", torch.bfloat16):
            losses[name] = loss_and_gradient(trainer, range(8))[0] - exact
    assert abs(losses["fast"]) < 0.05 and abs(losses["stock"]) < 0.05


def test_a_model_that_ignores_the_mask_takes_the_stock_path(
    tiny_models, rows, start_run, monkeypatch, capsys
):
    from transformers import GPT2LMHeadModel

    original = GPT2LMHeadModel.forward

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, logits_to_keep=0, **options):
        if attention_mask is not None and attention_mask.dim() == 4:
            attention_mask = None
        return original(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            logits_to_keep=logits_to_keep,
            **options,
        )

    monkeypatch.setattr(GPT2LMHeadModel, "forward", forward)
    run = start_run(make_config(tiny_models["gpt2"]), rows[:8], rows[8:16])
    trainer = build_trainer(run)
    assert not trainer.is_exact and "標準の計算で学習します" in capsys.readouterr().out
    assert train_on(run, trainer).state.log_history[1]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_another_loss_and_the_knob_take_trls_own_trainer(tiny_models, rows, start_run, tmp_path, capsys):
    from trl import DPOTrainer

    for i, changes in enumerate(({"loss_type": "ipo"}, {"trainer": "stock"})):
        config = make_config(tiny_models["gpt2"], **changes)
        run = start_run(config, rows[:8], rows[8:16], tmp_path / str(i))
        assert type(build_trainer(run)) is DPOTrainer
        assert ("ipo は TRL の標準" in capsys.readouterr().out) == (i == 0)


def test_the_micro_batch_fills_a_pack_and_divides_the_effective_batch():
    sizes = {(1, 4, 128): 2, (1, 6, 128): 2, (1, 9, 64): 3, (4, 1, 128): 4, (1, 4, 1024): 1, (1, 3, 128): 1}
    for (batch, accumulation, max_length), size in sizes.items():
        values = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "max_length": max_length,
        }
        assert choose_micro_batch(RunConfig(**values), "cpu") == size
        assert choose_micro_batch(RunConfig(**values, trainer="stock"), "cpu") == batch
    assert choose_micro_batch(RunConfig(), "cuda") == 4
