from dpo_helpers.judge.baselines import share_right
from tools.data_report import compare_characters, share_by_kind
from tools.show_answers import count_checks, make_table


def make_rows(pairs: list[tuple[str, str]], kind: str = "vague") -> list[dict]:
    return [{"chosen": chosen, "rejected": rejected, "rejection_kind": kind} for chosen, rejected in pairs]


def test_a_character_that_only_chosen_answers_have_gives_them_away():
    train = make_rows([("あい★", "うえお"), ("うえ★", "あいう"), ("おあ★", "えうい")])
    held_out = make_rows([("かき★く", "けこ"), ("さ★", "しすせそ")])
    assert share_right(compare_characters(train, held_out)) == 1.0
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in held_out]
    assert share_right(compare_characters(train, swapped)) == 0.0


def test_the_same_characters_in_another_order_are_a_tie():
    train = make_rows([("あい★", "うえお"), ("うえ★", "あいう")])
    assert compare_characters(train, make_rows([("あいう★", "★ういあ"), ("えお", "おえ")])) == [0.0, 0.0]


def test_shares_are_told_in_all_and_by_kind():
    rows = make_rows([("あ", "い")] * 2) + make_rows([("あ", "い")] * 2, kind="rude")
    assert share_by_kind(rows, {"正解率": [1, 1, 0, -1]}) == [
        {"悪さの種類": "全体", "行数": 4, "正解率": "62.5%"},
        {"悪さの種類": "あいまい", "行数": 2, "正解率": "100.0%"},
        {"悪さの種類": "失礼", "行数": 2, "正解率": "25.0%"},
    ]


def test_a_table_shows_marks_and_line_breaks_as_they_are():
    assert make_table([{"質問": "A*探索とは？", "数": 3}, {"質問": "a|b\nlru_cache", "数": 4}]) == (
        "| 質問 | 数 |\n| --- | --- |\n| A\\*探索とは？ | 3 |\n| a\\|b⏎lru\\_cache | 4 |"
    )


def test_answers_are_counted_by_stage():
    answers = [
        {
            "質問": "変数とは？",
            "①": "変数変数変数変数変数変数",
            "③": "変数は、値の名前です。",
            "お手本": "変数です。",
        },
        {"質問": "定数とは？", "①": "値です。", "③": "定数は、変えない値です。", "お手本": "定数です。"},
    ]
    assert count_checks(answers, [{"concept": "変数"}, {"concept": "定数"}]) == [
        {"段階": "①", "「。」で終わる": "1 / 2", "概念の名前を正しく書く": "1 / 2", "乱れがない": "1 / 2"},
        {"段階": "③", "「。」で終わる": "2 / 2", "概念の名前を正しく書く": "2 / 2", "乱れがない": "2 / 2"},
    ]
