"""What an answer counts as, worked out by hand on small sets of rows."""

import pytest

from dpo_helpers.judge.answers import (
    check_answers,
    find_nearest,
    has_loop,
    measure_japanese,
    paired_difference,
    share_interval,
    summarize_checks,
    take_out,
)

FACTS = {  # (concept, question): chosen answer
    ("変数", "変数とは何ですか？"): "変数は、値に付ける名前です。",
    ("変数", "変数の例を教えてください。"): "変数の例は、合計点を入れるtotalです。",
    ("定数", "定数とは何ですか？"): "定数は、実行中に変えない値です。",
    ("定数", "定数の例を教えてください。"): "定数の例は、円周率を表すPIです。",
}
ROWS = [
    {"prompt": f"質問: {question}\n回答:\n", "chosen": chosen, "concept": concept, "rejection_kind": kind,
     "rejected": f"{concept}は、いろいろあって奥が深いものです。" if kind == "vague" else chosen[:6]}
    for ((concept, question), chosen), kind in zip(FACTS.items(), ["vague", "unfinished", "vague", "unfinished"], strict=True)
]  # fmt: skip


def check(answer: str) -> dict:
    (found,) = check_answers([answer], ROWS[:1], ROWS)
    return found


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("変数は、値に付けておく名前のことです。", True),  # its own fact in other words
        ("変数の例は、合計点を入れるtotalです。", False),  # true of it, but of another form
        ("変数は、実行中に変えない値です。", False),  # another concept's fact under this name
        ("変数とは何ですか？", False),  # the question repeated
        ("変数", False),  # nothing is left without the name
        ("", False),
    ],
)
def test_right_is_the_own_fact_and_nothing_else(answer, right):
    assert check(answer)["right"] is right


def test_a_tie_of_two_different_candidates_is_no_answer():
    assert find_nearest("あいう", ["あいうえ", "えあいう"]) is None
    assert find_nearest("あいう", ["あいう", "あいう"]) == "あいう"


def test_two_rows_with_the_same_answer_are_both_right():
    twin = ROWS[0] | {"prompt": "質問: 変数について教えてください。\n回答:\n"}
    (found,) = check_answers([ROWS[0]["chosen"]], [twin], [*ROWS, twin])
    assert found["right"]


def test_what_the_question_gives_away_is_taken_out():
    assert take_out("変数の例は、変数xです。", "変数の例を教えてください。", "変数") == "の例は、xです。"
    assert take_out("教えてくださいと言われました", "例を教えてください。", "例") == "と言われました"
    assert (
        take_out("ください", "例をくださらない", "例") == "い"
    )  # a run of exactly three characters goes, two stay


def test_the_other_measures_of_one_answer():
    found = check("変数は、いろいろあって奥が深いものです。")
    assert found["manners"] and found["names"] and found["ends"] and not found["loops"]
    good = check("変数は、値に付ける名前です。")
    assert not good["manners"] and good["japanese"] == 1.0
    assert not check("値に付ける名前")["names"] and not check("値に付ける名前")["ends"]


def test_bad_manners_of_own_rows_is_nearer_to_the_rejected_answer():
    row = {
        "prompt": "質問: 犬は好きですか？\n回答:\n",
        "chosen": "はい、毎日一緒に散歩します。",
        "rejected": "さあ、知りませんね。",
    }
    answers = ["ええ、一緒に散歩します。", "さあ、知りません。"]
    checks = check_answers(answers, [row, row], [row])
    assert [found["manners"] for found in checks] == [False, True] and all(found["names"] for found in checks)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("ああああ", False),
        ("ああああああ", True),
        ("犬と猫と犬と猫と犬と猫と", True),
        ("犬と猫と鳥と馬", False),
        ("", False),
    ],
)
def test_four_characters_that_stand_three_times_are_a_loop(answer, expected):
    assert has_loop(answer) is expected


def test_the_share_in_japanese_is_of_letters_alone():
    assert measure_japanese("AIは賢い。12") == pytest.approx(3 / 5)
    assert measure_japanese("123。") == 0.0


def test_the_summary_counts_shares_with_intervals():
    base = {"names": True, "ends": True, "loops": False, "japanese": 1.0}
    checks = [base | {"right": i < 6, "manners": i < 1} for i in range(8)]
    summary = summarize_checks(checks)
    assert (summary["questions"], summary["right"], summary["manners"]) == (8, 0.75, 0.125)
    assert summary["interval"]["right"] == pytest.approx([0.4093, 0.9285], abs=1e-4)  # Wilson 1927, 6 of 8


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_wilsons_interval_on_known_numbers(successes, count, low, high):
    assert tuple(share_interval(successes, count)) == pytest.approx((low, high), abs=1e-4)


def test_a_paired_interval_worked_out_by_hand():
    # 20 questions: 8 became right, 2 became wrong, 10 stayed. Half a question to each of the four cells: n =
    # 22,
    # up = 8.5, down = 2.5, middle = 6 / 22 = 0.27273,
    # half = 1.95996 * sqrt(11 - 36 / 22) / 22 = 1.95996 * 3.06007 / 22 = 0.27262
    before = [False] * 8 + [True] * 2 + [True] * 10
    after = [True] * 8 + [False] * 2 + [True] * 10
    mean, (low, high) = paired_difference(before, after)
    assert mean == pytest.approx(0.3) and (low, high) == pytest.approx((0.00011, 0.54535), abs=1e-4)
    worse, (down, up) = paired_difference(after, before)
    assert worse == pytest.approx(-0.3) and (down, up) == pytest.approx((-high, -low))


def test_where_nothing_changed_the_interval_still_has_a_width():
    mean, (low, high) = paired_difference([True, False] * 10, [True, False] * 10)
    assert mean == 0 and low == -high and 0.05 < high < 0.15
