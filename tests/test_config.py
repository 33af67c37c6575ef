import json
from dataclasses import fields

import pytest

from dpo_helpers.config import RunConfig
from dpo_helpers.errors import UserError


def test_the_seeds_values_are_the_defaults():
    config = RunConfig()
    assert config.model_name == "microsoft/DialoGPT-small"
    assert (config.num_samples, config.num_train_epochs, config.learning_rate, config.max_length) == (
        1000,
        1.0,
        5e-6,
        128,
    )
    assert (
        config.per_device_train_batch_size,
        config.gradient_accumulation_steps,
        config.effective_batch_size,
    ) == (1, 4, 4)
    assert config.lora_alpha == config.lora_scale * config.lora_rank


def test_every_numeric_knob_has_a_range_that_it_refuses_to_leave():
    for item in fields(RunConfig):
        if item.type is str:
            continue
        low, high = item.metadata["allowed"]
        for wrong in (low - 1, high + 1):
            with pytest.raises(UserError, match=f"{item.name} = .*以上.*以下"):
                RunConfig(**{item.name: wrong})


def test_all_violations_are_told_at_once():
    with pytest.raises(UserError) as error:
        RunConfig(beta=0, learning_rate="fast", loss_type="unknown", seed=1.5)
    assert all(
        name in str(error.value) for name in ("beta", "learning_rate", "loss_type", "seed", "sigmoid", "整数")
    )


@pytest.mark.parametrize("value", [True, None, float("nan"), "", [1]])
def test_values_of_a_wrong_kind_are_refused(value):
    with pytest.raises(UserError):
        RunConfig(num_samples=value)


def test_numbers_may_come_as_text():
    assert RunConfig(learning_rate="5e-6", num_samples="300", sft_epochs="0") == RunConfig(
        num_samples=300, sft_epochs=0
    )


def test_saved_and_loaded_is_the_same(tmp_path):
    config = RunConfig(beta=0.3, model_name="日本語/モデル")
    config.save(tmp_path / "run_config.json")
    assert RunConfig.load(tmp_path / "run_config.json") == config


def test_a_partial_file_with_a_byte_order_mark_keeps_the_other_defaults(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"beta": 0.5}), encoding="utf-8-sig")
    assert RunConfig.load(tmp_path / "c.json") == RunConfig(beta=0.5)


@pytest.mark.parametrize("text", ["{", "[1]", '{"betta": 1}'])
def test_a_broken_file_names_itself(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(UserError, match=r"c\.json"):
        RunConfig.load(tmp_path / "c.json")


def test_a_missing_file_names_itself():
    with pytest.raises(UserError, match=r"absent\.json が見つかりません"):
        RunConfig.load("absent.json")


def test_the_form_reads_capitals_and_ignores_other_names():
    assert RunConfig.from_form({"BETA": 0.2, "beta": 9, "QUICK_FIX": True}) == RunConfig(beta=0.2)


def test_differences_name_the_knob_and_both_values():
    assert RunConfig().differences(RunConfig(seed=1)) == ["seed: 42 → 1"]
