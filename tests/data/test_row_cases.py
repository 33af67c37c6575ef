"""Rows as people bring them: every shape of public sets and office exports, with the exact rows or words."""

import gzip
import json

import openpyxl
import pandas
import pytest

from dpo_helpers.data.own_rows import RowErrors, check_rows, load_preferences
from dpo_helpers.errors import UserError

Q, YES, NO = "りんごの旬はいつですか？", "秋です。", "知りません。"
PLAIN = {"prompt": f"質問: {Q}\n回答:\n", "chosen": YES, "rejected": NO}


def user(text, role="user", name="role", content="content"):
    return {name: role, content: text}


def gpt(text):
    return user(text, "gpt", "from", "value")


HUMAN = user(Q, "human", "from", "value")
ASK, GOOD, BAD = user(Q), user(YES, "assistant"), user(NO, "assistant")
TALK = f"\n\nHuman: こんにちは\n\nAssistant: はい、何でしょう。\n\nHuman: {Q}\n\nAssistant: "
EARLIER = "質問: こんにちは\n回答:\nはい、何でしょう。\n質問: " + Q + "\n回答:\n"
SYSTEM = "質問: 短く答えます。\n\n" + Q + "\n回答:\n"
# name: (record, the prompt it becomes, what is said beside the unused columns)
SHAPES = {
    "transcripts": ({"chosen": TALK + YES, "rejected": TALK + NO}, EARLIER, "会話の全文から"),
    "ChatML transcripts": (
        {
            side: f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>\n"
            for side, text in (("chosen", YES), ("rejected", NO))
        },
        PLAIN["prompt"],
        "会話の全文から",
    ),
    "answers that repeat the prompt": (
        {"prompt": Q, "chosen": f"{Q}\n{YES}", "rejected": f"{Q}\n{NO}"},
        PLAIN["prompt"],
        "prompt と同じ文を除きました",
    ),
    "a prompt that ends in the assistant's mark": (
        {"prompt": f"Human: {Q}\nAssistant:", "chosen": f"Human: {Q}\nAssistant: {YES}"}
        | {"rejected": f"Human: {Q}\nAssistant: {NO}"},
        f"質問: Human: {Q}\nAssistant:\n回答:\n",
        "prompt と同じ文を除きました",
    ),
    "messages with the prompt": (
        {"prompt": Q, "chosen": [ASK, GOOD], "rejected": [ASK, BAD], "messages": [ASK, GOOD]},
        PLAIN["prompt"],
        "messages",
    ),
    "messages without a prompt": ({"prompt": None, "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, None, ""),
    "the chosen conversation once more": (
        {"messages": [ASK, GOOD], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        None,
        "",
    ),
    "a system column": (
        {"system": "短く答えます。", "question": Q, "chosen": YES, "rejected": NO},
        SYSTEM,
        "system",
    ),
    "a system message": (
        {"prompt": [user("短く答えます。", "system"), ASK], "chosen": [GOOD], "rejected": [BAD]},
        SYSTEM,
        "",
    ),
    "an empty system": ({"system": "", "question": Q, "chosen": YES, "rejected": NO}, None, ""),
    "instruction and input": (
        {"instruction": "一文で。", "input": Q, "chosen": YES, "rejected": NO},
        f"質問: 一文で。\n{Q}\n回答:\n",
        "input",
    ),
    "an empty input": ({"instruction": Q, "input": "", "chosen": YES, "rejected": NO}, None, ""),
    "ShareGPT with single messages": (
        {"conversations": [HUMAN], "chosen": gpt(YES), "rejected": gpt(NO)},
        None,
        "",
    ),
    "ShareGPT with lists": (
        {"conversations": [HUMAN], "chosen": [gpt(YES)], "rejected": [gpt(NO)]},
        None,
        "",
    ),
    "conversations beside texts": (
        {
            "conversations": [user("こんにちは", "human", "from", "value"), gpt("はい、何でしょう。"), HUMAN],
            "chosen": YES,
            "rejected": NO,
        },
        EARLIER,
        "",
    ),
    "output: [good, bad]": ({"instruction": Q, "input": "", "output": [YES, NO]}, None, "output のリスト"),
    "a ranked list": ({"prompt": Q, "output": [YES, "たぶん秋。", NO]}, None, "output のリスト"),
    "answers with scores": (
        {"prompt": Q, "responses": [NO, YES, "たぶん秋。"], "scores": [1, 9, 5]},
        None,
        "responses のリスト",
    ),
    "answers with ranks": ({"prompt": Q, "answers": [NO, YES], "rank": [2, 1]}, None, "answers のリスト"),
    "answers as objects with scores": (
        {
            "instruction": Q,
            "completions": [{"response": NO, "overall_score": 1}, {"response": YES, "overall_score": 8}],
        },
        None,
        "completions のリスト",
    ),
    "roles of Open Assistant": (
        {"chosen": [user(Q, "prompter"), GOOD], "rejected": [user(Q, "prompter"), BAD]},
        None,
        "",
    ),
    "roles of Gemini": (
        {
            "chosen": [user(Q, "user", "role", "text"), user(YES, "model", "role", "text")],
            "rejected": [user(Q, "user", "role", "text"), user(NO, "model", "role", "text")],
        },
        None,
        "",
    ),
    "Japanese roles": (
        {
            "chosen": [user(Q, "ユーザー"), user(YES, "アシスタント")],
            "rejected": [user(Q, "ユーザー"), user(NO, "アシスタント")],
        },
        None,
        "",
    ),
    "an A and B with a choice of its name": (
        {"質問文": Q, "回答A": NO, "回答B": YES, "どちらの回答が良いですか？": "回答B"},
        None,
        "回答A と 回答B",
    ),
    "two answers and left or right": (
        {"prompt": Q, "answer1": YES, "answer2": NO, "id": 1, "pw": "left", "annotator": 2},
        None,
        "answer1 と answer2",
    ),
    "a choice that repeats the answer": ({"質問": Q, "A": NO, "B": YES, "選択": YES}, None, "A と B"),
    "a choice in words": (
        {"質問": Q, "回答１": YES, "回答２": NO, "評価": "1のほうが良い"},
        None,
        "回答１ と 回答２",
    ),
    "a choice beside a third answer": (
        {"prompt": Q, "answer": "10月", "answer_a": YES, "answer_b": NO, "winner": "A"},
        None,
        "answer_a と answer_b",
    ),
    "output as text": ({"prompt": Q, "output": json.dumps([YES, NO])}, None, "output のリスト"),
    "responses counted from 0": (
        {"prompt": Q, "response_0": NO, "response_1": YES, "better_response_id": 1},
        None,
        "response_0 と response_1",
    ),
    "an arena": (
        {"conversation_a": [ASK, BAD], "conversation_b": [ASK, GOOD], "winner": "model_b", "turn": 1},
        None,
        "conversation_a と conversation_b",
    ),
    "a Label Studio task": (
        {
            "id": 0,
            "data": {"prompt": Q, "answer1": NO, "answer2": YES},
            "annotations": [{"result": [{"type": "pairwise", "value": {"selected": "right"}}]}],
        },
        None,
        "answer1 と answer2",
    ),
    "history in pairs": (
        {"instruction": Q, "history": [["こんにちは", "はい、何でしょう。"]], "chosen": YES, "rejected": NO},
        EARLIER,
        "history",
    ),
    "names of Argilla": ({"instruction": Q, "chosen_response": YES, "rejected_response": NO}, None, ""),
    "names of MedicalGPT": (
        {"system": "", "history": [], "question": Q, "response_chosen": YES, "response_rejected": NO},
        None,
        "",
    ),
    "names of distilabel": (
        {
            "system": "短く答えます。",
            "input": Q,
            "chosen": YES,
            "rejected": NO,
            "generations": [YES, NO],
            "rating": [9, 3],
        },
        SYSTEM,
        "generations、rating",
    ),
    "OpenAI's preference format": (
        {
            "input": {"messages": [ASK], "tools": []},
            "preferred_output": [GOOD],
            "non_preferred_output": [BAD],
        },
        None,
        "",
    ),
    "text parts": (
        {
            key: [user([{"type": "text", "text": text}], role)]
            for key, text, role in (
                ("prompt", Q, "user"),
                ("chosen", YES, "assistant"),
                ("rejected", NO, "assistant"),
            )
        },
        None,
        "",
    ),
    "messages written as JSON": (
        {"prompt": Q, "chosen": json.dumps([ASK, GOOD]), "rejected": json.dumps([ASK, BAD])},
        None,
        "文字になっていたメッセージ",
    ),
    "messages written as Python": (
        {"prompt": Q, "chosen": str([GOOD]), "rejected": str([BAD])},
        None,
        "文字になって",
    ),
    "messages written by NumPy": (
        {"chosen": f"[{ASK}\n {GOOD}]", "rejected": f"[{ASK}\n {BAD}]"},
        None,
        "文字になって",
    ),
    "a template in the prompt": (
        {"prompt": f"<|im_start|>user\n{Q}<|im_end|>\n", "chosen": YES, "rejected": NO},
        f"質問: <|im_start|>user\n{Q}<|im_end|>\n回答:\n",
        "テンプレートの記号",
    ),
}


@pytest.mark.parametrize(("record", "prompt", "said"), SHAPES.values(), ids=SHAPES)
def test_each_shape_becomes_its_pair_and_what_was_changed_is_said(record, prompt, said, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    checked = check_rows(tmp_path / "rows.jsonl")
    assert checked.rows == [{**PLAIN, "prompt": prompt or PLAIN["prompt"]}] and checked.problems == []
    assert "（2 行）" not in "".join(
        checked.notes
    )  # a row is counted once, whatever is changed on both sides
    assert said in "\n".join(checked.notes) and (said or not any("行）" in note for note in checked.notes))


@pytest.mark.parametrize("name", [name for name in SHAPES if "NumPy" not in name])
def test_each_shape_survives_parquet_and_a_saved_data_set(name, tmp_path):
    import datasets

    record, prompt, _ = SHAPES[name]
    data = datasets.Dataset.from_list([record])
    data.to_parquet(tmp_path / "rows.parquet")
    data.save_to_disk(tmp_path / "saved")
    for source in ("rows.parquet", "saved"):
        assert load_preferences(tmp_path / source) == [{**PLAIN, "prompt": prompt or PLAIN["prompt"]}]


NO_PAIRS = {
    "one answer and a label": (
        {"prompt": Q, "completion": YES, "label": True},
        "missing",
        ["chosen、rejected の列がありません", "回答が一つと印（completion と label）", "ペアが要ります"],
    ),
    "a choice without its answers": (
        {"prompt": Q, "choice": "A"},
        "missing",
        ["どちらが良いか（choice）だけ", "回答の文がない"],
    ),
    "two answers without a choice": (
        {"prompt": Q, "回答A": YES, "回答B": NO},
        "missing",
        ["回答A と 回答B のどちらが良いか"],
    ),
    "a tie": (
        {"prompt": Q, "回答A": YES, "回答B": NO, "選択": "同じ"},
        "no_choice",
        ["どちらの回答が良いか", "同じ"],
    ),
    "a task without an answer": (
        {"data": {"prompt": Q, "answer1": NO, "answer2": YES}, "annotations": []},
        "no_choice",
        ["決まりません（空）"],
    ),
    "one answer alone": (
        {"prompt": Q, "response": YES},
        "missing",
        ["chosen、rejected の列がありません", "response"],
    ),
    "a system that is no text": (
        {"system": [1], "prompt": Q, "chosen": YES, "rejected": NO},
        "not_text",
        ["system が文字列ではありません（list）"],
    ),
    "annotators who disagree": (
        {
            "data": {"prompt": Q, "answer1": NO, "answer2": YES},
            "annotations": [{"result": [{"value": {"selected": side}}]} for side in ("left", "right")],
        },
        "no_choice",
        ["left、right"],
    ),
    "answers without an order": (
        {"prompt": Q, "responses": [YES, NO]},
        "no_choice",
        ["responses", "scores か rank"],
    ),
    "an unknown role": (
        {"chosen": [user(Q, "narrator"), GOOD], "rejected": [user(Q, "narrator"), BAD]},
        "conversation",
        ["narrator", "user、assistant、system のどれか"],
    ),
    "a picture": (
        {"prompt": [user([{"type": "image"}])], "chosen": [GOOD], "rejected": [BAD]},
        "not_text",
        ["文でないもの（image）"],
    ),
    "transcripts that part too early": (
        {"chosen": TALK + YES + "\n\nHuman: 本当？\n\nAssistant: はい。", "rejected": TALK + NO},
        "conversation",
        ["最後の返答一つだけではありません"],
    ),
    "a broken list as text": (
        {"prompt": Q, "chosen": "[{'role': 'assistant', 'content': 'あ'", "rejected": NO},
        "conversation",
        ["メッセージのリスト"],
    ),
    "mojibake": ({"prompt": Q, "chosen": "縺ゅ＞縺", "rejected": NO}, "garbled", ["文字化け"]),
    "a lost letter": ({"prompt": Q, "chosen": "秋\ufffdす", "rejected": NO}, "garbled", ["文字化け"]),
    "a NUL": ({"prompt": Q, "chosen": "秋\0です", "rejected": NO}, "not_text", ["NUL"]),
    "a very long text": (
        {"prompt": Q, "chosen": "あ" * 140_000, "rejected": NO},
        "too_long",
        ["140,000 文字"],
    ),
    "names that nothing is known of": (
        {"q1": Q, "a1x": YES, "a2x": NO},
        "missing",
        [
            "prompt、chosen、rejected の列がありません",
            "ある列：q1、a1x、a2x",
            "--column q1=prompt",
            '"a1x": "chosen"',
        ],
    ),
    "ANSI in a name": ({"\x1b[31mp": Q, "chosen": YES, "rejected": NO}, "missing", ["\\x1b[31mp"]),
}


@pytest.mark.parametrize(("record", "reason", "words"), NO_PAIRS.values(), ids=NO_PAIRS)
def test_what_cannot_become_a_pair_is_told_how(record, reason, words, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    [(position, found, text)] = check_rows(tmp_path / "rows.jsonl").problems
    assert (position, found) == (1, reason) and "\x1b" not in text
    assert [word for word in words if word not in text] == []


def test_an_answer_that_only_begins_like_its_question_is_left_alone(tmp_path):
    record = {"prompt": "りんご", "chosen": "りんごは秋です。", "rejected": "りんごは知りません。"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(record), encoding="utf-8")
    assert load_preferences(tmp_path / "rows.jsonl") == [{**record, "prompt": "質問: りんご\n回答:\n"}]


# --- containers ---

ROW = {"prompt": Q, "chosen": YES, "rejected": NO}
OTHER = {**ROW, "prompt": "みかんは？"}
BOTH = [PLAIN, {**PLAIN, "prompt": "質問: みかんは？\n回答:\n"}]
DOCUMENTS = {
    "a list": ([ROW, OTHER], ""),
    "rows under data": ({"version": 1, "data": [ROW, OTHER]}, "data の中"),
    "rows of the Hub's viewer": (
        {"features": [{"name": "a"}], "rows": [{"row": ROW}, {"row": OTHER}]},
        "rows の中",
    ),
    "columns of pandas": ({key: {"0": ROW[key], "1": OTHER[key]} for key in ROW}, "列ごと"),
    "columns as lists": ({key: [ROW[key], OTHER[key]] for key in ROW}, "列ごと"),
    "columns with numbers": ({**{key: [ROW[key], OTHER[key]] for key in ROW}, "score": [1, 2]}, "列ごと"),
    "two splits": ({"test": [ROW], "train": [ROW, OTHER]}, "読まないもの：test"),
    "columns and data": (
        {"columns": list(ROW), "data": [list(ROW.values()), list(OTHER.values())]},
        "列ごと",
    ),
}


@pytest.mark.parametrize(("document", "said"), DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_rows_are_found_in_a_json_document(document, said, name, tmp_path):
    (tmp_path / name).write_text(json.dumps(document, indent=1), encoding="utf-8")
    checked = check_rows(tmp_path / name)
    assert checked.rows == BOTH and said in "".join(checked.notes)


@pytest.mark.parametrize(
    "name", ["messages without a prompt", "ShareGPT with single messages", "transcripts"]
)
def test_one_record_alone_is_a_row_and_no_table_of_columns(name, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(SHAPES[name][0]), encoding="utf-8")
    assert load_preferences(tmp_path / "rows.json")[0]["chosen"] == YES


HOSTILE = {
    "spaces where a list may begin": "[" + " " * 99_990,
    "line ends between braces": "[{'role':" + "}" + "\n" * 99_980,
    "many beginnings of a speaker's mark": "Human \n" * 14_000,
    "nested brackets": "[{'role': " + "[" * 5_000,
    "minus signs": "[{'role': " + "-" * 90_000 + "1}]",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_text_costs_no_time(text, tmp_path):
    import time

    records = [{"prompt": Q, "chosen": text, "rejected": NO}, {"chosen": text, "rejected": text + "b"}]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records), encoding="utf-8"
    )
    start = time.perf_counter()
    checked = check_rows(tmp_path / "rows.jsonl")
    assert len(checked.rows) + len(checked.problems) == 2 and time.perf_counter() - start < 2


def test_objects_over_several_lines_are_read_with_the_line_of_each(tmp_path):
    text = "\n".join(json.dumps(row, indent=2) for row in (ROW, {**OTHER, "chosen": ""}))
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    checked = check_rows(tmp_path / "rows.jsonl")
    assert checked.rows == [PLAIN] and [tuple(p) for p in checked.problems] == [
        (6, "empty", "chosen が空です")
    ]


def test_packed_lines_are_read_and_a_bomb_is_not(tmp_path):
    text = "".join(json.dumps(row) + "\n" for row in (ROW, OTHER))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert load_preferences(tmp_path / "rows.jsonl.gz") == BOTH
    (tmp_path / "bomb.csv.gz").write_bytes(gzip.compress(b"a" * 30_000_000))
    with pytest.raises(UserError, match="MiB を超えます"):
        check_rows(tmp_path / "bomb.csv.gz")


@pytest.mark.parametrize("is_dictionary", [False, True])
def test_a_small_parquet_file_of_one_huge_text_is_refused(is_dictionary, tmp_path):
    import pyarrow
    from pyarrow import parquet

    texts = pyarrow.DictionaryArray.from_arrays([0] * 100, ["a" * 300_000])
    columns = {
        "prompt": ["a"] * 100,
        "chosen": texts if is_dictionary else texts.cast("string"),
        "rejected": ["b"] * 100,
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "bomb.parquet")
    assert (tmp_path / "bomb.parquet").stat().st_size < 100_000
    with pytest.raises(UserError, match="MiB を超えます"):
        check_rows(tmp_path / "bomb.parquet")


def test_a_spreadsheet_that_unpacks_to_a_thousand_times_its_size_is_refused(tmp_path):
    import zipfile

    write_book(tmp_path / "bomb.xlsx", {"一": [HEADER, [Q, YES, NO]]})
    with zipfile.ZipFile(tmp_path / "bomb.xlsx", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/more.xml", b" " * 30_000_000)
    with pytest.raises(UserError, match="MiB を超えます"):
        check_rows(tmp_path / "bomb.xlsx")


NOT_ROWS = {
    "pointer.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "page.csv": (b"\n<!DOCTYPE html>\n<html></html>", "Web ページ"),
    "rows.zip": (b"PK\x03\x04", "ZIP"),
    "rows.csv": (b"PK\x03\x04 a book", "拡張子を .xlsx"),
    "old.xls": (b"\xd0\xcf\x11\xe0\xa1\xb1", "古い形式の Excel"),
    "packed.jsonl": (gzip.compress(b"{}"), "gzip"),
    "rows.pdf": (b"%PDF-1.7", "PDF"),
    "deep.json": (b"[" * 100_000, "読み取れません"),
}


@pytest.mark.parametrize("name", NOT_ROWS)
def test_what_holds_no_rows_is_named(name, tmp_path):
    content, words = NOT_ROWS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as raised:
        check_rows(tmp_path / name)
    assert not isinstance(raised.value, RowErrors)


def test_a_deep_row_is_one_bad_row(tmp_path):
    deep = '{"prompt": ' + "[" * 150 + "]" * 150 + "}"
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(ROW)}\n{deep}\n", encoding="utf-8")
    checked = check_rows(tmp_path / "rows.jsonl")
    assert checked.rows == [PLAIN] and checked.problems[0].message == "入れ子が 100 段より深いので読めません"


def test_a_folder_that_is_no_data_set_names_the_files_in_it(tmp_path):
    (tmp_path / "rows.csv").write_text("a")
    with pytest.raises(UserError, match=r"フォルダ.*rows\.csv"):
        check_rows(tmp_path)


def test_the_split_of_a_saved_data_set_is_chosen_behind_a_colon(tmp_path):
    from datasets import Dataset, DatasetDict

    DatasetDict({"test": Dataset.from_list([ROW, OTHER])}).save_to_disk(tmp_path / "saved")
    assert load_preferences(f"{tmp_path / 'saved'}:test") == BOTH
    with pytest.raises(UserError, match="train という split はありません（test）"):
        load_preferences(tmp_path / "saved")


# --- spreadsheets ---


def write_book(path, sheets: dict[str, list], merged=()):
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, lines in sheets.items():
        sheet = book.create_sheet(name)
        for cells in lines:
            sheet.append(cells)
        for cells in merged:
            sheet.merge_cells(cells)
    book.save(path)
    return path


HEADER = ["質問", "良い回答", "悪い回答"]


def test_the_sheet_and_the_row_of_the_header_are_found_and_told(tmp_path):
    lines = [
        ["2025年度 評価シート"],
        [],
        ["No.", *HEADER, "備考"],
        [1, Q, YES, NO],
        [2, "みかんは？", YES, NO],
    ]
    file = write_book(tmp_path / "rows.xlsx", {"説明": [["使い方"], ["2 枚目に書く"]], "評価": lines})
    checked = check_rows(file)
    assert checked.rows == BOTH
    assert checked.notes[0].startswith("シート「評価」を読みました（読まないシート：説明）。")
    assert checked.notes[1:] == ["3 行目を見出しとして読みました。", "使わない列：No.、備考"]


def test_a_sheet_is_chosen_behind_a_colon(tmp_path):
    file = write_book(
        tmp_path / "rows.xlsx", {"一": [HEADER, [Q, YES, NO]], "二": [HEADER, ["みかんは？", YES, NO]]}
    )
    assert load_preferences(f"{file}:二") == BOTH[1:] and load_preferences(file) == BOTH[:1]
    with pytest.raises(UserError, match="シート「三」がありません。あるシート：一、二"):
        load_preferences(f"{file}:三")


def test_numbers_dates_and_truth_are_text_and_counted(tmp_path):
    lines = [
        HEADER,
        ["1+2は？", 3.0, 0.5],
        ["今日は？", pandas.Timestamp("2025-04-01").to_pydatetime(), True],
    ]
    checked = check_rows(write_book(tmp_path / "rows.xlsx", {"一": lines}))
    assert [(row["chosen"], row["rejected"]) for row in checked.rows] == [
        ("3", "0.5"),
        ("2025-04-01", "True"),
    ]
    assert checked.notes == ["数値や日付のセルを文字として読みました。（2 行）"]


def test_a_note_beside_the_table_is_told_and_no_error(tmp_path):
    lines = [HEADER, [Q, YES, NO], ["みかんは？", YES, NO, None, "要確認"]]
    checked = check_rows(write_book(tmp_path / "rows.xlsx", {"一": lines}))
    assert checked.rows == BOTH and checked.notes == ["使わない列：5列目"]


def test_merged_cells_hold_their_value_in_every_row(tmp_path):
    lines = [HEADER, [Q, YES, NO], [None, "10月です。", NO], ["みかんは？", YES, NO]]
    checked = check_rows(write_book(tmp_path / "rows.xlsx", {"一": lines}, ["A2:A3"]))
    assert [row["prompt"] for row in checked.rows] == [PLAIN["prompt"], PLAIN["prompt"], BOTH[1]["prompt"]]
    assert checked.notes == ["セルの結合を解いて、1 個のセルに同じ値を入れました。"]


def test_a_far_cell_is_refused_in_a_sentence(tmp_path):
    book = openpyxl.Workbook()
    book.active.append(HEADER)
    book.active["XFD1048576"] = "x"
    book.save(tmp_path / "far.xlsx")
    with pytest.raises(UserError, match="1048576 行、16384 列まで使われています"):
        check_rows(tmp_path / "far.xlsx")


def test_the_delimiter_and_a_title_row_of_a_csv_are_told(tmp_path):
    (tmp_path / "rows.csv").write_text(
        f"評価の表\n質問;良い回答;悪い回答\n{Q};{YES};{NO}\n", encoding="utf-8"
    )
    checked = check_rows(tmp_path / "rows.csv")
    assert checked.rows == [PLAIN]
    assert checked.notes == ["列の区切りは ; とみて読みました。", "2 行目を見出しとして読みました。"]


def test_a_csv_row_has_the_line_of_a_text_editor(tmp_path):
    text = f'質問,良い回答,悪い回答\r\n"一\n二\n三",{YES},{NO}\r\nみかんは？,同じ,同じ\r\n'
    (tmp_path / "rows.csv").write_bytes(text.encode())
    assert check_rows(tmp_path / "rows.csv").problems[0].position == 5


# --- encodings ---

TEXT = "質問,良い回答,悪い回答\nりんごの旬はいつですか？,①秋です。㈱髙島屋～,ｼﾘﾏｾﾝ\n"
PLAIN_TEXT = "質問,良い回答,悪い回答\nりんごの旬はいつですか？,秋です。,知りません。\n"


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        *(
            (encoding, TEXT)
            for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")
        ),
        ("cp932", TEXT.replace("～", "")),
        *((encoding, PLAIN_TEXT) for encoding in ("cp932", "euc_jp", "iso2022_jp")),
        ("euc_jis_2004", PLAIN_TEXT.replace("秋", "①秋")),
        ("iso2022_jp_ext", PLAIN_TEXT.replace("秋", "ｱｷ")),
    ],
)
@pytest.mark.parametrize("times", [1, 200])
def test_each_japanese_encoding_is_told_apart(encoding, text, times, tmp_path):
    head, line = text.splitlines()
    lines = [head, *(f"{i}{line}" for i in range(times))]
    (tmp_path / "rows.csv").write_bytes("\n".join(lines).encode(encoding))
    checked = check_rows(tmp_path / "rows.csv")
    assert [row["chosen"] for row in checked.rows] == [line.split(",")[1]] * times
    assert ("文字コード" in "".join(checked.notes)) == (not encoding.startswith("utf-8"))


@pytest.mark.parametrize("encoding", ["gbk", "big5", "euc_kr", "latin-1", "koi8-r"])
def test_text_of_another_language_is_refused_and_not_read_as_japanese(encoding, tmp_path):
    words = {
        "gbk": "问题,答案,坏答案\n苹果什么时候成熟？,秋天成熟的时候最好吃。,我不知道这个问题。\n",
        "big5": "問題,答案,壞答案\n蘋果什麼時候成熟？,秋天成熟的時候最好吃。,我不知道這個問題。\n",
        "euc_kr": "질문,좋은 답,나쁜 답\n사과는 언제 익나요?,가을에 익습니다.,모르겠습니다.\n",
        "latin-1": "prompt,chosen,rejected\nÀ quelle saison?,À l'été déjà,Désolé\n",
        "koi8-r": "вопрос,хороший,плохой\nКогда созревают яблоки?,Осенью.,Не знаю.\n",
    }
    (tmp_path / "rows.csv").write_bytes((words[encoding] * 5).encode(encoding))
    with pytest.raises(UserError, match="文字コードが分かりません"):
        check_rows(tmp_path / "rows.csv")


def test_line_separators_inside_a_text_survive_writing_and_reading(tmp_path):
    from dpo_helpers.files import write_rows

    row = {**PLAIN, "chosen": "一行目\u2028二行目\u0085三行目"}
    write_rows(tmp_path / "rows.jsonl", [row])
    pandas.DataFrame([row]).to_csv(tmp_path / "rows.csv", index=False)
    for name in ("rows.jsonl", "rows.csv"):
        assert load_preferences(tmp_path / name) == [row]


# --- mapping and the user's own columns ---


def test_one_mapping_reads_both_ways_and_names_a_group(tmp_path):
    record = {"文": Q, "よし": YES, "だめ": NO, "患者": "甲"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(record), encoding="utf-8")
    written = {"文": "prompt", "よし": "chosen", "だめ": "rejected", "患者": "group"}
    for columns in (written, {role: name for name, role in written.items()}):
        assert load_preferences(tmp_path / "rows.jsonl", columns) == [{**PLAIN, "group": "甲"}]
    with pytest.raises(UserError, match="列の対応 文=x が分かりません"):
        load_preferences(tmp_path / "rows.jsonl", {"文": "x"})
    with pytest.raises(RowErrors, match="ぶん の列がありません"):
        load_preferences(tmp_path / "rows.jsonl", written | {"ぶん": "system"})


def test_a_users_own_columns_of_our_names_are_not_ours(tmp_path, rows):
    record = {**ROW, "field": "話題1", "concept": "x", "question_form": "y", "rejection_kind": "z"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(record), encoding="utf-8")
    checked = check_rows(tmp_path / "rows.jsonl")
    assert checked.rows == [PLAIN]
    assert checked.notes == ["使わない列：field、concept、question_form、rejection_kind"]
    mixed = [rows[0], record]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mixed), encoding="utf-8")
    assert [set(row) for row in load_preferences(tmp_path / "rows.jsonl")] == [
        {"prompt", "chosen", "rejected"}
    ] * 2
