"""The question box and the blind vote, driven through their widgets' Python API, with a model that answers
as a table says.
"""

import json
import math
import random
from contextlib import contextmanager

import pytest

from dpo_helpers.data.own_rows import load_preferences
from dpo_helpers.data.prompt import make_prompt
from dpo_helpers.errors import UserError
from dpo_helpers.judge import ask_vote
from dpo_helpers.judge.ask_vote import ask_box, vote_box
from dpo_helpers.judge.votes import (
    append_line,
    describe_votes,
    order_roles,
    read_votes,
    record_vote,
    win_rate,
)
from dpo_helpers.model import answer as inference

pytestmark = pytest.mark.versions  # ipywidgets 7.7 of Colab, and today's

QUESTIONS = [
    "AIとは何ですか？",
    "過学習とは何ですか？",
    "変数とは何ですか？",
    "回帰とは何ですか？",
    "木構造とは何ですか？",
]


class FakeModel:
    """Switches stages like a PeftModel; without a warm-up it has no adapter `ref`."""

    def __init__(self, warmed_up: bool = True):
        self.peft_config = {"default": None} | ({"ref": None} if warmed_up else {})
        self.role = "policy"

    @contextmanager
    def disable_adapter(self):
        self.role = "base"
        yield
        self.role = "policy"

    def set_adapter(self, name: str):
        self.role = {"ref": "reference", "default": "policy"}[name]


@pytest.fixture
def asked(monkeypatch):
    """What the model was asked, as (stage, questions); it answers 「質問 stage」."""
    calls = []

    def generate(model, tokenizer, questions):
        calls.append((model.role, questions))
        return [f"{question}に{model.role}が答えます。" for question in questions]

    monkeypatch.setattr(inference, "generate_response", generate)
    monkeypatch.setattr(ask_vote, "SHORTEST_LOOK_SECONDS", 0)
    return calls


def parts_of_vote(box):
    shown, choices, said, result = box.children
    return shown, choices.children, said, result


def type_and_enter(text, value: str) -> None:
    """What the browser sends when Enter is pressed in a box without continuous updates."""
    text.set_state({"value": value})


def test_enter_shows_every_stage_side_by_side(asked):
    box = ask_box(FakeModel(), None)
    (text, _), (status, shown) = box.children[0].children, box.children[1:]
    type_and_enter(text, "質問: <b>AIとは</b>何ですか？")
    assert [stage for stage, _ in asked] == ["base", "reference", "policy"]
    for heading in ("① ベースモデル", "② 教師あり学習の後", "③ DPO の後"):
        assert heading in shown.value
    assert (
        "&lt;b&gt;AIとは&lt;/b&gt;何ですか？にpolicyが答えます。" in shown.value
        and "<b>AIとは" not in shown.value
    )
    assert status.value == "質問：&lt;b&gt;AIとは&lt;/b&gt;何ですか？"


def test_without_a_warm_up_only_the_base_and_the_policy_answer(asked):
    box = ask_box(FakeModel(warmed_up=False), None)
    type_and_enter(box.children[0].children[0], "AIとは何ですか？")
    assert asked == [("base", ["AIとは何ですか？"]), ("policy", ["AIとは何ですか？"])]


def test_leaving_the_box_for_the_button_asks_once(asked):
    box = ask_box(FakeModel(), None, roles=("policy",))
    text, button = box.children[0].children
    type_and_enter(text, "AIとは何ですか？")
    button.click()
    assert len(asked) == 1


@pytest.mark.parametrize("empty", ["", "  　", "質問: "])
def test_an_empty_question_gets_a_hint_and_no_answer(asked, empty):
    box = ask_box(FakeModel(), None)
    box.children[0].children[0].value = empty
    box.children[0].children[1].click()
    assert "質問が空です" in box.children[1].value and not asked


def test_the_box_is_busy_while_the_model_answers_and_shows_an_error_as_a_line(monkeypatch):
    box = ask_box(FakeModel(), None)
    seen = []

    def fail(*_):
        seen.append(box.children[1].value)
        raise RuntimeError("device lost")

    monkeypatch.setattr(inference, "generate_response", fail)
    type_and_enter(box.children[0].children[0], "AIとは何ですか？")
    assert seen == ["回答を作っています…"]
    assert box.children[1].value.startswith("⚠️ 回答を作れませんでした（RuntimeError: device lost）")
    box.children[0].children[1].click()
    assert len(seen) == 2, "the same question can be asked again after an error"


def test_a_vote_writes_one_row_that_is_training_data_and_reveals_who_was_who(asked, tmp_path):
    path = tmp_path / "votes.jsonl"
    box = vote_box(FakeModel(), None, QUESTIONS[:2], path, seed=0)
    shown, (a, _, _, _), said, result = parts_of_vote(box)
    assert "reference" in shown.value and "教師あり" not in shown.value and "DPO" not in shown.value
    first, second = order_roles(QUESTIONS[0], ["reference", "policy"], seed=0)
    assert shown.value.index(f"に{first}が") < shown.value.index(f"に{second}が")

    a.click()

    (line,) = path.read_text(encoding="utf-8").splitlines()
    vote = json.loads(line)
    assert vote.pop("time") and vote == {
        "prompt": make_prompt(QUESTIONS[0]),
        "chosen": f"{QUESTIONS[0]}に{first}が答えます。",
        "rejected": f"{QUESTIONS[0]}に{second}が答えます。",
        "winner": first,
        "loser": second,
    }
    assert f"A は「{ask_vote.ANSWER_ROLES[first]}」、B は「{ask_vote.ANSWER_ROLES[second]}」" in said.value
    assert QUESTIONS[1] in shown.value and QUESTIONS[0] not in shown.value
    assert f"{int(first == 'policy')} 勝 {int(second == 'policy')} 敗" in result.value
    assert list(load_preferences(path)) == [{key: vote[key] for key in ("prompt", "chosen", "rejected")}]


def test_votes_for_b_and_ties_are_told_apart(asked, tmp_path):
    path = tmp_path / "votes.jsonl"
    box = vote_box(
        FakeModel(), None, [{"prompt": make_prompt(question)} for question in QUESTIONS], path, seed=0
    )
    shown, (a, b, tie, _), _, result = parts_of_vote(box)
    for button in (a, b, tie, b, tie):
        button.click()
    votes = read_votes(path)
    assert [vote["prompt"] for vote in votes] == [make_prompt(QUESTIONS[i]) for i in (0, 1, 3, 2, 4)]
    for vote, choice in zip(votes[:3], (0, 1, 1), strict=True):
        question = next(question for question in QUESTIONS if make_prompt(question) == vote["prompt"])
        assert vote["winner"] == order_roles(question, ["reference", "policy"], seed=0)[choice]
    assert [vote["winner"] for vote in votes[3:]] == ["tie", "tie"] and "chosen" not in votes[3]
    assert len(load_preferences(path)) == 3
    assert "引き分け 2、学習に使える行 3" in result.value and "もうありません" in shown.value
    a.click()
    assert read_votes(path) == votes, "nothing is on show, so nothing can be voted"


def test_a_rerun_goes_on_after_the_votes_there_and_without_equal_answers(asked, tmp_path, monkeypatch):
    path = tmp_path / "votes.jsonl"
    box = vote_box(FakeModel(), None, QUESTIONS, path, seed=0)
    parts_of_vote(box)[1][0].click()
    parts_of_vote(box)[1][2].click()
    before = path.read_bytes()
    monkeypatch.setattr(
        inference,
        "generate_response",
        lambda model, _, questions: [
            "同じ回答です。" if question == QUESTIONS[2] else f"{question}に{model.role}が答えます。"
            for question in questions
        ],
    )
    again = vote_box(FakeModel(), None, QUESTIONS, path, seed=0)
    shown, (_, b, _, _), _, _ = parts_of_vote(again)
    assert QUESTIONS[3] in shown.value
    b.click()
    assert path.read_bytes().startswith(before) and len(load_preferences(path)) == 2


def test_one_key_votes_and_other_keys_do_not(asked, tmp_path):
    path = tmp_path / "votes.jsonl"
    box = vote_box(FakeModel(), None, QUESTIONS, path, seed=0)
    key = parts_of_vote(box)[1][3]
    for typed in ("x", "a", "Ｂ", "あ", "s"):
        type_and_enter(key, typed)
        assert key.value == ""
    winners = [vote["winner"] for vote in read_votes(path)]
    orders = [order_roles(question, ["reference", "policy"], seed=0) for question in QUESTIONS[:3]]
    assert winners == [orders[0][0], orders[1][1], orders[2][0], "tie"]


def test_a_click_made_before_the_answers_were_there_is_no_vote(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(ask_vote, "SHORTEST_LOOK_SECONDS", 60)
    box = vote_box(FakeModel(), None, QUESTIONS, tmp_path / "votes.jsonl", seed=0)
    parts_of_vote(box)[1][0].click()
    assert read_votes(tmp_path / "votes.jsonl") == []


def test_an_unwritable_file_is_told_and_the_question_stays(asked, tmp_path):
    path = tmp_path / "votes.jsonl"
    box = vote_box(FakeModel(warmed_up=False), None, QUESTIONS, path, seed=0)
    path.mkdir()
    shown, (a, _, _, _), said, _ = parts_of_vote(box)
    a.click()
    assert (
        said.value.startswith("⚠️ 投票を保存できませんでした（IsADirectoryError")
        and QUESTIONS[0] in shown.value
    )
    path.rmdir()
    a.click()
    assert len(load_preferences(path)) == 1


def test_an_error_of_the_model_shows_as_a_line_in_the_vote_too(monkeypatch, tmp_path):
    def fail(*_):
        raise UserError("メモリーが足りません。")

    monkeypatch.setattr(inference, "generate_response", fail)
    shown = vote_box(FakeModel(), None, QUESTIONS, tmp_path / "votes.jsonl", seed=0).children[0]
    assert shown.value.startswith("⚠️ 回答を作れませんでした（メモリーが足りません。）")


def test_a_vote_against_an_earlier_one_is_counted_but_kept_out_of_the_training_rows(tmp_path):
    path = tmp_path / "votes.jsonl"
    assert record_vote(path, "Q？", {"base": "古い", "policy": "中"}, "policy") == ""
    assert record_vote(path, "Q？", {"reference": "中", "policy": "新しい"}, "policy") == "swapped"
    assert record_vote(path, "Q？", {"base": "古い", "policy": "中"}, "policy") == "duplicate"
    assert record_vote(path, "R？", {"base": "", "policy": "何か"}, "policy") == "empty"
    assert record_vote(path, "R？", {"base": "中", "policy": "古い"}, "base") == ""
    assert [row["chosen"] for row in load_preferences(path)] == ["中", "中"]
    assert describe_votes(read_votes(path)).startswith("DPO の後の勝率 80%（4 勝 1 敗")


def test_whatever_is_voted_the_file_stays_training_data(tmp_path):
    path, draw = tmp_path / "votes.jsonl", random.Random(0)
    for _ in range(200):
        answers = dict(
            zip(
                ("base", "policy"), draw.sample(["", " ", "あ\u2028い", "う", "え", "お\nか"], 2), strict=True
            )
        )
        record_vote(path, draw.choice(QUESTIONS), answers, draw.choice(["base", "policy", None]))
    votes = read_votes(path)
    assert len(votes) == 200 and len(load_preferences(path)) == sum("chosen" in vote for vote in votes) > 10


def test_a_file_without_a_last_line_end_loses_nothing(tmp_path):
    path = tmp_path / "votes.jsonl"
    path.write_text('{"prompt": "Q", "chosen": "良い", "rejected": "悪い"}', encoding="utf-8")
    append_line(path, {"prompt": "R", "chosen": "良い", "rejected": "悪い"})
    assert [row["prompt"] for row in load_preferences(path)] == [make_prompt("Q"), make_prompt("R")]


def test_a_line_that_is_no_vote_is_named(tmp_path):
    path = tmp_path / "votes.jsonl"
    path.write_text(
        '{"prompt": "Q", "chosen": "良い", "rejected": "悪い"}\n{"prompt": "R", "cho', encoding="utf-8"
    )
    with pytest.raises(UserError, match="の 2 行目は投票として読めません"):
        read_votes(path)


def test_the_order_is_fair_and_the_same_again():
    stages = ["reference", "policy"]
    orders = [order_roles(f"質問{i}", stages, seed=1) for i in range(1000)]
    assert orders == [order_roles(f"質問{i}", stages, seed=1) for i in range(1000)]
    assert 450 < sum(order[0] == "policy" for order in orders) < 550
    assert orders != [order_roles(f"質問{i}", stages, seed=2) for i in range(1000)]


def test_the_win_rate_has_the_wilson_interval():
    assert win_rate(7, 2) == pytest.approx((7 / 9, 0.4526, 0.9368), abs=1e-4)  # worked by hand: z = 1.959964
    assert win_rate(0, 3)[:2] == (0, 0) and win_rate(0, 3)[2] == pytest.approx(0.5615, abs=1e-4)
    assert math.isnan(win_rate(0, 0)[0]) and win_rate(0, 0)[1:] == (0, 1)
    assert "まだありません" in describe_votes([])
