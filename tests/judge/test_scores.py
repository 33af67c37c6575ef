import math

import pytest

from dpo_helpers.judge.answers import check_answer
from dpo_helpers.judge.scores import preference_loss, score_answers, summarize_by, summarize_scores

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


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("変数は、値の名前です。", (True, True, True)),
        ("変数は、値の名前", (False, True, True)),
        ("定数は、値です。", (True, False, True)),
        ("変数です。変数です。変数です。", (True, True, False)),
        ("変数\ufffdです。", (True, True, False)),
        ("", (False, False, False)),
    ],
)
def test_an_answer_is_checked_for_its_end_the_name_and_loops(answer, expected):
    assert tuple(check_answer(answer, "変数").values()) == expected
