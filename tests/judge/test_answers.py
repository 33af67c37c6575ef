import pytest

from dpo_helpers.config import RunConfig
from dpo_helpers.judge.answers import (
    accuracy_interval,
    compare_generation,
    has_loop,
    measure_answers,
    measure_distinct,
    measure_japanese,
    measure_reference_distance,
)


def chrf(answer: str, reference: str) -> float:
    return measure_answers([answer], [reference])["chrf"]


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),  # (0.8 + 0.19207) / 1.38415 ± 1.95996 * sqrt(0.016 + 0.0096036) / 1.38415
        (0, 10, 0.0, 0.2775),  # z² / (10 + z²) = 3.84146 / 13.84146
        (10, 10, 0.7225, 1.0),
        (5, 5, 0.5655, 1.0),  # 5 / 8.84146
        (50, 100, 0.4038, 0.5962),
    ],
)
def test_wilsons_interval_on_known_numbers(successes, count, low, high):
    assert accuracy_interval(successes, count) == pytest.approx((low, high), abs=5e-5)


def test_chrf_of_a_pair_worked_out_by_hand():
    # characters 2/3, pairs 1/2 (です), triples 0/1, longer ones do not exist: (2/3 + 1/2 + 0) / 3 = 7/18,
    # precision and recall alike
    assert chrf("犬です", "猫です") == pytest.approx(100 * 7 / 18)


def test_chrf_weighs_recall_four_times_as_much_as_precision():
    # precision (1 + 1) / 2, recall (2/3 + 1/2) / 2 = 7/12, no triple on one side: F2 = 5 * 7/12 / (4 * 1 +
    # 7/12) = 7/11
    assert chrf("です", "猫です") == pytest.approx(100 * 7 / 11)
    assert chrf("猫です", "です") == pytest.approx(
        100 * 7 / 8
    )  # the other way round: 5 * 7/12 / (4 * 7/12 + 1)


def test_chrf_counts_over_all_answers_and_does_not_average_them():
    # characters (3 + 0) / (3 + 1), pairs 2 / 2, triples 1 / 1: (3/4 + 1 + 1) / 3
    assert measure_answers(["猫です", "x"], ["猫です", "y"])["chrf"] == pytest.approx(
        100 * (0.75 + 1 + 1) / 3
    )


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("変数です。変数です。変数です。", True),
        ("変数です。変数です。", False),  # 変数です stands twice
        ("ああああああ", True),  # ああああ begins at 1, 2 and 3
        ("あああああ", False),  # at 1 and 2
        ("", False),
        ("値に名前を付けて、あとから使えるようにします。", False),
    ],
)
def test_four_characters_that_stand_three_times_are_a_loop(answer, expected):
    assert has_loop(answer) is expected


def test_distinct_2_counts_pairs_of_characters_over_all_answers():
    assert measure_distinct(["あいうえ"]) == 1.0
    assert measure_distinct(["ああああ"]) == pytest.approx(1 / 3)
    assert measure_distinct(["あいう", "あい"]) == pytest.approx(
        2 / 3
    )  # あい, いう, あい; no pair across two answers
    assert measure_distinct(["あ", ""]) == 0.0


def test_the_share_in_japanese_is_of_letters_alone():
    assert measure_japanese(["AIは犬"]) == 0.5
    assert measure_japanese(["データ 3.14、人々！"]) == 1.0
    assert measure_japanese(["Good."]) == measure_japanese(["한국"]) == measure_japanese(["123"]) == 0.0


def test_answers_that_end_and_those_that_were_cut():
    answers = ["値です。", "値です", "本当？", "値です。", ""]
    measured = measure_answers(answers, ["値です。"] * 5, cut=[False, False, False, True, False])
    assert measured["ends"] == 2 / 5 and measured["answers"] == 5
    assert measured["mean_length"] == (4 + 3 + 3 + 4 + 0) / 5 and measured["repetition"] == 0.0


# --- on a tiny model ---

ROWS = [
    {
        "prompt": "質問: 変数とは何ですか？\n回答:\n",
        "chosen": "変数は、値に名前を付ける仕組みです。",
        "rejected": "知りません。",
    },
    {
        "prompt": "質問: 定数とは何ですか？\n回答:\n",
        "chosen": "定数は、あとから変えない値です。",
        "rejected": "変数です。",
    },
    {
        "prompt": "質問: 継承とは何ですか？\n回答:\n",
        "chosen": "継承は、元のクラスを受け継ぐ仕組みです。",
        "rejected": "さあ。",
    },
]
CONFIG = RunConfig(max_length=96)


def make_peft_model(folder, changes_answers: bool):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(1)
    settings = LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=not changes_answers
    )
    return get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), settings
    ), AutoTokenizer.from_pretrained(folder)


def test_base_and_policy_answer_the_same_questions(tiny_models):
    from dpo_helpers.model.answer import generate_response

    model, tokenizer = make_peft_model(tiny_models["llama"], changes_answers=True)
    measures, answers = compare_generation(model, tokenizer, ROWS, CONFIG, count=2)
    assert list(measures) == ["before", "after", "chosen"] and [
        part["answers"] for part in measures.values()
    ] == [2, 2, 2]
    assert measures["chosen"]["chrf"] == 100.0 and measures["chosen"]["ends"] == 1.0
    for line in answers:
        assert line["chosen"] == next(row["chosen"] for row in ROWS if row["prompt"] == line["prompt"])
        whole = generate_response(model, tokenizer, line["prompt"], max_new_tokens=200)
        assert line["after"] and whole.startswith(line["after"])
        with model.disable_adapter():
            assert generate_response(model, tokenizer, line["prompt"], max_new_tokens=200).startswith(
                line["before"]
            )
    assert [line["before"] for line in answers] != [line["after"] for line in answers]


def test_an_adapter_that_changes_nothing_answers_as_the_base_and_is_at_distance_zero(tiny_models):
    model, tokenizer = make_peft_model(tiny_models["gpt2"], changes_answers=False)
    model.train()
    measures, answers = compare_generation(model, tokenizer, ROWS, CONFIG)
    assert len(answers) == 3 and measures["before"] == measures["after"]
    pairs = [(line["prompt"], line["after"]) for line in answers]
    assert measure_reference_distance(model, tokenizer, pairs, CONFIG.max_length) == pytest.approx(
        0.0, abs=1e-6
    )
    assert model.training


def test_the_distance_equals_that_of_a_plain_loop_over_the_tokens(tiny_models):
    import torch

    model, tokenizer = make_peft_model(tiny_models["llama"], changes_answers=True)
    model.eval()
    pairs = [(ROWS[0]["prompt"], "値です。"), (ROWS[1]["prompt"], "定数は、あとから変えない値です。")]

    def log_probs(prompt, answer):
        ids, found = tokenizer(prompt)["input_ids"], []
        for token in [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]:
            with torch.no_grad():
                found.append(model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token].item())
            ids = [*ids, token]
        return found

    policy = [log_probs(*pair) for pair in pairs]
    with model.disable_adapter():
        reference = [log_probs(*pair) for pair in pairs]
    means = [(sum(p) - sum(r)) / len(p) for p, r in zip(policy, reference, strict=True)]
    distance = measure_reference_distance(model, tokenizer, pairs, max_length=128)
    assert distance == pytest.approx(sum(means) / 2, abs=1e-4) and abs(distance) > 0.01
