"""The generated rows: what they promise of shares, lengths, tokens and the two kinds of unseen question."""

import json
import random
import subprocess
import sys
import time
from collections import Counter, defaultdict

import pytest

from dpo_helpers.data.generate import UNSEEN, divide_concepts, generate_preferences, split_rows
from dpo_helpers.data.prompt import SIDES, make_prompt, strip_question
from dpo_helpers.data.tokens import encode_answers
from dpo_helpers.data.topics import (
    FIELDS,
    KIND_SHARES,
    Fact,
    list_asked,
    list_forms,
    list_groups,
    list_wordings,
    load_topics,
    make_rejected,
    tell_fact,
)
from dpo_helpers.errors import UserError


@pytest.fixture(scope="module")
def parts(rows):
    training, held_out = split_rows(rows, 0.3, 42)
    return {"": training, **{kind: [row for row in held_out if row["unseen"] == kind] for kind in UNSEEN}}


def test_the_default_rows_are_1000_with_150_questions_of_each_unseen_kind(rows, parts):
    assert {name: len(part) for name, part in parts.items()} == {
        "": 700,
        "new_concept": 150,
        "new_wording": 150,
    }
    for kind in UNSEEN:
        assert len({row["prompt"] for row in parts[kind]}) == 150
    assert len({(row["prompt"], row["chosen"], row["rejected"]) for row in rows}) == 1000
    assert set(rows[0]) == {
        "prompt", "chosen", "rejected", "field", "concept", "question_form", "rejection_kind", "unseen",
    }  # fmt: skip


def test_a_new_concept_is_named_in_no_training_row_and_its_facts_are_nowhere(parts):
    held = {row["concept"] for row in parts["new_concept"]}
    assert len(held) == 30 and not held & {row["concept"] for row in parts[""] + parts["new_wording"]}
    facts = {tell_fact(Fact(row["field"], row["concept"], form)).replace(row["concept"], "")
             for row in parts["new_concept"] for form in list_forms()}  # fmt: skip
    for row in parts[""] + parts["new_wording"]:
        assert row["concept"] not in held
        assert not {row[side].replace(row["concept"], "") for side in SIDES} & facts


def test_a_new_wording_asks_for_a_trained_fact_in_words_that_were_not_trained(parts):
    trained = {(row["concept"], row["question_form"]) for row in parts[""]}
    prompts = {row["prompt"] for row in parts[""]}
    for row in parts["new_wording"]:
        assert (row["concept"], row["question_form"]) in trained and row["prompt"] not in prompts
    # the words themselves are no news: nearly all are trained with other facts
    words = {strip_question(row["prompt"]).replace(row["concept"], "") for row in parts[""]}
    asked = [strip_question(row["prompt"]).replace(row["concept"], "") for row in parts["new_wording"]]
    assert sum(question in words for question in asked) >= 0.95 * len(asked)


@pytest.mark.parametrize(
    ("count", "seed", "fraction"), [(30, 1, 0.3), (100, 42, 0.2), (1000, 7, 0.5), (300, 3, 0.1)]
)
def test_what_the_notebooks_ask_is_always_a_new_wording(count, seed, fraction):
    rows = {row["prompt"]: row for row in generate_preferences(count, seed, fraction)}
    for fact, question in list_asked()[: max(1, round(count * fraction / 2))]:
        row = rows[make_prompt(question)]
        assert row["unseen"] == "new_wording" and row["chosen"] == tell_fact(fact)
    trained, held = divide_concepts(seed, fraction)
    assert set(FIELDS) <= set(trained) and not set(trained) & set(held)
    assert list_asked()[0][1] == "AIとは何ですか？"


def test_the_kinds_have_their_shares_on_every_side(rows, parts):
    for part in (rows, *parts.values()):
        counts = Counter(row["rejection_kind"] for row in part)
        assert set(counts) == set(KIND_SHARES)
        assert all(abs(counts[kind] / len(part) - share) < 0.01 for kind, share in KIND_SHARES.items())
    assert (
        min(KIND_SHARES["wrong_fact"], KIND_SHARES["off_form"]) >= 0.2 and min(KIND_SHARES.values()) >= 0.08
    )


def test_chosen_answers_are_whole_sentences_of_25_to_60_characters_that_begin_with_the_name(rows):
    for row in rows:
        assert (
            25 <= len(row["chosen"]) <= 60
            and row["chosen"].endswith("。")
            and row["chosen"].startswith(row["concept"])
        )
        assert row["chosen"].count("。") <= 2


def test_rejected_answers_name_the_concept_and_end_as_the_chosen_ones_do(rows):
    for row in rows:
        assert row["concept"] in row["rejected"] and row["rejected"] != row["chosen"]
        assert row["rejected"].endswith("。") is (row["rejection_kind"] != "unfinished")


def test_half_of_the_rejected_answers_are_longer(rows):
    for kind in KIND_SHARES:
        pairs = [row for row in rows if row["rejection_kind"] == kind]
        longer = sum(len(row["rejected"]) > len(row["chosen"]) for row in pairs) / len(pairs)
        assert 0.38 <= longer <= 0.55, kind


def test_every_row_fits_in_128_tokens_of_dialogpt(gpt2_tokenizer, rows):
    for part in (rows, generate_preferences(20_000, 1)[::5]):
        for side in SIDES:
            encoded = encode_answers(gpt2_tokenizer, [(row["prompt"], row[side]) for row in part])
            assert max(len(ids) for _, ids in encoded) <= 128
            assert all(
                ids[: len(prompt)] == prompt for prompt, ids in encoded
            )  # no token spans prompt and answer


def test_a_wrong_fact_is_another_groups_sentence_and_off_form_answers_another_question():
    groups = list_groups()
    everyone = tuple(groups)
    sentences = {}
    for name, (field, group) in groups.items():
        for form in list_forms():
            sentences[tell_fact(Fact(field, name, form)).replace(name, "", 1)] = (name, group, form)
    near = [set(pair) for pair in load_topics()["near"]]
    for name in random.Random(0).sample(sorted(groups), 25):
        fact = Fact(groups[name][0], name, "caution")
        for text in make_rejected("wrong_fact", fact, everyone):
            other, group, form = sentences[text.replace(name, "", 1)]
            assert form == "caution" and group != groups[name][1] and {name, other} not in near
        for text in make_rejected("off_form", fact, everyone):
            assert (
                sentences[text.replace(name, "", 1)][0] == name
                and sentences[text.replace(name, "", 1)][2] != "caution"
            )


def test_every_fact_stands_alone_and_every_question_has_three_wordings():
    facts = defaultdict(list)
    for name, (field, _) in list_groups().items():
        for form in list_forms():
            fact = Fact(field, name, form)
            facts[tell_fact(fact).replace(name, "")].append(name)
            assert len(set(list_wordings(fact))) == 3 and all(name in words for words in list_wordings(fact))
    assert len(facts) == 153 * 6 and all(len(names) == 1 for names in facts.values())


def test_the_same_arguments_give_the_same_rows_in_another_process(rows):
    code = (
        "import json; from dpo_helpers.data.generate import generate_preferences as g; "
        "print(json.dumps(g(1000, 42)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": "."},
    )
    assert json.loads(done.stdout) == rows and generate_preferences(1000, 43) != rows


def test_a_thousand_rows_take_a_second():
    generate_preferences(30, 5)  # reads the topics
    start = time.process_time()
    generate_preferences(1000, 6)
    assert time.process_time() - start < 1.0


def test_more_rows_than_there_are_is_told():
    with pytest.raises(UserError, match=r"生成できる行が足りません.*NUM_SAMPLES を減らして"):
        generate_preferences(200_000, 1)
    assert len({(row["prompt"], row["rejected"]) for row in generate_preferences(20_000, 1)}) == 20_000


def test_rows_of_ones_own_are_split_by_prompt_or_by_their_group():
    rows = [
        {
            "prompt": f"質問: {i // 2}\n回答:\n",
            "chosen": "a",
            "rejected": "b",
            "field": "AI",
            "concept": "変数",
        }
        for i in range(40)
    ]
    training, held_out = split_rows(rows, 0.3, 1)
    assert (len(training), len(held_out)) == (28, 12)
    assert not {row["prompt"] for row in training} & {row["prompt"] for row in held_out}
    grouped = [row | {"group": str(i % 4)} for i, row in enumerate(rows)]
    training, held_out = split_rows(grouped, 0.3, 1)
    assert {row["group"] for row in held_out} & {row["group"] for row in training} == set() and len(
        held_out
    ) == 10
    with pytest.raises(UserError, match="違う質問の行を増やすか"):
        split_rows(rows[:2], 0.3, 1)


@pytest.mark.parametrize(
    "text", ["変数とは？", " 質問: 変数とは？ ", "質問：変数とは？", "質問: 変数とは？\n回答:\n"]
)
def test_the_template_takes_a_question_with_and_without_its_marks(text):
    assert strip_question(text) == "変数とは？" and make_prompt(text) == "質問: 変数とは？\n回答:\n"
