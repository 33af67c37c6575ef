import pytest

from dpo_helpers.config import RunConfig
from dpo_helpers.judge.baselines import (
    compare_base_log_probs,
    compare_lengths,
    describe_baselines,
    measure_baselines,
    share_right,
    shuffle_labels,
)

ROWS = [
    {
        "prompt": "質問: 変数とは何ですか？\n回答:\n",
        "chosen": "値に名前を付けます。",
        "rejected": "知りません。",
    },
    {
        "prompt": "質問: 定数とは何ですか？\n回答:\n",
        "chosen": "変えない値です。",
        "rejected": "変数は、値に名前を付けて扱う仕組みです。",
    },
    {"prompt": "質問: 継承とは何ですか？\n回答:\n", "chosen": "継承です。", "rejected": "変数です。"},
]


def score(margin: float) -> dict:
    """Scores of one row whose margin is `margin` at beta = 1."""
    return {
        "policy_chosen": margin,
        "policy_rejected": 0.0,
        "reference_chosen": 0.0,
        "reference_rejected": 0.0,
    }


@pytest.fixture(scope="module")
def small_peft_model(tiny_models):
    """A tiny model with an adapter that changes its answers, and its tokenizer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_models["llama"])
    settings = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, settings), AutoTokenizer.from_pretrained(tiny_models["llama"])


def score_by_a_plain_loop(folder, tokenizer, prompt: str, answer: str) -> list[float]:
    """log p of each token of the answer and of EOS, one call of the base model for each, no adapter
    anywhere near.
    """
    import torch
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids, log_probs = tokenizer(prompt)["input_ids"], []
    for token in [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]:
        with torch.no_grad():
            log_probs.append(base(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token].item())
        ids = [*ids, token]
    return log_probs


def test_a_tie_counts_as_half():
    assert share_right([2.0, -0.1, 0.0, 0.0]) == 0.5  # (1 + 0 + 0.5 + 0.5) / 4
    assert share_right([3.0]) == 1.0 and share_right([-3.0]) == 0.0 and share_right([0.0]) == 0.5


def test_lengths_are_compared_in_characters():
    assert compare_lengths(ROWS) == [10 - 6, 8 - 20, 5 - 5]


def test_base_log_probs_equal_those_of_the_base_alone_in_a_plain_loop(small_peft_model, tiny_models):
    model, tokenizer = small_peft_model
    found = compare_base_log_probs(model, tokenizer, ROWS, max_length=128)
    for i, row in enumerate(ROWS):
        chosen, rejected = (
            score_by_a_plain_loop(tiny_models["llama"], tokenizer, row["prompt"], row[side])
            for side in ("chosen", "rejected")
        )
        assert found["base_log_prob_sum"][i] == pytest.approx(sum(chosen) - sum(rejected), abs=1e-3)
        assert found["base_log_prob_mean"][i] == pytest.approx(
            sum(chosen) / len(chosen) - sum(rejected) / len(rejected), abs=1e-4
        )


def test_a_prompt_that_fills_the_limit_is_a_tie(small_peft_model):
    model, tokenizer = small_peft_model
    assert compare_base_log_probs(model, tokenizer, ROWS[:1], max_length=4) == {
        "base_log_prob_sum": [0.0],
        "base_log_prob_mean": [0.0],
    }


def test_shuffled_labels_turn_about_half_of_the_margins_around_and_keep_their_size():
    margins = shuffle_labels([score(2.0)] * 1000, beta=0.5, seed=42)
    assert {abs(margin) for margin in margins} == {1.0} and 0.45 < share_right(margins) < 0.55
    assert margins == shuffle_labels([score(2.0)] * 1000, beta=0.5, seed=42)
    assert margins != shuffle_labels([score(2.0)] * 1000, beta=0.5, seed=43)


def test_shuffled_labels_by_hand():
    import random

    draw = random.Random("7/labels")
    signs = [1 if draw.random() < 0.5 else -1 for _ in range(4)]
    assert shuffle_labels([score(m) for m in (1.0, -2.0, 0.0, 4.0)], beta=1.0, seed=7) == [
        signs[0] * 1.0,
        signs[1] * -2.0,
        0.0,
        signs[3] * 4.0,
    ]


def test_each_baseline_is_an_accuracy_and_the_model_is_left_as_it_was(small_peft_model, tiny_models):
    model, tokenizer = small_peft_model
    model.train()
    scores, config = [score(1.0), score(1.0), score(0.0)], RunConfig(seed=3, beta=0.1, max_length=128)
    found = measure_baselines(model, tokenizer, ROWS, scores, config)
    assert list(found) == ["longer", "shorter", "base_log_prob_sum", "base_log_prob_mean", "shuffled_labels"]
    assert (found["longer"], found["shorter"]) == (
        0.5,
        0.5,
    )  # longer, shorter, as long: (1 + 0 + 0.5) / 3, and the other way round
    right = {"sum": 0, "mean": 0}
    for row in ROWS:
        chosen, rejected = (
            score_by_a_plain_loop(tiny_models["llama"], tokenizer, row["prompt"], row[side])
            for side in ("chosen", "rejected")
        )
        right["sum"] += sum(chosen) > sum(rejected)
        right["mean"] += sum(chosen) / len(chosen) > sum(rejected) / len(rejected)
    assert (found["base_log_prob_sum"], found["base_log_prob_mean"]) == (right["sum"] / 3, right["mean"] / 3)
    assert found["shuffled_labels"] == share_right(shuffle_labels(scores, beta=0.1, seed=3)) and found[
        "shuffled_labels"
    ] in (1 / 6, 0.5, 5 / 6)
    assert model.training and model.active_adapters == ["default"]


def test_the_table_begins_with_the_model_itself():
    names = ["longer", "shorter", "base_log_prob_sum", "base_log_prob_mean", "shuffled_labels"]
    table = describe_baselines(dict(zip(names, (0.25, 0.75, 0.6, 0.5, 0.485), strict=True)), accuracy=0.965)
    assert [row["正解率"] for row in table] == ["96.5%", "25.0%", "75.0%", "60.0%", "50.0%", "48.5%"]
    assert table[0]["見分け方"] == "学習したモデル（DPO の後）" and all(
        list(row) == ["見分け方", "正解率", "見方"] for row in table
    )
