import hashlib
import json
import math
from collections import Counter

import pytest

from dpo_helpers.data.generate import REJECTION_KINDS, generate_preferences, split_rows
from dpo_helpers.data.prompt import make_prompt, strip_question
from dpo_helpers.data.tokens import encode_answers
from dpo_helpers.data.topics import FIELDS, load_topics
from dpo_helpers.errors import UserError


def test_there_are_150_concepts_with_one_fact_for_each_of_six_forms():
    topics = load_topics()
    assert len(topics["questions"]) == 6 and all(
        len(wordings) == 2 for wordings in topics["questions"].values()
    )
    facts = [fact for field in FIELDS for fact_list in topics["facts"][field].values() for fact in fact_list]
    assert [len(topics["facts"][field]) for field in FIELDS] == [50, 50, 50]
    assert len(facts) == len(set(facts)) == 900
    assert all(fact.startswith("{}") and fact.endswith("。") for fact in facts)


def test_the_same_seed_gives_the_same_rows_everywhere(rows):
    text = json.dumps(rows, ensure_ascii=False, sort_keys=True)
    assert (
        hashlib.sha256(text.encode()).hexdigest()
        == "2019ea059601183562d4e4cd10d3e97e97ce4595267ccf8efed7897f0d48c8ee"
    )
    assert generate_preferences(1000, seed=43) != rows


def test_no_row_and_no_prompt_stands_twice(rows):
    assert len({(row["prompt"], row["chosen"], row["rejected"]) for row in rows}) == 1000
    assert len({row["prompt"] for row in rows}) >= 600
    assert all(row["chosen"] != row["rejected"] for row in rows)


def test_fields_and_kinds_come_in_equal_shares(rows):
    assert all(
        abs(count / 1000 - 1 / 3) <= 0.02 / 3 for count in Counter(row["field"] for row in rows).values()
    )
    kinds = Counter(row["rejection_kind"] for row in rows)
    assert set(kinds) == set(REJECTION_KINDS)
    assert min(kinds.values()) >= 80 and min(kinds["wrong_concept"], kinds["off_topic"]) >= 100


@pytest.mark.parametrize("seed", [42, 1, 2026])
def test_length_tells_nothing(seed):
    rows = generate_preferences(1000, seed)
    for kind in (None, *REJECTION_KINDS):
        picked = [row for row in rows if kind in (None, row["rejection_kind"])]
        longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in picked) / len(picked)
        shorter = sum(len(row["chosen"]) < len(row["rejected"]) for row in picked) / len(picked)
        assert 0.45 <= longer <= 0.55 and 0.45 <= shorter <= 0.55, (kind, longer, shorter)


def test_at_least_20000_rows_are_to_be_had_and_all_of_them_differ():
    rows = generate_preferences(50_400, seed=42)
    assert len({(row["prompt"], row["rejected"]) for row in rows}) == 50_400


def test_asking_for_more_rows_than_there_are_says_how_many():
    with pytest.raises(UserError, match="50,400 行まで"):
        generate_preferences(50_401, seed=42)


@pytest.mark.parametrize("name", ["gpt2", "smollm2", "embedded"])
def test_every_row_fits_into_128_tokens_and_no_token_spans_prompt_and_answer(name, request, embedded_folder):
    from transformers import AutoTokenizer

    tokenizer = (
        AutoTokenizer.from_pretrained(embedded_folder)
        if name == "embedded"
        else request.getfixturevalue(f"{name}_tokenizer")
    )
    for row in generate_preferences(50_400, seed=42)[::7]:
        prompt_ids = tokenizer(row["prompt"])["input_ids"]
        for side in ("chosen", "rejected"):
            ((prompt, ids),) = encode_answers(tokenizer, [(row["prompt"], row[side])])
            assert len(ids) <= 128, row
            assert ids[: len(prompt)] == prompt_ids == prompt and ids[-1] == tokenizer.eos_token_id, row


@pytest.mark.parametrize("count", [30, 300, 1000])
@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_no_word_of_a_held_out_concept_is_trained_on(count, fraction):
    rows = generate_preferences(count, 42, fraction)
    training, held_out = split_rows(rows, fraction, 42)
    assert len(training) + len(held_out) == count and abs(len(held_out) / count - fraction) <= 0.05
    names = {row["concept"] for row in held_out}
    assert not names & {row["concept"] for row in training}
    known = {
        fact.format(name)
        for field in FIELDS
        for name, facts in load_topics()["facts"][field].items()
        if name in names
        for fact in facts
    }
    assert not known & {row[side] for row in training for side in ("chosen", "rejected")}


def test_the_split_keeps_the_fields_and_has_enough_rows_of_every_kind(rows):
    _, held_out = split_rows(rows, 0.2, 42)
    for field in FIELDS:
        share = sum(row["field"] == field for row in held_out) / sum(row["field"] == field for row in rows)
        assert abs(share - 0.2) < 0.01
    assert min(Counter(row["rejection_kind"] for row in held_out).values()) >= 15


def test_rows_without_concepts_are_split_by_prompt():
    rows = [{"prompt": f"q{i // 2}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(20)]
    training, held_out = split_rows(rows, 0.2, 0)
    assert len(held_out) == 4 and not {row["prompt"] for row in training} & {
        row["prompt"] for row in held_out
    }


def test_a_single_question_cannot_be_split():
    with pytest.raises(UserError, match="分けられません"):
        split_rows([{"prompt": "q", "chosen": "a", "rejected": "b"}] * 3, 0.2, 0)


@pytest.mark.parametrize(
    "question",
    [
        "AIとは何ですか？",
        "質問: AIとは何ですか？",
        " 質問：AIとは何ですか？\n",
        "質問: AIとは何ですか？\n回答:\n",
    ],
)
def test_a_question_gives_one_prompt_with_and_without_its_mark(question):
    assert make_prompt(question) == "質問: AIとは何ですか？\n回答:\n"
    assert strip_question(question) == "AIとは何ですか？"


def test_the_rejected_answers_are_not_told_by_single_characters_alone(rows):
    """A naive Bayes classifier on the answers' characters, without the prompt, cannot tell the two hard
    kinds apart.
    """
    training, held_out = split_rows(rows, 0.2, 42)
    counts = {side: Counter("".join(row[side] for row in training)) for side in ("chosen", "rejected")}
    totals = {side: sum(counter.values()) + 3000 for side, counter in counts.items()}

    def score(text):
        return sum(
            math.log((counts["chosen"][c] + 1) / totals["chosen"])
            - math.log((counts["rejected"][c] + 1) / totals["rejected"])
            for c in text
        )

    hard = [row for row in held_out if row["rejection_kind"] in ("wrong_concept", "off_topic")]
    accuracy = sum(score(row["chosen"]) > score(row["rejected"]) for row in hard) / len(hard)
    assert 0.3 <= accuracy <= 0.7
