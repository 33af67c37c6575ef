"""What a user decides: the knobs of a run, the switches of the notebook, and the cell that holds both."""

import json
import math
from dataclasses import fields

import pytest

from dpo_helpers.config import RunConfig, Switches, describe_settings, read_form
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


@pytest.mark.parametrize("value", [True, None, math.nan, math.inf, -math.inf, "", [1]])
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


def test_differences_name_the_knob_and_both_values():
    assert RunConfig().differences(RunConfig(seed=1)) == ["seed: 42 → 1"]


def test_the_settings_that_differ_are_told_with_their_meaning():
    assert describe_settings(RunConfig()) == "すべて既定の設定です。"
    assert describe_settings(RunConfig(seed=1, beta=0.5)).splitlines() == [
        "既定から変えた設定：",
        "・seed: 42 → 1（乱数シード）",
        "・beta: 0.1 → 0.5（参照モデルから離れにくくする強さ（大きいほど離れない））",
    ]


def test_the_form_gives_a_run_and_the_switches_of_the_notebook():
    names = {"BETA": 0.2, "RUN_NAME": "二回目", "MORE": {"lora_rank": 4, "PUSH": True}}
    others = {"beta": 9, "QUICK_FIX": True, "clock": object(), "In": ["BETA = 3"]}
    config, switches = read_form(names | others)
    assert config == RunConfig(beta=0.2, lora_rank=4)
    assert switches == Switches(run_name="二回目", push=True)
    assert read_form({}) == (RunConfig(), Switches())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"betta": 0.2}, r"MORE に知らない項目があります：betta。使える項目：.*beta.*use_drive"),
        ({"seed": 1}, r"SEED は上のフォームにあります。MORE からは消して"),
        ({"use_drive": False}, r"USE_DRIVE は上のフォームにあります"),
        ({"beta": 0.2, "BETA": 0.3}, r"MORE に beta が二度あります"),
        ({"beta": 0.0}, r"beta = 0\.0：0\.001 以上 10 以下"),
        ({"beta": math.inf}, r"beta = inf：0\.001 以上 10 以下"),
        ({"beta": math.nan}, r"beta = nan：数値で"),
        ({"lora_rank": math.inf}, r"lora_rank = inf：整数で"),
        ({"lora_rank": 1.5}, r"lora_rank = 1\.5：整数で"),
        ({"lora_rank": True}, r"lora_rank = True：整数で"),
        ({"loss_type": "sigmod"}, r"loss_type = 'sigmod'：sigmoid, hinge"),
        ({"push": "いいえ"}, r"push = 'いいえ'：True か False で"),
        ({"share": 1}, r"share = 1：True か False で"),
        ({"device": "tpu"}, r"device = 'tpu'：auto, cuda, cpu のどれか"),
        ({"hub_repo": ""}, r"hub_repo：空にはできません"),
        ({1: 2}, r"MORE に知らない項目があります：1。"),
        ({"beta"}, r'MORE は \{"beta": 0\.3\} のように'),
        ("beta", r'MORE は \{"beta": 0\.3\} のように'),
    ],
)
def test_what_is_wrong_in_more_is_named(more, words):
    with pytest.raises(UserError, match=words):
        read_form({"SEED": 42, "USE_DRIVE": True, "MORE": more})


def test_every_violation_of_the_form_and_of_more_is_told_at_once():
    with pytest.raises(UserError) as error:
        read_form({"SEED": -1, "MORE": {"beta": 0, "max_length": 4}})
    assert all(f"  {name} = " in str(error.value) for name in ("seed", "beta", "max_length"))


def test_papermills_values_override_the_cell_and_more_holds_only_differences():
    cell = {"SEED": 42, "SFT_EPOCHS": 2.0, "MORE": {}}
    injected = {"SEED": 7, "MORE": {"beta": 0.2}, "LOGGING_STEPS": 2}  # the last has no form: it counts too
    assert read_form(cell | injected)[0] == RunConfig(seed=7, beta=0.2, logging_steps=2)


def test_a_settings_file_takes_the_place_of_the_forms_values_but_not_of_the_switches(tmp_path, capsys):
    RunConfig(beta=0.5).save(tmp_path / "best.json")
    names = {"SEED": 7, "RUN_NAME": "best", "MORE": {"config_file": str(tmp_path / "best.json")}}
    assert read_form(names) == (
        RunConfig(beta=0.5),
        Switches(run_name="best", config_file=str(tmp_path / "best.json")),
    )
    assert "best.json から読みます" in capsys.readouterr().out


def test_a_switch_is_never_a_knob_and_each_has_a_note():
    switches, knobs = fields(Switches), {item.name for item in fields(RunConfig)}
    assert not knobs & {item.name for item in switches}
    assert all(item.metadata["note"] for item in switches)
