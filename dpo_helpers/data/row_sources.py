"""Opens a file, a saved data set or a Hub data set as numbered records; it does not judge them."""

import codecs
import csv
import gzip
import io
import json
import re
import sys
import zipfile
from collections import Counter
from datetime import date, time
from pathlib import Path
from typing import NamedTuple

from dpo_helpers.config import UserError
from dpo_helpers.data.hub import explain_hub_error
from dpo_helpers.data.row_checks import NumberText, match_columns, show_name

# What a small file may grow to. Rows of ordinary text shrink to a tenth at best, and a bomb to a thousandth.
LARGEST_GROWTH, ALWAYS_ALLOWED_BYTES = 100, 20 * 2**20
LARGEST_SHEET_CELLS, LARGEST_JSON_DEPTH, HEADER_SEARCH_ROWS = 20_000_000, 100, 20
TEXT_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson")
BOOK_SUFFIXES = (".xlsx", ".xlsm")
SUFFIXES = (*TEXT_SUFFIXES, *BOOK_SUFFIXES, ".parquet")
NOT_ROWS = (
    (
        rb"\s*<(!doctype|html|\?xml)",
        "Web ページ（HTML か XML）です。ファイルそのものを保存し直してください。",
    ),
    (rb"version https://git-lfs", "Git LFS の目印だけです。git lfs pull を実行して本体を取得してください。"),
    (
        rb"PK\x03\x04",
        "ZIP か Excel のファイルです。ZIP なら展開し、Excel なら拡張子を .xlsx にしてください。",
    ),
    (rb"\xd0\xcf\x11\xe0", "古い形式の Excel（.xls）です。Excel で開き、.xlsx で保存し直してください。"),
    (rb"\x1f\x8b", "gzip で圧縮されています。名前の終わりを .jsonl.gz などにしてください。"),
    (rb"PAR1", "Parquet のファイルです。拡張子を .parquet にしてください。"),
    (
        rb"ARROW1|\xff{4}",
        "Arrow のファイルです。それを含む、保存したデータセットのフォルダを指定してください。",
    ),
    (rb"%PDF", "PDF です。CSV か Excel で保存し直してください。"),
)
NOT_JAPANESE = re.compile("[\x00\x80-\x9f\ue000-\uf8ff\ufffd｡-ﾟ縺繧繝]")
JAPANESE = re.compile("[ぁ-ゖァ-ヺー、。]")


class Source(NamedTuple):
    """Numbered records (a dict, or a Japanese text that says why it could not be read) and how they were
    found.
    """

    unit: str  # 行目 is a line in a text editor or a row of the sheet, 件目 an element of anything else
    records: list[tuple[int, dict | str]]
    notes: list[str]  # what was guessed or left out while opening
    names: tuple[str, ...] = ()  # the columns, where not all of them were read


def open_source(source, explicit: tuple = (), split: str = "train") -> Source:
    """Open a file, `book.xlsx:sheet`, a saved data set's folder or a Hub data set, both with `:split` or
    without.
    """
    text = str(source)
    path, part = text.removeprefix("https://huggingface.co/datasets/"), ""
    if not _exists(path) and ":" in path:
        path, _, part = path.rpartition(":")
    if _exists(path):
        place = Path(path).expanduser()
        return (
            _open_folder(place, part or split, explicit)
            if place.is_dir()
            else _open_file(place, explicit, part)
        )
    name, _, configuration = path.partition(":")
    # a bare name could be one of the library's own readers: imagefolder reads the working folder
    is_name = re.fullmatch(r"\w[\w.-]*/[\w.-]+", name, re.ASCII)
    if not is_name or Path(name.removesuffix(".gz")).suffix.lower() in SUFFIXES:
        raise UserError(
            f"データのファイル {show_name(text)} が見つかりません。名前と場所を確かめてください。"
            "Hub のデータセットは、所有者/名前 の形で書いてください。"
        )
    return _open_hub(name, configuration or None, part or split, explicit)


def _exists(name: str) -> bool:
    try:
        return bool(name) and Path(name).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, with a NUL, or the home of nobody
        return False


def _open_file(path: Path, explicit: tuple, sheet: str) -> Source:
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    if suffix not in (TEXT_SUFFIXES if name.endswith(".gz") else SUFFIXES):
        head = path.open("rb").read(64)
        what = next((text for pattern, text in NOT_ROWS if re.match(pattern, head, re.I)), "")
        raise UserError(
            f"{path} の形式は読めません。{what}読めるのは {', '.join(SUFFIXES)}（文字のものは .gz も）です。"
        )
    try:
        if suffix in BOOK_SUFFIXES:
            return _open_book(path, explicit, sheet)
        if suffix == ".parquet":
            return _open_parquet(path, explicit)
        text, notes = _read_text(path, name.endswith(".gz"))
        if suffix in (".csv", ".tsv"):
            return _open_table(path, text, "\t" if suffix == ".tsv" else "", explicit, notes)
        return _open_json(path, text, lines=suffix != ".json", notes=notes)
    except OSError as error:
        raise UserError(f"{path} を読めません（{error}）。場所とアクセス権を確かめてください。") from error


def _unreadable(path, reason) -> UserError:
    return UserError(
        f"{path} を読み取れません。理由：{reason}\nファイルが壊れていないか、"
        "拡張子が中身と合っているかを確かめてください。"
    )


def _too_large(path, allowed: int) -> UserError:
    return UserError(
        f"{path} は、広げると {allowed / 2**20:,.0f} MiB を超えます。小さなファイルとしては大きすぎるので、"
        "読みません。中身を確かめ、圧縮せずに保存し直してください。"
    )


def _allowed_bytes(path: Path) -> int:
    return max(LARGEST_GROWTH * path.stat().st_size, ALWAYS_ALLOWED_BYTES)


def _read_text(path: Path, packed: bool) -> tuple[str, list[str]]:
    """Return (the text, what was guessed of its encoding)."""
    content = path.read_bytes()
    if packed:
        try:
            with gzip.open(path) as file:
                content = file.read(_allowed_bytes(path) + 1)
        except (OSError, EOFError, ValueError, zipfile.zlib.error) as error:
            raise _unreadable(path, error) from error
        if len(content) > _allowed_bytes(path):
            raise _too_large(path, _allowed_bytes(path))
    for pattern, what in NOT_ROWS:
        if re.match(pattern, content[:64], re.IGNORECASE):
            raise UserError(f"{path} の中身は行ではありません。{what}")
    encoding = find_encoding(content)
    if not encoding:
        raise UserError(
            f"{path} の文字コードが分かりません（UTF-8 でも、日本語として読める CP932、EUC-JP、ISO-2022-JP、"
            "UTF-16 でもありません）。UTF-8 で保存し直してください。"
        )
    guessed = [] if encoding == "utf-8-sig" else [f"文字コードは {encoding} とみて読みました。"]
    return content.decode(encoding), guessed


def find_encoding(content: bytes) -> str:
    """Return the encoding that decodes all of `content` into plausible Japanese, or "".

    charset-normalizer was tried: it takes EUC-JP for Korean, and knows no CP932 with ① or 髙 in it.
    """
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32" if _decodes(content, "utf-32") else ""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16" if _decodes(content, "utf-16") else ""
    candidates = ["cp932", "euc_jp", "euc_jis_2004"]
    if re.search(rb"\x1b\$[@B(]", content):
        candidates = ["iso2022_jp", "iso2022_jp_ext", "iso2022_jp_2004"]
    elif 0 in content:  # every comma and line end of UTF-16 holds one, and else at most a broken cell
        candidates = ["utf-16-le", "utf-16-be"]
    elif _decodes(content, "utf-8-sig"):
        return "utf-8-sig"
    best, index = max((rate_japanese(content, name), -i) for i, name in enumerate(candidates))
    if best > 0.1:
        return candidates[-index]
    return "utf-8-sig" if _decodes(content, "utf-8-sig") else ""


def _decodes(content: bytes, encoding: str) -> bool:
    try:
        content.decode(encoding)
    except UnicodeError:
        return False
    return True


def rate_japanese(content: bytes, encoding: str) -> float:
    """Return the share of kana among the letters beyond ASCII, less that of letters that mojibake is full
    of.
    """
    try:
        letters = re.sub("[\x01-\x7f]", "", content.decode(encoding)[:100_000])
    except UnicodeError:
        return -1.0
    return (len(JAPANESE.findall(letters)) - len(NOT_JAPANESE.findall(letters))) / max(1, len(letters))


def _open_table(path: Path, text: str, delimiter: str, explicit: tuple, notes: list[str]) -> Source:
    """Read CSV by the csv module, the one reader that counts a text editor's lines; pandas counts rows."""
    delimiter = delimiter or _find_delimiter(text, notes)
    lines, start = [], 1
    old_limit = csv.field_size_limit(sys.maxsize)  # a long cell is one bad row, not a file that is refused
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        for cells in reader:
            lines.append((start, [cell or None for cell in cells]))
            start = reader.line_num + 1
    except csv.Error as error:
        raise _unreadable(path, f'{start}行目の引用符 " の付近：{error}') from error
    finally:
        csv.field_size_limit(old_limit)
    table = _read_table(path, lines, explicit)
    return Source("行目", table.records, notes + table.notes)


def _find_delimiter(text: str, notes: list[str]) -> str:
    """Return the comma, or what divides the first lines where no comma does."""
    head = text[:10_000].splitlines()[:HEADER_SEARCH_ROWS]
    found = max(",\t;|", key=lambda mark: max((line.count(mark) for line in head), default=0))
    if found == "," or any("," in line for line in head[:1]):
        return ","
    notes.append(f"列の区切りは {'タブ' if found == chr(9) else found} とみて読みました。")
    return found


def _read_table(path, lines: list, explicit: tuple) -> Source:
    """Make records of the rows below the header: the first row that names the columns of pairs, or else the
    first.
    """
    lines = [(number, cells) for number, cells in lines if any(cell is not None for cell in cells)]
    if not lines:
        return Source("行目", [], [])
    place = next((i for i, line in enumerate(lines[:HEADER_SEARCH_ROWS]) if _is_header(line[1], explicit)), 0)
    number, cells = lines[place]
    header = ["" if cell is None else str(cell) for cell in cells]
    used = match_columns(tuple(header), explicit)[0].values()
    if repeated := [show_name(name) for name, count in Counter(header).items() if count > 1 and name in used]:
        raise UserError(
            f"{path} の見出し {', '.join(repeated)} が二つ以上あります。列の名前を変えてください。"
        )
    notes = [f"{number} 行目を見出しとして読みました。"] if place else []
    return Source("行目", [(n, _name_cells(header, cells)) for n, cells in lines[place + 1 :]], notes)


def _is_header(cells: list, explicit: tuple) -> bool:
    names = tuple(cell for cell in cells if isinstance(cell, str) and len(cell) < 100)
    return len(names) > 1 and not match_columns(names, explicit)[1]


def _name_cells(header: list[str], cells: list) -> dict | str:
    if any(cell is not None for cell in cells[len(header) :]):
        return f"見出しの {len(header)} 列より多くの列があります"
    cells = [*cells, *[None] * (len(header) - len(cells))]
    return {name: cell for name, cell in zip(header, cells, strict=False) if name}


def _open_book(path: Path, explicit: tuple, wanted: str) -> Source:
    """Read the wanted sheet, else the first one that has the columns of pairs, else the first with rows."""
    import openpyxl

    try:
        with zipfile.ZipFile(path) as archive:
            if sum(item.file_size for item in archive.infolist()) > _allowed_bytes(path):
                raise _too_large(path, _allowed_bytes(path))
            book = openpyxl.load_workbook(path, read_only=True, data_only=True)
            names = [sheet.title for sheet in book.worksheets]
            if wanted and wanted not in names:
                shown = "、".join(map(show_name, names))
                raise UserError(f"{path} にシート「{show_name(wanted)}」がありません。あるシート：{shown}")
            tables = {}
            for sheet in book.worksheets:
                if not wanted or sheet.title == wanted:
                    lines, filled = _read_sheet(path, sheet, archive)
                    tables[sheet.title] = _read_table(path, lines, explicit), filled
            book.close()
    except (UserError, OSError):
        raise
    except Exception as error:  # openpyxl lets through whatever its parsers raise for a damaged file
        raise _unreadable(path, error) from error
    taken = max(tables, key=lambda name: _rate_table(tables[name][0], explicit))
    table, filled = tables[taken]
    notes = [f"セルの結合を解いて、{filled:,} 個のセルに同じ値を入れました。"] * bool(filled) + table.notes
    if others := [show_name(name) for name in names if name != taken]:
        notes.insert(
            0,
            f"シート「{show_name(taken)}」を読みました（読まないシート：{'、'.join(others)}）。"
            "ほかのシートは、ファイル名:シート名 と書いて選べます。",
        )
    return Source("行目", table.records, notes)


def _rate_table(table: Source, explicit: tuple) -> tuple[bool, bool]:
    first = next((record for _, record in table.records if isinstance(record, dict)), {})
    return bool(first) and not match_columns(tuple(first), explicit)[1], bool(table.records)


def _read_sheet(path: Path, sheet, archive: zipfile.ZipFile) -> tuple[list, int]:
    """Return ([(row number, cells)], how many cells of merged ranges were filled downwards)."""
    sheet.reset_dimensions()  # what the file says of its size may be wrong
    lines, widest = {}, 1
    for number, cells in enumerate(sheet.iter_rows(values_only=True), 1):
        widest = max(widest, len(cells))
        if number * widest > LARGEST_SHEET_CELLS:
            raise UserError(
                f"{path} のシート「{show_name(sheet.title)}」は、{number} 行、{widest} 列まで使われています。"
                "離れたところにあるセルを消すか、行を分けて保存し直してください。"
            )
        if any(cell is not None for cell in cells):
            lines[number] = [_read_cell(cell) for cell in cells]
    filled, xml = 0, archive.read(sheet._worksheet_path.lstrip("/"))  # the reader for large files keeps none
    for found in re.finditer(rb'<mergeCell ref="([A-Z]+)(\d+):([A-Z]+)(\d+)"', xml):
        filled += _fill_down(lines, *(part.decode() for part in found.groups()))
    return list(lines.items()), filled


def _fill_down(lines: dict[int, list], first: str, top: str, last: str, bottom: str) -> int:
    """Copy the top cell of a range of one column into the rows below it that have any content."""
    from openpyxl.utils import column_index_from_string

    column, head, filled = column_index_from_string(first) - 1, lines.get(int(top), []), 0
    if first != last or column >= len(head):
        return 0
    for number in range(int(top) + 1, min(int(bottom), max(lines)) + 1):
        if cells := lines.get(number):
            cells.extend([None] * (column + 1 - len(cells)))
            cells[column] = head[column]
            filled += 1
    return filled


def _read_cell(value):
    """Return a cell as text: 3.0 is 3, a date is 2025-04-01, an error value is empty."""
    if isinstance(value, str):
        is_error = value.startswith("#") and value in (
            "#N/A",
            "#DIV/0!",
            "#VALUE!",
            "#REF!",
            "#NAME?",
            "#NUM!",
        )
        return None if is_error or not value else value
    if isinstance(value, float):
        return NumberText(f"{value:.15g}")
    if isinstance(value, date | time):
        return NumberText(str(value).removesuffix(" 00:00:00"))
    return None if value is None else NumberText(value)


def _open_parquet(path: Path, explicit: tuple) -> Source:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    records, size = [], 0
    try:
        file = ParquetFile(path)
        names = file.schema_arrow.names
        useful = _useful_columns(names, explicit)
        # few rows at once: a file of 1 kB can hold one text of 10 MB a thousand times
        for batch in file.iter_batches(batch_size=16, columns=useful):
            size += batch.nbytes
            if size > _allowed_bytes(path):
                raise _too_large(path, _allowed_bytes(path))
            records += batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise _unreadable(path, error) from error
    return Source("件目", list(enumerate(records, 1)), [], tuple(names))


def _useful_columns(names: list[str], explicit: tuple) -> list[str]:
    """Only the columns that rows are made of, so that pictures stay unread; all where some are missing."""
    found, trouble = match_columns(tuple(names), explicit)
    return list(names) if trouble or not {"chosen", "rejected"} <= set(found) else list(found.values())


def _open_json(path: Path, text: str, lines: bool, notes: list[str]) -> Source:
    """Read one JSON document, or objects one after another: a line each, or over several lines each."""
    first = next((line for line in io.StringIO(text) if line.strip()), "")
    is_by_line = isinstance(_parse(first), dict)
    try:
        values = [] if lines and is_by_line else _decode_all(text)
    except (ValueError, RecursionError) as error:
        if not lines and not is_by_line:
            raise _unreadable(path, error) from error
        values = []
    if not values:
        numbered = enumerate(io.StringIO(text, newline=None), 1)
        return Source("行目", [(number, _parse(line)) for number, line in numbered if line.strip()], notes)
    if len(values) > 1:
        return Source("行目", [(number, _check_object(value)) for number, value in values], notes)
    rows, how = _find_rows(values[0][1])
    return Source("件目", [(i, _check_object(row)) for i, row in enumerate(rows, 1)], notes + how)


def _parse(line: str) -> dict | str:
    try:
        return _check_object(json.loads(line))
    except (ValueError, RecursionError) as error:
        return f"JSON として読めません（{error}）"


def _decode_all(text: str) -> list[tuple[int, object]]:
    """Return (line number, value) of JSON values that follow each other."""
    decoder, values, line, place = json.JSONDecoder(), [], 1, 0
    while start := re.compile(r"\S").search(text, place):
        line += text.count("\n", place, start.start())
        value, end = decoder.raw_decode(text, start.start())
        values.append((line, value))
        line += text.count("\n", start.start(), end)
        place = end
    return values


def _check_object(value) -> dict | str:
    """Return the value if it is an object of bearable depth, else what is wrong with it."""
    if not isinstance(value, dict):
        return "列の名前と値の対応 { } ではありません"
    level, depth = [value], 0
    while level := [inner for outer in level for inner in _list_inside(outer)]:
        depth += 1
        if depth > LARGEST_JSON_DEPTH:
            return f"入れ子が {LARGEST_JSON_DEPTH} 段より深いので読めません"
    return value


def _list_inside(value: dict | list) -> list:
    values = value.values() if isinstance(value, dict) else value
    return [inner for inner in values if isinstance(inner, dict | list)]


def _find_rows(document) -> tuple[list, list[str]]:
    """Return (the rows of a JSON document, how they were found where it is not simply a list)."""
    if not isinstance(document, dict):
        return document if isinstance(document, list) else [document], []
    names, values = list(document), list(document.values())
    if isinstance(document.get("columns"), list) and _is_list_of(document.get("data"), list):
        return [dict(zip(document["columns"], row, strict=False)) for row in document["data"]], [BY_COLUMNS]
    if len(values) > 1 and all(isinstance(v, dict) and v.keys() == values[0].keys() for v in values):
        return [dict(zip(names, row, strict=True)) for row in zip(*_values_of(values), strict=True)], [
            BY_COLUMNS
        ]
    if len(values) > 1 and all(_is_list_of(v, str) and len(v) == len(values[0]) for v in values):
        return [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)], [BY_COLUMNS]
    lists = [name for name in names if _is_list_of(document[name], dict)]
    if lists and match_columns(tuple(names), ())[1]:
        name = next((name for name in ("rows", "data", "train") if name in lists), lists[0])
        rows = [row["row"] if isinstance(row.get("row"), dict) else row for row in document[name]]
        return rows, [f"{show_name(name)} の中の行を読みました。"]
    return [document], []


BY_COLUMNS = "列ごとにまとめた JSON として読みました。"


def _values_of(columns: list[dict]) -> list:
    return [list(column.values()) for column in columns]


def _is_list_of(value, kind) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, kind) for item in value)


def _open_folder(folder: Path, split: str, explicit: tuple) -> Source:
    from datasets import DatasetDict, load_from_disk

    if not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        files = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
        inside = f"中のファイル（{'、'.join(map(show_name, files[:10]))}）のどれか" if files else "ファイル"
        raise UserError(
            f"{folder} はフォルダで、save_to_disk で保存したデータセットでもありません。"
            f"{inside}を指定してください。"
        )
    try:
        data = load_from_disk(str(folder))
        if isinstance(data, DatasetDict):
            if split not in data:
                raise UserError(
                    f"{folder} に {show_name(split)} という split はありません（{'、'.join(data)}）。"
                )
            data = data[split]
        return _read_dataset(data, explicit)
    except UserError:
        raise
    except Exception as error:  # datasets passes on whatever its readers raise for damaged files
        raise _unreadable(folder, error) from error


def _open_hub(name: str, configuration: str | None, split: str, explicit: tuple) -> Source:
    from datasets import get_dataset_split_names, load_dataset

    try:
        try:
            return _read_dataset(load_dataset(name, *filter(None, [configuration]), split=split), explicit)
        except ValueError as error:
            if "split" not in str(error):
                raise
            splits = "、".join(get_dataset_split_names(name, configuration))
            raise UserError(
                f"{name} に {show_name(split)} という split はありません（あるもの：{splits}）。"
                f"{name}:split の名前 と書いて選んでください。"
            ) from error
    except UserError:
        raise
    except Exception as error:  # datasets passes on whatever the network and the file readers raise
        reason = explain_hub_error(error, f"データセット {name}")
        if isinstance(error, ValueError) and "onfig" in str(error):
            reason = f"{name}:設定名:split と書いて、設定を選んでください。理由：{error}"
        raise UserError(reason) from error


def _read_dataset(data, explicit: tuple) -> Source:
    data.data.validate(full=True)  # a damaged file would end the process, not raise
    names = data.column_names
    useful = _useful_columns(names, explicit)
    rows = data.select_columns(useful)
    return Source("件目", list(enumerate(rows, 1)), [], tuple(names))
