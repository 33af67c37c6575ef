"""The trainings themselves, on tiny models, at both ends of the version range."""

import math

import pytest
from tiny_run import build, losses, train, train_on, warm_up

from dpo_helpers.config import RunConfig
from dpo_helpers.data.tokens import format_row
from dpo_helpers.errors import UserError
from dpo_helpers.judge.history import summarize_training
from dpo_helpers.judge.scores import score_rows, summarize_scores
from dpo_helpers.model.answer import use_role
from dpo_helpers.model.load import load_base_model
from dpo_helpers.train.trainers import evaluate_curve_rows, make_dataset, sample_curve_rows

pytestmark = pytest.mark.versions
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor "
    "%}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_config(model, **changes):
    values = {
        "model_name": str(model),
        "learning_rate": 1e-3,
        "lora_rank": 4,
        "lora_scale": 4.0,
        "sft_learning_rate": 1e-2,
        "logging_steps": 1,
    }
    return RunConfig(**{**values, "sft_epochs": 0, **changes})


@pytest.fixture
def run(start_run, tmp_path):
    def start_and_train(config, rows, folder=tmp_path / "run", count=32):
        return train(start_run(config, rows[:count], rows[count : count + 16], folder))

    return start_and_train


@pytest.mark.parametrize("layout", ["gpt2", "llama"])
@pytest.mark.parametrize("sft_epochs", [0, 1])
def test_the_first_loss_is_ln_2_and_the_loss_falls(tiny_models, rows, run, layout, sft_epochs):
    repeated = (
        rows[:4] * 16 + rows[100:116]
    )  # four pairs again and again can be learned even by random layers
    trainer = run(
        make_config(tiny_models[layout], sft_epochs=sft_epochs, learning_rate=1e-2), repeated, count=64
    )
    summary = summarize_training(trainer.state.log_history)
    assert summary["first_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert summary["final_train_loss"] < 0.5
    start = trainer.state.log_history[0]
    assert start["eval_loss"] == pytest.approx(math.log(2), abs=1e-5) and start[
        "eval_rewards/margins"
    ] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("sft_epochs", [0, 1])
def test_four_by_one_and_one_by_four_give_the_same_losses(tiny_models, rows, run, tmp_path, sft_epochs):
    found = {}
    for batch, accumulation in ((4, 1), (1, 4)):
        config = make_config(
            tiny_models["gpt2"],
            sft_epochs=sft_epochs,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        found[batch] = losses(run(config, rows, tmp_path / f"{batch}").state.log_history)
    assert len(found[4]) == 8 and found[4] == pytest.approx(found[1], abs=1e-4)


def test_the_warm_up_teaches_the_chosen_answers_and_dpo_starts_from_it(tiny_models, rows, start_run):
    run = start_run(make_config(tiny_models["gpt2"], sft_epochs=3), rows[:64], rows[64:72])
    warmed_up = warm_up(run)
    curve = losses(run.progress.sft_log)
    assert curve[-1] < curve[0] - 0.3
    trainer = build(run, warmed_up)
    model = trainer.model
    before = {name: p.clone() for name, p in model.named_parameters() if ".ref." in name}
    for name, value in before.items():
        assert value.equal(model.get_parameter(name.replace(".ref.", ".default.")))
    train_on(run, trainer, warmed_up)
    assert all(value.equal(model.get_parameter(name)) for name, value in before.items())
    assert any(
        not value.equal(model.get_parameter(name.replace(".ref.", ".default.")))
        for name, value in before.items()
    )


@pytest.mark.parametrize("sft_epochs", [0, 1])
def test_our_figures_are_those_of_trl(tiny_models, rows, run, sft_epochs):
    config = make_config(tiny_models["gpt2"], sft_epochs=sft_epochs)
    trainer = run(config, rows)
    theirs = evaluate_curve_rows(trainer)
    ours = summarize_scores(
        score_rows(trainer.model, trainer.processing_class, rows[32:48], config.max_length), config.beta
    )
    assert ours["loss"] == pytest.approx(theirs["eval_loss"], abs=1e-4)
    assert ours["margin"] == pytest.approx(theirs["eval_rewards/margins"], abs=1e-4)
    assert ours["accuracy"] == pytest.approx(theirs["eval_rewards/accuracies"])


def test_our_token_ids_are_those_that_trl_prepares(tiny_models, rows, start_run, tmp_path):
    from dpo_helpers.data.tokens import encode_answers

    for template in (None, CHAT):
        config = make_config(tiny_models["gpt2"])
        _, tokenizer = load_base_model(config)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "model")
        for name in ("config.json", "model.safetensors"):
            (tmp_path / "model" / name).write_bytes((tiny_models["gpt2"] / name).read_bytes())
        trainer = build(start_run(make_config(tmp_path / "model"), rows[:8], rows[8:12]))
        for row, prepared in zip(rows[:8], trainer.train_dataset, strict=True):
            for side in ("chosen", "rejected"):
                ((prompt, ids),) = encode_answers(trainer.processing_class, [(row["prompt"], row[side])])
                assert ids == prepared["prompt_ids"] + prepared[f"{side}_ids"]
                assert prompt == prepared["prompt_ids"]


def test_the_roles_answer_as_base_reference_and_policy(tiny_models, rows, run):
    trainer = run(make_config(tiny_models["gpt2"], sft_epochs=1), rows)
    base, _ = load_base_model(make_config(tiny_models["gpt2"]))
    import torch

    ids = torch.tensor([[1, 2, 3]])
    outputs = {}
    for role in ("base", "reference", "policy"):
        with use_role(trainer.model, role), torch.no_grad():
            outputs[role] = trainer.model(ids).logits
    assert torch.allclose(outputs["base"], base(ids).logits, atol=1e-5)
    assert not torch.allclose(outputs["base"], outputs["reference"], atol=1e-3)
    assert not torch.allclose(outputs["reference"], outputs["policy"], atol=1e-3)
    assert trainer.model.active_adapter == "default"
    assert all(p.requires_grad == (".default." in name) for name, p in trainer.model.named_parameters())


def test_cells_run_twice_train_once(tiny_models, rows, start_run, capsys):
    run = start_run(make_config(tiny_models["gpt2"], sft_epochs=1), rows[:8], rows[8:16])
    warmed_up = warm_up(run)
    trainer = train_on(run, build(run, warmed_up), warmed_up)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    assert train_on(run, trainer, warmed_up) is trainer
    assert "終わっています" in capsys.readouterr().out
    again = train(run)
    assert run.progress.steps_executed == {"sft": 2, "dpo": 2}
    assert all(value.equal(again.model.get_parameter(name)) for name, value in before.items())


def test_sharded_weights_are_refused_with_the_way_to_go(tiny_models, rows, start_run, monkeypatch):
    from trl import DPOTrainer

    make = DPOTrainer.__init__

    def shard(self, *args, **kwargs):
        make(self, *args, **kwargs)
        self.is_fsdp_enabled = True  # as under `accelerate launch --use_fsdp`

    monkeypatch.setattr(DPOTrainer, "__init__", shard)
    with pytest.raises(UserError, match=r"FSDP.*対応していません.*accelerate launch --multi_gpu"):
        build(start_run(make_config(tiny_models["gpt2"]), rows[:8], rows[8:16]))


def test_a_chat_template_gets_messages_and_plain_text_stays_plain(rows):
    row = {"prompt": "質問: 変数とは何ですか？\n回答:\n", "chosen": "名前です。", "rejected": "さあ。"}
    assert format_row(row, False) == row
    assert format_row(row, True)["prompt"] == [{"role": "user", "content": "変数とは何ですか？"}]
    assert format_row(row, True)["rejected"] == [{"role": "assistant", "content": "さあ。"}]


def test_the_data_set_holds_nothing_but_what_trl_reads(rows, embedded_folder):
    from transformers import AutoTokenizer

    assert make_dataset(rows[:3], AutoTokenizer.from_pretrained(embedded_folder)).column_names == [
        "prompt",
        "chosen",
        "rejected",
    ]


def test_the_curve_rows_are_spread_over_all(rows):
    assert sample_curve_rows(rows, 4) == [rows[0], rows[250], rows[500], rows[750]]
    assert sample_curve_rows(rows[:3], 40) == rows[:3]
