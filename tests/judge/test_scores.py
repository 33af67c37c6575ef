import math

import pytest

from dpo_helpers.errors import UserError
from dpo_helpers.judge.scores import (
    check_before,
    measure_before,
    preference_loss,
    score_answers,
    summarize_by,
    summarize_scores,
)

ROW = {
    "policy_chosen": -10.0,
    "policy_rejected": -30.0,
    "reference_chosen": -12.0,
    "reference_rejected": -20.0,
}


def test_one_dpo_loss_worked_out_by_hand():
    # margin = 0.1 * ((-10 + 12) - (-30 + 20)) = 1.2 and -log sigmoid(1.2) = log(1 + e^-1.2) = 0.26328...
    summary = summarize_scores([ROW], beta=0.1)
    assert summary["margin"] == pytest.approx(1.2)
    assert summary["loss"] == pytest.approx(0.2632824, abs=1e-6)
    assert (summary["accuracy"], summary["chosen_log_prob_change"], summary["rejected_log_prob_change"]) == (
        1.0,
        2.0,
        -10.0,
    )


def test_without_beta_the_loss_is_ln_2_and_a_tie_counts_as_wrong():
    summary = summarize_scores([ROW], beta=0.0)
    assert summary["loss"] == pytest.approx(math.log(2)) and summary["accuracy"] == 0.0


def test_the_loss_does_not_overflow():
    assert preference_loss(-1000.0) == 1000.0 and preference_loss(1000.0) == 0.0


def test_exchanging_the_answers_turns_the_margin_around():
    swapped = {
        "policy_chosen": -30.0,
        "policy_rejected": -10.0,
        "reference_chosen": -20.0,
        "reference_rejected": -12.0,
    }
    both = summarize_scores([ROW, swapped], beta=0.1)
    assert both["margin"] == pytest.approx(0.0) and both["accuracy"] == 0.5


def test_rows_are_summarized_by_the_value_of_a_column():
    rows = [{"field": "AI"}, {"field": "プログラミング"}, {"field": "AI"}]
    table = summarize_by("field", rows, [ROW, ROW, ROW], beta=0.1)
    assert [(line["field"], line["rows"]) for line in table] == [("AI", 2), ("プログラミング", 1)]


def test_log_probs_equal_those_of_a_plain_loop(tiny_models):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_models["gpt2"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["gpt2"])
    pairs = [
        ("質問: 変数とは何ですか？\n回答:\n", "値に名前を付けます。"),
        ("質問: A\n回答:\n", "とても長い答えを書きます。大切です。"),
    ]
    for (prompt, answer), score in zip(
        pairs, score_answers(model, tokenizer, pairs, max_length=128, batch_size=2), strict=True
    ):
        ids = tokenizer(prompt)["input_ids"]
        expected = 0.0
        for token in [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]:
            expected += model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token].item()
            ids = [*ids, token]
        assert score == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_out_of_memory_in_any_batch_changes_no_log_prob(tiny_models, monkeypatch, capsys, number):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_models["gpt2"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["gpt2"])
    pairs = [("質問: A\n回答:\n", "長い" * count) for count in range(1, 6)]
    expected, forward, calls = score_answers(model, tokenizer, pairs, 128), model.forward, []

    def fail_once(*arguments, **options):
        calls.append(None)
        if len(calls) == number + 1:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return forward(*arguments, **options)

    monkeypatch.setattr(model, "forward", fail_once)
    assert score_answers(model, tokenizer, pairs, 128, batch_size=2) == pytest.approx(expected, abs=1e-3)
    assert len(calls) == number + 1 + len(pairs)
    assert "評価で一度に計算する数を 1 に減らして続けます" in capsys.readouterr().out


def test_a_leaked_adapter_stops_the_comparison(small_peft_model):
    import torch

    model, tokenizer = small_peft_model
    rows = [{"prompt": f"質問: {name}\n回答:\n", "chosen": "答えです。"} for name in "あいうえ"]
    before = measure_before(model, tokenizer, rows, 64)
    assert set(before) == {"base", "reference"} and len(before["base"]) == 4
    check_before(model, tokenizer, rows, before, 64)
    with torch.no_grad():  # what a forgotten merge does: the base's own weights hold the adapter
        layer = model.get_base_model().transformer.h[0].attn.c_attn.base_layer
        layer.weight.mul_(5.0)
    with pytest.raises(UserError, match=r"ベースモデルの対数確率.*前後の比較を止めました"):
        check_before(model, tokenizer, rows, before, 64)


def test_a_leak_that_is_not_a_number_stops_it_too(small_peft_model):
    model, tokenizer = small_peft_model
    rows = [{"prompt": "質問: あ\n回答:\n", "chosen": "答えです。"}]
    before = measure_before(model, tokenizer, rows, 64)
    with pytest.raises(UserError, match="ずれています"):
        check_before(model, tokenizer, rows, before | {"reference": [math.nan]}, 64)


@pytest.fixture
def small_peft_model(tiny_models):
    """The tiny GPT-2 with a random adapter on it, and its tokenizer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_models["gpt2"])
    model = get_peft_model(
        base, LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=True, init_lora_weights=False)
    )
    return model.eval(), AutoTokenizer.from_pretrained(tiny_models["gpt2"])
