"""Opens a file or a Hub data set as numbered records and finds the columns that rows are made of; it does
not judge the rows.
"""

import codecs
import csv
import json
import unicodedata
from collections import Counter
from functools import lru_cache
from pathlib import Path

from dpo_helpers.errors import UserError

KEYS = ("prompt", "chosen", "rejected")
EXTRA_KEYS = ("field", "concept", "question_form", "rejection_kind")
ALIASES = {
    "prompt": (
        "prompt",
        "question",
        "instruction",
        "query",
        "input",
        "質問",
        "質問文",
        "問い",
        "問題",
        "指示",
        "プロンプト",
    ),
    "chosen": (
        "chosen",
        "good",
        "better",
        "preferred",
        "good_answer",
        "良い回答",
        "よい回答",
        "良い答え",
        "好ましい回答",
    ),
    "rejected": (
        "rejected",
        "bad",
        "worse",
        "dispreferred",
        "bad_answer",
        "悪い回答",
        "わるい回答",
        "悪い答え",
        "好ましくない回答",
    ),
}


@lru_cache(maxsize=256)
def match_columns(names: tuple[str, ...], explicit: tuple[tuple[str, str], ...]) -> tuple[dict, str, bool]:
    """Return ({our key: the source's name}, what is wrong in Japanese or "", whether nothing but the prompt
    is missing).

    An explicit name wins, then our own name, then ALIASES (whatever the case or width of the letters).
    """
    mapping, found, troubles = dict(explicit), {}, []
    for key in KEYS + EXTRA_KEYS:
        hits = [name for name in names if name == mapping.get(key, key)]
        if not hits and key not in mapping and key in KEYS:
            hits = [
                name
                for name in names
                if unicodedata.normalize("NFKC", name).strip().casefold().replace(" ", "_") in ALIASES[key]
            ]
        if len(hits) == 1:
            found[key] = hits[0]
        elif hits:
            troubles.append((key, f"{key} にあたる列が {len(hits)} つあります（{', '.join(hits)}）"))
        elif key in KEYS or key in mapping:
            troubles.append((key, f"{mapping.get(key, key)} の列がありません"))
    text = "。".join(text for _, text in troubles)
    if text:
        text += f"。ある列：{', '.join(name[:40] for name in names[:20]) or 'なし'}"
    return found, text.encode(errors="replace").decode(), [key for key, _ in troubles] == ["prompt"]


def open_source(source, columns: dict, split: str):
    """Return (what a position is called, the number of records or a little more, an iterator of (position,
    record)).

    A record is a dict, or a Japanese text that says why it could not be read. 行目 is the line of a JSONL
    file in a text editor and the row of a sheet with the header's among them; 件目 counts the elements of
    JSON, Parquet and the Hub.
    """
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    readers = {
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".json": _read_json,
        ".jsonl": _read_json_lines,
        ".ndjson": _read_json_lines,
        ".parquet": _read_parquet,
        ".xlsx": _read_excel,
        ".xlsm": _read_excel,
    }
    if path.is_file():
        if suffix not in readers:
            raise UserError(
                f"{source} の形式は読めません。拡張子が {', '.join(readers)} のどれかのファイルに"
                "してください。"
            )
        return readers[suffix](path, columns)
    name = str(source)
    if (
        path.exists()
        or suffix in readers
        or not name
        or name.count("/") > 1
        or name.startswith((".", "~", "/"))
    ):
        raise UserError(f"データのファイル {source} が見つかりません。名前と場所を確かめてください。")
    return _read_hub(name, columns, split)


def _read_hub(name: str, columns: dict, split: str):
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        data = load_dataset(name, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(
            f"{name} というファイルはなく、Hugging Face Hub のデータセットとしても読めません。理由：{error}\n"
            "名前、ネットワーク、split の名前を確かめてください。"
        ) from error
    data = data.select_columns(_useful_columns(data.column_names, columns))
    return "件目", len(data), enumerate(data, 1)


def _read_parquet(path: Path, columns: dict):
    import pyarrow
    from pyarrow.parquet import ParquetFile

    def records():
        try:
            for batch in file.iter_batches(
                batch_size=1000, columns=_useful_columns(file.schema_arrow.names, columns)
            ):
                yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise _unreadable(path, error) from error

    try:
        file = ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error
    return "件目", file.metadata.num_rows, enumerate(records(), 1)


def _useful_columns(names: list[str], columns: dict) -> list[str]:
    """Only the columns that rows are made of, so that pictures and other heavy ones stay unread; all where
    some are missing.
    """
    found, trouble, _ = match_columns(tuple(names), tuple(columns.items()))
    return list(names) if trouble else list(found.values())


def _read_excel(path: Path, columns: dict):
    import pandas

    try:
        cells = pandas.read_excel(path, header=None, dtype=object, keep_default_na=False).to_numpy().tolist()
    except ImportError as error:
        raise UserError(
            "Excel を読むには openpyxl が必要です。pip install openpyxl を実行するか、"
            "CSV で保存してください。"
        ) from error
    except (
        Exception
    ) as error:  # openpyxl lets through whatever its zip and XML parsers raise for a damaged file
        raise _unreadable(path, error) from error
    return "行目", len(cells), _read_table(path, enumerate(cells, 1))


def _read_csv(path: Path, columns: dict):
    encoding, lines = _find_encoding(path)

    def records():  # a record is a row of the sheet, even where a quoted cell holds line breaks
        with open(path, encoding=encoding, newline="") as file:
            reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            number = 0
            try:
                for number, cells in enumerate(reader, 1):
                    yield number, cells
            except csv.Error as error:
                raise _unreadable(path, f'{number + 1}行目の引用符 " の付近：{error}') from error

    return "行目", lines, _read_table(path, records())


def _read_table(path: Path, lines):
    """Yield the rows below the first row that is not empty, the header; rows without any content are
    passed over.
    """
    header = None
    for number, cells in lines:
        cells = [None if cell is None or cell != cell or cell == "" else cell for cell in cells]
        if not any(cell is not None for cell in cells):
            continue
        if header is None:
            header = ["" if cell is None else str(cell) for cell in cells]
            if repeated := [name for name, count in Counter(header).items() if name and count > 1]:
                raise UserError(
                    f"{path} の見出し {', '.join(repeated)} が二つ以上あります。列の名前を変えてください。"
                )
        elif any(cell is not None for cell in cells[len(header) :]):
            yield number, f"見出しの {len(header)} 列より多くの列があります"
        else:
            cells += [None] * (len(header) - len(cells))
            yield number, {name: cell for name, cell in zip(header, cells, strict=False) if name}


def _read_json_lines(path: Path, columns: dict):
    encoding, lines = _find_encoding(path)

    def records():
        with open(path, encoding=encoding) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _parse_line(line)

    return "行目", lines, records()


def _parse_line(line: str) -> dict | str:
    try:
        return _check_object(json.loads(line))
    except (ValueError, RecursionError) as error:
        return f"JSON として読めません（{error}）"


def _check_object(value) -> dict | str:
    return value if isinstance(value, dict) else "列の名前と値の組 { } ではありません"


def _read_json(path: Path, columns: dict):
    encoding, _ = _find_encoding(path)
    try:
        rows = json.loads(path.read_text(encoding=encoding))
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data":  # one object a line: JSON Lines under the name of JSON
            return _read_json_lines(path, columns)
        raise _unreadable(path, error) from error
    if not isinstance(rows, list):
        raise UserError(
            f"{path} は JSON の配列 [ ] ではありません。行の配列にするか、1 行に 1 件の JSONL "
            "にしてください。"
        )
    return "件目", len(rows), enumerate(map(_check_object, rows), 1)


def _find_encoding(path: Path) -> tuple[str, int]:
    """Return (the encoding that decodes the whole file, its number of lines)."""
    with open(path, "rb") as file:
        is_utf_16 = file.read(2) in (
            codecs.BOM_UTF16_LE,
            codecs.BOM_UTF16_BE,
        )  # what Excel calls Unicode text
    for encoding in ("utf-16",) if is_utf_16 else ("utf-8-sig", "cp932"):
        try:
            with open(path, encoding=encoding) as file:
                return encoding, sum(text.count("\n") for text in iter(lambda: file.read(1 << 20), "")) + 1
        except UnicodeDecodeError:
            continue  # the next encoding; the last one's failure is told below
    raise UserError(
        f"{path} の文字コードが UTF-8 でも CP932（シフト JIS）でもありません。UTF-8 で保存し直してください。"
    )


def _unreadable(path: Path, reason) -> UserError:
    return UserError(
        f"{path} を読み取れません。理由：{reason}\nファイルが壊れていないか、"
        "拡張子が中身と合っているかを確かめてください。"
    )
