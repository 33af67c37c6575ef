import codecs
import json
import random
import string
from pathlib import Path

import pandas
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_helpers.data.own_rows import RowErrors, check_rows, count_problems, find_conflicts, load_preferences
from dpo_helpers.data.row_checks import match_columns
from dpo_helpers.errors import UserError

GOOD = {"prompt": "AIとは何ですか？", "chosen": "人工知能のことです。", "rejected": "わかりません。"}
EXPECTED = {**GOOD, "prompt": "質問: AIとは何ですか？\n回答:\n"}


def write_lines(path: Path, records, encoding="utf-8") -> Path:
    path.write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding=encoding
    )
    return path


def write_any(path: Path, records: list[dict], encoding="utf-8") -> Path:
    """Write records in the format of the file's name."""
    frame = pandas.DataFrame(records)
    if path.suffix == ".jsonl":
        return write_lines(path, records, encoding)
    if path.suffix == ".json":
        path.write_text(json.dumps(records, ensure_ascii=False), encoding=encoding)
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix == ".xlsx":
        frame.to_excel(path, index=False)
    else:
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",", encoding=encoding)
    return path


def problems_of(source, **arguments) -> list[tuple[int, str, str]]:
    with pytest.raises(RowErrors) as raised:
        load_preferences(source, **arguments)
    return [tuple(problem) for problem in raised.value.problems]


SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".xlsx")


@pytest.mark.parametrize("suffix", [suffix for suffix in SUFFIXES if suffix != ".ndjson"])
def test_generated_rows_come_back_unchanged_from_every_format(suffix, rows, tmp_path):
    checked = check_rows(write_any(tmp_path / f"rows{suffix}", rows[:200]))
    assert checked[:3] == (rows[:200], [], [])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp932"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl"])
def test_japanese_text_is_read_in_every_encoding(encoding, suffix, tmp_path):
    assert list(load_preferences(write_any(tmp_path / f"rows{suffix}", [GOOD], encoding))) == [EXPECTED]


@pytest.mark.parametrize(
    "names",
    [
        ("question", "good", "bad"),
        ("質問", "良い回答", "悪い回答"),
        (" Prompt", "CHOSEN", "Rejected "),
        ("ｐｒｏｍｐｔ", "Good Answer", "worse"),
    ],
)
def test_known_column_names_are_mapped(names, tmp_path):
    file = write_any(tmp_path / "rows.csv", [dict(zip(names, GOOD.values(), strict=True))])
    assert list(load_preferences(file)) == [EXPECTED]


def test_an_explicit_name_wins_and_our_own_name_wins_over_an_alias(tmp_path):
    file = write_any(
        tmp_path / "rows.csv",
        [{"a": GOOD["prompt"], "prompt": "x", "question": "y", "chosen": "c", "rejected": "r"}],
    )
    assert load_preferences(file)[0]["prompt"] == "質問: x\n回答:\n"
    assert load_preferences(file, {"prompt": "a"})[0]["prompt"] == EXPECTED["prompt"]


def test_two_columns_for_one_thing_are_a_question_to_the_user():
    _, trouble = match_columns(("question", "query", "chosen", "rejected"))
    assert trouble.startswith(
        "prompt にあたる列が 2 つあります（question、query）。ある列：question（prompt）、query、"
    )
    assert "--column query=prompt" in trouble


def test_missing_columns_are_told_once_with_what_each_is_taken_for_and_the_mapping(tmp_path):
    file = write_any(tmp_path / "rows.csv", [{"prompt": "a", "chosen": "b", "other": "c"}] * 30)
    told = "すべての行: rejected の列がありません。ある列：prompt（prompt）、chosen（chosen）、other。"
    with pytest.raises(RowErrors, match=told) as raised:
        load_preferences(file)
    assert len(raised.value.problems) == 30
    assert 'ターミナルでは --column other=rejected、ノートブックでは COLUMNS = {"other": "rejected"}' in str(
        raised.value
    )


WRONG = [
    ({"prompt": ""}, "empty", "prompt が空です"),
    ({"prompt": "質問:"}, "empty", "prompt に質問の文がありません"),
    ({"chosen": None}, "empty", "chosen が空です"),
    ({"chosen": float("nan")}, "empty", "chosen が空です"),
    ({"rejected": "　 \t"}, "blank", "rejected が空白だけです"),
    ({"chosen": 42}, "not_text", "chosen が文字列ではありません（42）"),
    ({"rejected": {"a": 1}}, "not_text", "rejected が文字列ではありません（dict）"),
    ({"rejected": "\ud83d"}, "not_text", "rejected に壊れた文字があります"),
    ({"chosen": "", "rejected": True}, "empty", "chosen が空です。rejected が文字列ではありません（True）"),
    ({"rejected": GOOD["chosen"] + " "}, "identical", "chosen と rejected が同じです"),
]


@pytest.mark.parametrize(("change", "reason", "message"), WRONG)
def test_each_kind_of_wrong_row_is_told_in_japanese(change, reason, message, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps({**GOOD, **change})}\n", encoding="utf-8")
    assert problems_of(file) == [(3, reason, message)]  # the empty second line counts, as in a text editor
    assert load_preferences(file, on_error="drop") == [EXPECTED]


def test_a_line_that_is_no_json_and_one_that_is_no_object_are_row_errors(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{json.dumps(GOOD)}\n{{"prompt": \n"text"\n{"[" * 100_000}\n', encoding="utf-8")
    assert [(position, reason) for position, reason, _ in problems_of(file)] == [
        (2, "unreadable"),
        (3, "unreadable"),
        (4, "unreadable"),
    ]


def test_a_repeated_and_a_reversed_row_name_the_row_before(tmp_path):
    reverse = {**GOOD, "chosen": GOOD["rejected"], "rejected": GOOD["chosen"]}
    records = [GOOD, {**GOOD, "prompt": "質問：AIとは何ですか？"}, reverse, {**reverse, "prompt": "別"}]
    swapped = "1行目と、同じ質問の chosen と rejected が入れ替わっているようです"
    assert problems_of(write_lines(tmp_path / "rows.jsonl", records)) == [
        (2, "duplicate", "1行目と同じ行です"),
        (3, "swapped", swapped),
    ]


def prefer(*pairs: str, prompt="p") -> list[tuple[int, dict]]:
    """Numbered rows; "ab" prefers a to b."""
    return [(i, {"prompt": prompt, "chosen": a, "rejected": b}) for i, (a, b) in enumerate(pairs, 1)]


def test_a_ranking_written_as_pairs_is_no_conflict_and_a_circle_is_one():
    assert find_conflicts(prefer("ab", "ac", "ad", "bc", "bd", "cd")) == []
    [problem] = find_conflicts(prefer("ab", "bc", "xy", "ca"))
    assert problem[:2] == (4, "swapped") and problem.message.startswith("1行目、2行目と合わせると")
    assert [problem.position for problem in find_conflicts(prefer("ca", "ab", "bc", "bd", "da"))] == [3, 5]
    assert find_conflicts(prefer("ab", "bc") + prefer("ca", prompt="another")) == []


def test_random_preferences_keep_an_order_and_lose_no_more_than_they_must():
    from graphlib import TopologicalSorter

    draw = random.Random(0)
    for _ in range(200):
        pairs = ["".join(draw.sample("abcdef", 2)) for _ in range(draw.randint(1, 20))]
        wrong = {problem.position for problem in find_conflicts(prefer(*pairs))}
        kept, graph = [pair for i, pair in enumerate(pairs, 1) if i not in wrong], {}
        for better, worse in kept:
            graph.setdefault(worse, set()).add(better)
        order = list(TopologicalSorter(graph).static_order())
        assert all(order.index(better) < order.index(worse) for better, worse in kept)
        assert len(set(kept)) == len(kept) and 1 not in wrong


def test_many_rows_of_one_prompt_are_compared_in_bearable_time():
    import time

    answers = [chr(0x4E00 + i) for i in range(450)]
    pairs = [a + b for i, a in enumerate(answers) for b in answers[i + 1 :]]
    random.Random(0).shuffle(pairs)
    start = time.perf_counter()
    assert len(pairs) > 100_000 and find_conflicts(prefer(*pairs)) == []
    assert time.perf_counter() - start < 10


def test_a_repetition_is_found_far_away(tmp_path):
    records = [{**GOOD, "prompt": f"質問その{i}"} for i in range(25_000)]
    checked = check_rows(write_lines(tmp_path / "rows.jsonl", [*records, records[3]]))
    assert len(checked.rows) == 25_000 and checked.rows[-1]["prompt"] == "質問: 質問その24999\n回答:\n"
    assert [tuple(problem) for problem in checked.problems] == [(25_001, "duplicate", "4行目と同じ行です")]


def test_a_table_counts_the_lines_of_a_text_editor_and_a_cell_may_hold_line_breaks(tmp_path):
    text = (
        'prompt,chosen,rejected\n"一つ目\nの質問",はい,いいえ\n\n二つ目,同じ,同じ\n'
        "三つ目,はい\n四つ目,a,b,c\nNA,null,NaN\n"
    )
    (tmp_path / "rows.csv").write_text(text, encoding="utf-8")
    (tmp_path / "rows.tsv").write_text(text.replace(",", "\t"), encoding="utf-8")
    for name in ("rows.csv", "rows.tsv"):
        assert problems_of(tmp_path / name) == [
            (5, "identical", "chosen と rejected が同じです"),
            (6, "empty", "rejected が空です"),
            (7, "unreadable", "見出しの 3 列より多くの列があります"),
        ]
        assert [row["chosen"] for row in load_preferences(tmp_path / name, on_error="drop")] == [
            "はい",
            "null",
        ]


def test_an_excel_sheet_may_begin_below_and_an_error_value_is_empty(tmp_path):
    frame = pandas.DataFrame(
        [list(GOOD), list(GOOD.values()), [None] * 3, ["NA", 42, "b"], ["q", "=1/0", "b"]]
    )
    frame.to_excel(tmp_path / "rows.xlsx", header=False, index=False, startrow=2)
    assert problems_of(tmp_path / "rows.xlsx") == [(7, "empty", "chosen が空です")]


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_json_and_parquet_count_elements(suffix, tmp_path):
    records = [GOOD, {**GOOD, "chosen": GOOD["rejected"]}]
    file = write_any(tmp_path / f"rows{suffix}", records)
    with pytest.raises(RowErrors, match="2件目: chosen と rejected が同じです"):
        load_preferences(file)


def test_json_lines_under_the_name_of_json_count_lines(tmp_path):
    file = write_lines(tmp_path / "rows.json", [GOOD, {**GOOD, "chosen": ""}])
    with pytest.raises(RowErrors, match="2行目: chosen が空です"):
        load_preferences(file)


def test_the_message_holds_the_first_20_rows_and_the_counts(tmp_path):
    records = (
        [GOOD]
        + [{**GOOD, "prompt": str(i), "chosen": ""} for i in range(15)]
        + [{**GOOD, "prompt": str(i), "rejected": " "} for i in range(15)]
    )
    with pytest.raises(RowErrors) as raised:
        load_preferences(write_lines(tmp_path / "rows.jsonl", records))
    lines = str(raised.value).splitlines()
    assert lines[0].endswith("の 31 行のうち 30 行に誤りがあります（空 15、空白だけ 15）。")
    assert (
        lines[1] == "  2行目: chosen が空です"
        and lines[20] == "  21行目: rejected が空白だけです"
        and lines[21] == "  ほか 10 行"
    )
    assert len(lines) == 23 and "DROP_BAD_ROWS" in lines[22] and "--on-error drop" in lines[22]


def test_dropped_rows_are_counted_and_written_to_a_file(tmp_path):
    file = write_lines(tmp_path / "rows.jsonl", [GOOD, GOOD, {**GOOD, "chosen": ""}, {**GOOD, "prompt": " "}])
    load_preferences(file, on_error="drop", dropped_file=tmp_path / "dropped.jsonl")
    assert count_problems(check_rows(file).problems) == [
        {"理由": "空", "行数": 1},
        {"理由": "空白だけ", "行数": 1},
        {"理由": "同じ行がある", "行数": 1},
    ]
    assert [
        json.loads(line) for line in (tmp_path / "dropped.jsonl").read_text(encoding="utf-8").splitlines()
    ] == [
        {"place": "2行目", "reason": "duplicate", "message": "1行目と同じ行です"},
        {"place": "3行目", "reason": "empty", "message": "chosen が空です"},
        {"place": "4行目", "reason": "blank", "message": "prompt が空白だけです"},
    ]
    with pytest.raises(UserError, match="書き込めません"):
        load_preferences(file, on_error="drop", dropped_file=tmp_path)


def test_a_row_that_leaves_nothing_to_learn_is_too_long_only_with_a_tokenizer(tmp_path, gpt2_tokenizer):
    file = write_lines(tmp_path / "rows.jsonl", [GOOD, {**GOOD, "prompt": "長い質問です。" * 30}])
    assert len(load_preferences(file)) == 2
    [(position, reason, message)] = problems_of(file, tokenizer=gpt2_tokenizer, max_length=128)
    assert (position, reason) == (2, "too_long") and message.startswith(
        "長すぎて、128 トークンで切ると学べるところが残りません"
    )
    checked = check_rows(file, tokenizer=gpt2_tokenizer, max_length=128)
    assert checked.rows == [EXPECTED] and [row.usable for row in checked.measured] == [True, False]


def say(*texts):
    """Messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


QUESTION, YES, NO = GOOD.values()
CHATS = {
    "prompt, chosen and rejected as messages": {
        "prompt": say(QUESTION),
        "chosen": say("", YES)[1:],
        "rejected": say("", NO)[1:],
    },
    "messages for the prompt alone": {"prompt": say(QUESTION), "chosen": YES, "rejected": NO},
    "an implicit prompt": {"chosen": say(QUESTION, YES), "rejected": say(QUESTION, NO)},
    "a text prompt that both conversations repeat": {
        "prompt": QUESTION,
        "chosen": say(QUESTION, YES),
        "rejected": say(QUESTION, NO),
    },
}


@pytest.mark.parametrize("record", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_chat_messages_become_plain_rows(record, suffix, tmp_path):
    assert list(load_preferences(write_any(tmp_path / f"rows{suffix}", [record]))) == [EXPECTED]


def test_sharegpt_messages_are_read_too(tmp_path):
    turns = [{"from": "human", "value": QUESTION}]
    record = {
        "chosen": [*turns, {"from": "gpt", "value": YES}],
        "rejected": [*turns, {"from": "gpt", "value": NO}],
    }
    assert list(load_preferences(write_lines(tmp_path / "rows.jsonl", [record]))) == [EXPECTED]


def test_earlier_turns_stay_in_the_prompt(tmp_path):
    system = [{"role": "system", "content": "短く答えます。"}]
    record = {"chosen": say("一", "はい。", "二", YES), "rejected": say("一", "はい。", "二", NO)}
    loaded = load_preferences(
        write_lines(tmp_path / "rows.jsonl", [record, {key: system + value for key, value in record.items()}])
    )
    assert [row["prompt"] for row in loaded] == [
        "質問: 一\n回答:\nはい。\n質問: 二\n回答:\n",
        "質問: 短く答えます。\n\n一\n回答:\nはい。\n質問: 二\n回答:\n",
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"chosen": say("q", "a"), "rejected": say("q2", "b")},
            "chosen が、assistant の発言一つで終わる会話になっていません",
        ),
        (
            {"chosen": say("q"), "rejected": say("q")},
            "chosen が、assistant の発言一つで終わる会話になっていません",
        ),
        (
            {"chosen": say("", "a")[1:], "rejected": say("", "b")[1:]},
            "user の発言（質問）で終わる部分がありません",
        ),
        ({"chosen": say(" ", "a"), "rejected": say(" ", "b")}, "prompt に質問の文がありません"),
        (
            {"chosen": [{"text": "a"}], "rejected": say("q", "b")},
            "chosen の発言に role と content の文字列がありません",
        ),
        ({"prompt": say("q"), "chosen": None, "rejected": "b"}, "chosen が空です"),
        (
            {"prompt": "q", "chosen": say("q", "a"), "rejected": say("q", "a")},
            "chosen と rejected が同じです",
        ),
    ],
)
def test_a_conversation_of_another_form_is_a_row_error(record, message, tmp_path):
    assert [text for _, _, text in problems_of(write_lines(tmp_path / "rows.jsonl", [record]))] == [message]


UNREADABLE = {
    "absent.csv": (None, "見つかりません"),
    "./absent": (None, "見つかりません"),
    "owner/absent": (None, "データセット owner/absent を取得できません"),
    "imagefolder": (None, "所有者/名前 の形"),
    "rows.txt": (b"a", "形式は読めません"),
    "empty.csv": (b"", "行がありません"),
    "header.csv": (b"prompt,chosen,rejected\n", "行がありません"),
    "twice.csv": (b"prompt,chosen,chosen\na,b,c\n", "見出し chosen が二つ以上"),
    "open.csv": (b'prompt,chosen,rejected\na,b,"c\nd,e,f\n', "2行目の引用符"),
    "mixed.csv": ("あ".encode() + "あ".encode("cp932") + b"\x82", "文字コードが分かりません"),
    "half.json": (b'[{"a": 1},', "読み取れません"),
    "broken.parquet": (b"PAR1 nothing", "読み取れません"),
    "broken.xlsx": (b"PK nothing", "読み取れません"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_told_without_a_traceback_of_a_library(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, words = UNREADABLE[name]
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(UserError, match=words) as raised:
        load_preferences(name)
    assert not isinstance(raised.value, RowErrors)


def test_a_hub_data_set_is_read_with_its_columns(tmp_path, monkeypatch):
    from datasets import Dataset

    data = Dataset.from_list([{"question": QUESTION, "good": YES, "bad": NO, "score": 1.0}] * 2)
    monkeypatch.setattr(
        "datasets.load_dataset", lambda name, split: data if (name, split) == ("owner/name", "test") else None
    )
    for arguments in ({"source": "owner/name", "split": "test"}, {"source": "owner/name:test"}):
        checked = check_rows(**arguments)
        assert checked.rows == [EXPECTED] and checked.problems[0].message == "1件目と同じ行です"
        assert checked.notes == ["使わない列：score"]


def test_a_split_that_is_not_there_is_told_with_those_that_are(monkeypatch):
    def load_dataset(name, split):
        raise ValueError(f'Unknown split "{split}". Should be one of ["prefs"].')

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"owner/name の train は読めません。owner/name:split か .*prefs"):
        check_rows("owner/name")


# --- mutated files: nothing but valid rows or our own error ever comes out, and no row is lost on the way ---

BOUNDED = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", " ", "　", "質問:", "NA", "同じ", "はい。", "a,b", 'a"b', "a\nb", "\ufeff", "\x00", "\r"]
    ),
)
VALUES = st.recursive(
    st.one_of(TEXTS, st.none(), st.booleans(), st.integers(), st.floats()),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = st.sampled_from(
    ["prompt", "chosen", "rejected", "質問", "good", "bad", "field", "concept", "", "\ud800"]
)


def check(path: Path, records: int | None = None) -> None:
    """Load with both settings: our errors only, sound rows only, and as many rows out and reported as
    there are in the file.
    """
    try:
        checked = check_rows(path)
    except UserError as error:
        str(error).encode()
        return
    kept, problems = checked.rows, checked.problems
    "".join([*checked.notes, *(problem.message for problem in problems)]).encode()
    for row in kept:
        assert set(row) == {"prompt", "chosen", "rejected"}
        assert all(isinstance(text, str) and text.strip() for text in row.values())
        assert row["prompt"].endswith("\n回答:\n") and row["chosen"] != row["rejected"]
        "".join(row.values()).encode()
    assert len({(row["prompt"], row["chosen"], row["rejected"]) for row in kept}) == len(kept)
    assert len({problem.position for problem in problems}) == len(problems)
    if records is not None:
        assert len(kept) + len(problems) == records
    if problems:
        with pytest.raises(RowErrors):
            load_preferences(path)
    else:
        assert load_preferences(path) == kept


@BOUNDED
@given(st.lists(st.dictionaries(NAMES, VALUES, max_size=5), min_size=1, max_size=8))
def test_any_json_objects_are_kept_or_reported(tmp_path_factory, records):
    folder = tmp_path_factory.getbasetemp()
    file = folder / "any.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    check(file, len(records))
    (folder / "any.json").write_text(json.dumps(records), encoding="utf-8")
    check(folder / "any.json", len(records))


@BOUNDED
@given(
    st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=1, max_size=6),
    st.sampled_from(["utf-8", "utf-8-sig", "cp932", "utf-16"]),
)
def test_any_cells_in_any_encoding_are_kept_or_reported(tmp_path_factory, lines, encoding):
    import csv

    folder = tmp_path_factory.getbasetemp()
    for name, delimiter in (("any.csv", ","), ("any.tsv", "\t")):
        with open(folder / name, "w", encoding=encoding, errors="replace", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL)
            writer.writerows([("質問", "good", "bad"), *lines])
        check(folder / name, sum(any(cells) for cells in lines) if encoding.startswith("utf-8") else None)


@BOUNDED
@given(st.integers(0, 2**32), st.sampled_from(["rows.csv", "rows.tsv", "rows.json", "rows.jsonl"]))
def test_damaged_files_give_rows_or_our_error(tmp_path_factory, seed, name):
    """Ten damaged files each: a few stretches replaced by other bytes, among them those that the formats
    are made of.
    """
    folder, draw = tmp_path_factory.getbasetemp(), random.Random(seed)
    good = write_any(
        folder / f"good-{name}", [GOOD, {**GOOD, "prompt": "二つ目"}, {**GOOD, "prompt": "三つ目"}]
    ).read_bytes()
    for _ in range(10):
        content = bytearray(draw.choice([b"", codecs.BOM_UTF8]) + good)
        for _ in range(draw.randint(1, 4)):
            start = draw.randrange(len(content) + 1)
            random_bytes = draw.randbytes(draw.randint(0, 6))
            content[start : start + draw.choice([0, 1, 2, 30])] = draw.choice(
                [b"\n", b'"', b",", b"\r", b"[", b"}", b"\\ud800", random_bytes]
            )
        (folder / name).write_bytes(content)
        check(folder / name)


@settings(BOUNDED, max_examples=40)
@given(
    st.lists(
        st.tuples(*[st.one_of(TEXTS, st.none(), st.integers(-9, 9), st.booleans(), st.floats(-9, 9))] * 3),
        min_size=1,
        max_size=5,
    )
)
def test_any_excel_cells_are_kept_or_reported(tmp_path_factory, lines):
    import openpyxl

    file, allowed = tmp_path_factory.getbasetemp() / "any.xlsx", set(string.printable) - set("\x0b\x0c\r=")
    book = openpyxl.Workbook()
    for cells in [("prompt", "chosen", "rejected"), *lines]:
        book.active.append(
            [
                "".join(c for c in cell if c > "\xff" or c in allowed) if isinstance(cell, str) else cell
                for cell in cells
            ]
        )
    book.save(file)
    check(file)


def test_damaged_binary_files_give_rows_or_our_error(tmp_path):
    """Cut at every twentieth of their length and with bytes changed, by a fixed draw: the formats' own
    checks must become our error.
    """
    draw = random.Random(0)
    for name in ("rows.parquet", "rows.xlsx"):
        good = write_any(tmp_path / name, [GOOD, {**GOOD, "prompt": "二つ目"}]).read_bytes()
        versions = [good[: len(good) * i // 20] for i in range(20)]
        for _ in range(20):
            damaged = bytearray(good)
            damaged[draw.randrange(len(good))] ^= 1 << draw.randrange(8)
            versions.append(bytes(damaged))
        for content in versions:
            (tmp_path / name).write_bytes(content)
            check(tmp_path / name)


@settings(BOUNDED, max_examples=60)
@given(
    st.lists(
        st.tuples(VALUES.filter(lambda v: not isinstance(v, (list, dict))), TEXTS, TEXTS),
        min_size=1,
        max_size=5,
    )
)
def test_any_parquet_values_are_kept_or_reported(tmp_path_factory, lines):
    from pyarrow import parquet

    file = tmp_path_factory.getbasetemp() / "any.parquet"
    columns = [list(column) for column in zip(*lines, strict=True)]
    try:
        table = pyarrow.table(dict(zip(("prompt", "chosen", "rejected"), columns, strict=True)))
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError):
        return  # Arrow has no column of such mixed values: no such file exists
    parquet.write_table(table, file)
    check(file, len(lines))
