"""Each rule of text on four rows, and what is shown beside the rules."""

import pytest

from dpo_helpers.judge.rules import (
    RULE_NAMES,
    describe_rules,
    find_best_rule,
    measure_beside,
    measure_rules,
    share_right,
)


def row(chosen, rejected, concept="犬"):
    return {
        "prompt": f"質問: {concept}とは何ですか？\n回答:\n",
        "chosen": chosen,
        "rejected": rejected,
        "concept": concept,
    }


ROWS = [
    row("犬は、人と暮らす動物です。", "犬は、動物"),  # longer, ends
    row(
        "犬は、吠える動物です。", "犬は、吠える動物です。吠える動物です。吠える動物です。"
    ),  # shorter, no loop
    row("犬は、走ります。", "猫は、走ります。"),  # names
    row("犬は、泳ぎます。", "犬は、寝ます。よ"),  # the same length; ends
]


def test_each_rule_on_four_rows():
    usual = sum(len(r["chosen"]) for r in ROWS) / 4  # 10 characters
    assert usual == 10.0
    assert measure_rules(ROWS, ROWS) == {
        "longer": (1 + 0 + 0.5 + 0.5) / 4,
        "shorter": (0 + 1 + 0.5 + 0.5) / 4,
        "usual_length": (1 + 1 + 0.5 + 0.5) / 4,
        "names": (0.5 + 0.5 + 1 + 0.5) / 4,
        "ends": (1 + 0.5 + 0.5 + 1) / 4,
        "names_and_ends": (1 + 0.5 + 1 + 1) / 4,
        "no_loop": (0.5 + 1 + 0.5 + 0.5) / 4,
    }
    assert find_best_rule(measure_rules(ROWS, ROWS)) == ("names_and_ends", 0.875)


def test_without_a_concept_the_rule_looks_for_the_words_of_the_question():
    rows = [
        {
            "prompt": "質問: 朝ごはんは何ですか？\n回答:\n",
            "chosen": "朝ごはんはパンです。",
            "rejected": "パンです。ご飯ではない。",
        }
    ]
    assert measure_rules(rows, rows)["names"] == 1.0


def test_a_tie_counts_as_half():
    assert share_right([1, 0, -1, 2]) == 0.625


def test_what_stands_beside_the_rules(tiny_models):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dpo_helpers.judge.scores import score_answers

    base = AutoModelForCausalLM.from_pretrained(tiny_models["gpt2"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["gpt2"])
    expected = {
        side: score_answers(base, tokenizer, [(r["prompt"], r[side]) for r in ROWS], 128)
        for side in ("chosen", "rejected")
    }
    lora = LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=True, init_lora_weights=False)
    found = measure_beside(get_peft_model(base, lora), tokenizer, ROWS, ROWS, 128)
    assert found["base_log_prob_sum"] == share_right([c - r for c, r in zip(*expected.values(), strict=True)])
    assert set(found) == {"characters", "base_log_prob_sum", "base_log_prob_mean"}
    trained = [row("良い答え", "悪い返事")] * 3
    assert measure_beside(get_peft_model(base, lora), tokenizer, trained, trained, 128)["characters"] == 1.0
    swapped = [row("悪い返事", "良い答え")]
    assert measure_beside(get_peft_model(base, lora), tokenizer, trained, swapped, 128)["characters"] == 0.0


def test_the_table_begins_with_the_model_itself():
    metrics = {
        "held_out": {"accuracy": 0.9},
        "rules": dict.fromkeys(RULE_NAMES, 0.5),
        "beside": {"characters": 0.6},
    }
    table = describe_rules(metrics)
    assert table[0] == {"見分け方": "学習したモデル（DPO の後）", "正解率": "90.0%"}
    assert {"見分け方": "単純な規則：長いほうを選ぶ", "正解率": "50.0%"} in table and len(table) == 9


@pytest.mark.parametrize("seed", [1, 2, 42])
def test_no_rule_of_text_solves_the_generated_rows(seed):
    from dpo_helpers.data.generate import generate_preferences, split_rows

    rows = generate_preferences(1000, seed)
    training, _ = split_rows(rows, 0.3, seed)
    assert find_best_rule(measure_rules(training, rows))[1] <= 0.65
    for kind in ("wrong_fact", "off_form"):
        hard = [r for r in rows if r["rejection_kind"] == kind]
        assert find_best_rule(measure_rules(training, hard))[1] <= 0.6
