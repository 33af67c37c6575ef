"""Opens a file, a saved data set or a Hub data set as numbered records; it does not judge them."""

import codecs
import csv
import gzip
import io
import json
import re
import sys
import zipfile
import zlib
from collections import Counter
from datetime import date, time
from pathlib import Path
from typing import NamedTuple

from dpo_helpers.data.hub import explain_hub_error
from dpo_helpers.data.row_checks import NumberText, match_columns, show_name
from dpo_helpers.errors import UserError

# What a packed file may grow to: ordinary rows shrink to a tenth or a fiftieth, a bomb to a thousandth.
LARGEST_GROWTH, ALWAYS_ALLOWED_BYTES, LARGEST_BYTES = 100, 20 * 2**20, 500 * 2**20
LARGEST_SHEET_CELLS, LARGEST_JSON_DEPTH, HEADER_SEARCH_ROWS = 20_000_000, 100, 20
TEXT_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson")
BOOK_SUFFIXES = (".xlsx", ".xlsm")
SUFFIXES = (*TEXT_SUFFIXES, *BOOK_SUFFIXES, ".parquet")
NOT_ROWS = {
    rb"\s*<(!doctype|html|\?xml)": "Web ページ（HTML、XML）です。ファイルそのものを保存し直してください。",
    rb"version https://git-lfs": "Git LFS の目印だけです。git lfs pull で本体を取得してください。",
    rb"PK\x03\x04": "ZIP（展開してください）か Excel（拡張子を .xlsx にしてください）です。",
    rb"\xd0\xcf\x11\xe0": "古い形式の Excel（.xls）です。Excel で開き、.xlsx で保存し直してください。",
    rb"\x1f\x8b": "gzip で圧縮されています。名前の終わりを .jsonl.gz などにしてください。",
    rb"PAR1": "Parquet のファイルです。拡張子を .parquet にしてください。",
    rb"ARROW1|\xff{4}": "Arrow のファイルです。保存したデータセットなら、そのフォルダを指定してください。",
    rb"%PDF": "PDF です。CSV か Excel で保存し直してください。",
}
ERROR_VALUES = {"#N/A", "#DIV/0!", "#VALUE!", "#REF!", "#NAME?", "#NUM!"}
BY_COLUMNS = ["列ごとにまとめた JSON として読みました。"]
# kana and punctuation are in every Japanese text; the others are what a wrong encoding makes of it
JAPANESE, NOT_JAPANESE = (
    re.compile("[ぁ-ゖァ-ヺー、。]"),
    re.compile("[\0\x80-\x9f\ue000-\uf8ff\ufffd｡-ﾟ縺繧繝]"),
)


class Source(NamedTuple):
    """Numbered records: dicts, or Japanese texts that say why one could not be read."""

    unit: str  # 行目 is a line in a text editor or a row of the sheet, 件目 an element of anything else
    records: list[tuple[int, dict | str]]
    notes: list[str]  # what was guessed or left out while opening
    names: tuple[str, ...] = ()  # the columns, where not all of them were read


def open_source(source, explicit: tuple = (), split: str = "train") -> Source:
    """Open a file, `book.xlsx:sheet`, a saved data set's folder or a Hub data set (with `:split` or not)."""
    text = str(source)
    path, part = text.removeprefix("https://huggingface.co/datasets/"), ""
    if not _exists(path) and ":" in path:
        path, _, part = path.rpartition(":")
    place, (name, _, configuration) = Path(path), path.partition(":")
    if _exists(path):
        place = place.expanduser()
        return (
            _open_folder(place, part or split, explicit)
            if place.is_dir()
            else _open_file(place, explicit, part)
        )
    # a bare name could be one of the library's own readers: imagefolder reads the working folder
    is_name = re.fullmatch(r"\w[\w.-]*/[\w.-]+", name, re.ASCII)
    if not is_name or Path(name.removesuffix(".gz")).suffix.lower() in SUFFIXES:
        raise UserError(
            f"データのファイル {show_name(text)} が見つかりません。名前と場所を確かめてください。"
            "Hub のデータセットは、所有者/名前 の形で書いてください。"
        )
    return _open_hub(name, configuration, part or split, explicit)


def _exists(name: str) -> bool:
    try:
        return bool(name) and Path(name).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, with a NUL, or the home of nobody
        return False


def _open_file(path: Path, explicit: tuple, sheet: str) -> Source:
    name = path.name.lower()
    suffix, is_packed = Path(name.removesuffix(".gz")).suffix, name.endswith(".gz")
    try:
        if suffix not in (TEXT_SUFFIXES if is_packed else SUFFIXES):
            readable = f"読めるのは {'、'.join(SUFFIXES)}（文字のものは .gz も）です。"
            raise UserError(f"{path} の形式は読めません。{_name_format(path.open('rb').read(64))}{readable}")
        if path.stat().st_size > LARGEST_BYTES:
            raise UserError(f"{path} は大きすぎます（500 MiB まで）。行を分けて保存し直してください。")
        if suffix in BOOK_SUFFIXES:
            return _open_book(path, explicit, sheet)
        if suffix == ".parquet":
            return _open_parquet(path, explicit)
        text, notes = _read_text(path, is_packed)
    except OSError as error:
        raise UserError(f"{path} を読めません（{error}）。場所とアクセス権を確かめてください。") from error
    if suffix in (".csv", ".tsv"):
        return _open_table(path, text, "\t" if suffix == ".tsv" else "", explicit, notes)
    return _open_json(path, text, suffix != ".json", notes)


def _name_format(head: bytes) -> str:
    return next((text for pattern, text in NOT_ROWS.items() if re.match(pattern, head, re.I)), "")


def _unreadable(path, reason) -> UserError:
    advice = "ファイルが壊れていないか、拡張子が中身と合っているかを確かめてください。"
    return UserError(f"{path} を読み取れません。理由：{reason}\n{advice}")


def _check_growth(path: Path, size: int) -> None:
    """Refuse what a packed file would grow to, before it does."""
    allowed = min(max(LARGEST_GROWTH * path.stat().st_size, ALWAYS_ALLOWED_BYTES), LARGEST_BYTES)
    if size > allowed:
        why = f"広げると {allowed / 2**20:,.0f} MiB を超えます"
        raise UserError(f"{path} は{why}。中身を確かめ、行を分けるか、圧縮せずに保存し直してください。")


# --- text ---


def _read_text(path: Path, is_packed: bool) -> tuple[str, list[str]]:
    """Return (the text, what was guessed of its encoding)."""
    content = path.read_bytes()
    if is_packed:
        parts, size = [], 0
        try:
            with gzip.open(path) as file:
                while part := file.read(2**20):
                    parts.append(part)
                    size += len(part)
                    _check_growth(path, size)
        except (OSError, EOFError, zlib.error) as error:
            raise _unreadable(path, error) from error
        content = b"".join(parts)
    if what := _name_format(content[:64]):
        raise UserError(f"{path} の中身は行ではありません。{what}")
    if not (encoding := find_encoding(content)):
        raise UserError(
            f"{path} の文字コードが分かりません（UTF-8 でも、日本語として読める CP932、EUC-JP、ISO-2022-JP、"
            "UTF-16 でもありません）。UTF-8 で保存し直してください。"
        )
    notes = [] if encoding == "utf-8-sig" else [f"文字コードは {encoding} とみて読みました。"]
    return content.decode(encoding), notes


def find_encoding(content: bytes) -> str:
    """Return the encoding that decodes all of `content` into plausible Japanese, or "".

    charset-normalizer was tried: it takes EUC-JP for Korean, and knows no CP932 with ① or 髙 in it.
    """
    candidates = ["cp932", "euc_jp", "euc_jis_2004"]
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32" if _decodes(content, "utf-32") else ""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16" if _decodes(content, "utf-16") else ""
    if re.search(rb"\x1b\$[@B(]", content):
        candidates = ["iso2022_jp", "iso2022_jp_ext", "iso2022_jp_2004"]
    elif 0 in content:  # every comma and line end of UTF-16 holds one, and else at most a broken cell
        candidates = ["utf-16-le", "utf-16-be"]
    elif _decodes(content, "utf-8-sig"):
        return "utf-8-sig"
    rates = {name: _rate_japanese(content[:200_000], name) for name in candidates}
    plausible = sorted((name for name in candidates if rates[name] > 0.1), key=rates.get, reverse=True)
    return next((name for name in (*plausible, "utf-8-sig") if _decodes(content, name)), "")


def _decodes(content: bytes, encoding: str) -> bool:
    try:
        return bool(content.decode(encoding)) or not content
    except UnicodeError:
        return False


def _rate_japanese(content: bytes, encoding: str) -> float:
    """Return the share of kana among the letters beyond ASCII, less what mojibake is full of."""
    letters = re.sub("[\x01-\x7f]", "", content.decode(encoding, "replace"))
    return (len(JAPANESE.findall(letters)) - len(NOT_JAPANESE.findall(letters))) / max(1, len(letters))


# --- tables ---


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
    return _read_table(path, lines, explicit, notes)


def _find_delimiter(text: str, notes: list[str]) -> str:
    """Return the comma, or what divides the first lines where no comma does."""
    head = text[:10_000].splitlines()[:HEADER_SEARCH_ROWS]
    found = max(",\t;|", key=lambda mark: max((line.count(mark) for line in head), default=0))
    if found == "," or "," in "".join(head[:1]):
        return ","
    notes.append(f"列の区切りは {'タブ' if found == chr(9) else found} とみて読みました。")
    return found


def _read_table(path: Path, lines: list, explicit: tuple, notes: list[str]) -> Source:
    """Make records of the rows below the header: the first row with columns of pairs, or else the first."""
    lines = [(number, cells) for number, cells in lines if any(cell is not None for cell in cells)]
    if not lines:
        return Source("行目", [], notes)
    place = next((i for i, line in enumerate(lines[:HEADER_SEARCH_ROWS]) if _is_header(line[1], explicit)), 0)
    number, header = lines[place][0], tuple("" if cell is None else str(cell) for cell in lines[place][1])
    if "" in header:  # what stands under no heading is named by its place, to be told with the unused columns
        full = {i for _, cells in lines[place + 1 :] for i, cell in enumerate(cells) if cell is not None}
        header = tuple(name or (f"{i + 1}列目" if i in full else "") for i, name in enumerate(header))
    used = match_columns(header, explicit)[0].values()
    if double := [show_name(name) for name, count in Counter(header).items() if count > 1 and name in used]:
        raise UserError(f"{path} の見出し {'、'.join(double)} が二つ以上あります。列の名前を変えてください。")
    notes = [*notes, f"{number} 行目を見出しとして読みました。"] if place else notes
    return Source("行目", [(n, _name_cells(header, cells)) for n, cells in lines[place + 1 :]], notes)


def _is_header(cells: list, explicit: tuple) -> bool:
    names = tuple(cell for cell in cells if isinstance(cell, str) and len(cell) < 100)
    return len(names) > 1 and not match_columns(names, explicit)[1]


def _name_cells(header: tuple[str, ...], cells: list) -> dict | str:
    if any(cell is not None for cell in cells[len(header) :]):
        return f"見出しの {len(header)} 列より多くの列があります"
    cells = [*cells, *[None] * (len(header) - len(cells))]
    return {name: cell for name, cell in zip(header, cells, strict=False) if name}


# --- Excel ---


def _open_book(path: Path, explicit: tuple, wanted: str) -> Source:
    """Read the wanted sheet, else the first one that has the columns of pairs, else the first with rows."""
    import openpyxl

    try:
        with zipfile.ZipFile(path) as archive:
            _check_growth(path, sum(item.file_size for item in archive.infolist()))
            book = openpyxl.load_workbook(path, read_only=True, data_only=True)
            names = [sheet.title for sheet in book.worksheets]
            if wanted and wanted not in names:
                there = "、".join(map(show_name, names))
                raise UserError(f"{path} にシート「{show_name(wanted)}」がありません。あるシート：{there}")
            tables = {
                sheet.title: _read_sheet(path, sheet, archive, explicit)
                for sheet in book.worksheets
                if wanted in ("", sheet.title)
            }
            book.close()
    except (UserError, OSError):
        raise
    except Exception as error:  # openpyxl lets through whatever its parsers raise for a damaged file
        raise _unreadable(path, error) from error
    taken = max(tables, key=lambda name: _rate_table(tables[name], explicit))
    others = "、".join(show_name(name) for name in names if name != taken)
    said = f"シート「{show_name(taken)}」を読みました（読まないシート：{others}）。"
    said += "ほかのシートは、ファイル名:シート名 と書いて選べます。"
    return tables[taken]._replace(notes=[said, *tables[taken].notes] if others else tables[taken].notes)


def _rate_table(table: Source, explicit: tuple) -> tuple[bool, bool]:
    first = next((record for _, record in table.records if isinstance(record, dict)), {})
    return bool(first) and not match_columns(tuple(first), explicit)[1], bool(table.records)


def _read_sheet(path: Path, sheet, archive: zipfile.ZipFile, explicit: tuple) -> Source:
    """Read one sheet; what stands in merged cells counts for each of their rows."""
    from tqdm.auto import tqdm

    sheet.reset_dimensions()  # what the file says of its size may be wrong
    lines, widest = {}, 1
    rows = tqdm(sheet.iter_rows(values_only=True), desc="Excel の読み込み", unit="行", delay=3)
    for number, cells in enumerate(rows, 1):
        widest = max(widest, len(cells))
        if number * widest > LARGEST_SHEET_CELLS:
            raise UserError(
                f"{path} のシート「{show_name(sheet.title)}」は、{number} 行、{widest} 列まで使われています。"
                "離れたところにあるセルを消すか、行を分けて保存し直してください。"
            )
        if any(cell is not None for cell in cells):
            lines[number] = [_read_cell(cell) for cell in cells]
    for cells in lines.values():  # a note beside the table has no heading, and is no error
        cells.extend([None] * (widest - len(cells)))
    xml = archive.read(
        sheet._worksheet_path.lstrip("/")
    )  # the reader for large files drops the merged ranges
    filled = _fill_merged(lines, re.findall(rb'<mergeCell ref="([A-Z]+)(\d+):([A-Z]+)(\d+)"', xml))
    notes = [f"セルの結合を解いて、{filled:,} 個のセルに同じ値を入れました。"] if filled else []
    return _read_table(path, list(lines.items()), explicit, notes)


def _fill_merged(lines: dict[int, list], ranges: list[tuple[bytes, ...]]) -> int:
    """Copy the top cell of each range of one column into the rows below it; return how many were filled."""
    from openpyxl.utils import column_index_from_string

    filled = set()
    for first, top, last, bottom in ranges:
        column, rows = column_index_from_string(first.decode()) - 1, range(int(top), int(bottom) + 1)
        head = lines.get(rows[0], []) if first == last and (column, rows[0]) not in filled else []
        for number in rows[1 : max(lines, default=0)] if column < len(head) else ():
            if cells := lines.get(number):
                cells[column] = head[column]
                filled.add((column, number))
    return len(filled)


def _read_cell(value) -> str | None:
    """Return a cell as text: 3.0 is 3, a date is 2025-04-01, an error value is empty."""
    if isinstance(value, float):
        return NumberText(f"{value:.15g}")
    if isinstance(value, date | time):
        return NumberText(str(value).removesuffix(" 00:00:00"))
    if isinstance(value, str):
        return value if value and value not in ERROR_VALUES else None
    return None if value is None else NumberText(value)


# --- JSON ---


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
    if len(values) == 1:
        rows, how = _find_rows(values[0][1])
        return Source("件目", [(i, _check_object(row)) for i, row in enumerate(rows, 1)], notes + how)
    if values:
        return Source("行目", [(number, _check_object(value)) for number, value in values], notes)
    numbered = enumerate(io.StringIO(text, newline=None), 1)
    return Source("行目", [(number, _parse(line)) for number, line in numbered if line.strip()], notes)


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
        value, place = decoder.raw_decode(text, start.start())
        values.append((line, value))
        line += text.count("\n", start.start(), place)
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
    names, columns = list(document), list(document.values())
    if _is_list_of(document.get("columns"), str) and _is_list_of(document.get("data"), list):
        return [dict(zip(document["columns"], row, strict=False)) for row in document["data"]], BY_COLUMNS
    if all(isinstance(column, dict) and column and all(map(str.isdigit, column)) for column in columns):
        columns = [list(column.values()) for column in columns]  # as pandas writes it
    is_table = all(
        isinstance(c, list) and len(c) == len(columns[0]) and not _is_list_of(c, dict) for c in columns
    )
    if is_table and columns:
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)], BY_COLUMNS
    lists = [name for name in names if _is_list_of(document[name], dict)]
    if lists and match_columns(tuple(names))[1]:
        name = next((name for name in ("rows", "data", "train") if name in lists), lists[0])
        rows = [row["row"] if isinstance(row.get("row"), dict) else row for row in document[name]]
        others = "、".join(show_name(other) for other in lists if other != name)
        return rows, [
            f"{show_name(name)} の中の行を読みました。" + (f"読まないもの：{others}" if others else "")
        ]
    return [document], []


def _is_list_of(value, kind) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, kind) for item in value)


# --- Parquet and data sets ---


def _open_parquet(path: Path, explicit: tuple) -> Source:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    records, size = [], 0
    try:
        file = ParquetFile(path)
        names = tuple(file.schema_arrow.names)
        # few rows at once: a file of 1 kB can hold one text of 10 MB a thousand times
        for batch in file.iter_batches(batch_size=16, columns=_find_useful(names, explicit)):
            rows = (
                batch.to_pylist()
            )  # a column of a dictionary's numbers is small, and what it stands for is not
            texts = sum(len(value) for row in rows for value in row.values() if isinstance(value, str))
            size += max(batch.nbytes, texts)
            _check_growth(path, size)
            records += rows
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise _unreadable(path, error) from error
    return Source("件目", list(enumerate(records, 1)), [], names)


def _find_useful(names: tuple[str, ...], explicit: tuple) -> list[str]:
    """Only the columns that rows are made of, so that pictures stay unread; all where some are missing."""
    found, trouble = match_columns(names, explicit)
    return list(names) if trouble or "rejected" not in found else list(found.values())


def _open_folder(folder: Path, split: str, explicit: tuple) -> Source:
    from datasets import DatasetDict, load_from_disk

    if not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        files = [file for file in (*folder.glob("*"), *folder.glob("*/*")) if file.suffix.lower() in SUFFIXES]
        files = sorted(show_name(file.relative_to(folder)) for file in files)
        inside = f"中のファイル（{'、'.join(files[:10])}）のどれか" if files else "データのファイル"
        what = f"{folder} はフォルダで、save_to_disk で保存したデータセットでもありません"
        raise UserError(f"{what}。{inside}を指定してください。")
    try:
        data = load_from_disk(str(folder))
        if isinstance(data, DatasetDict):
            if split not in data:
                there = "、".join(map(show_name, data))
                raise UserError(f"{folder} に {show_name(split)} という split はありません（{there}）。")
            data = data[split]
        return _read_dataset(data, explicit)
    except UserError:
        raise
    except Exception as error:  # datasets passes on whatever its readers raise for damaged files
        raise _unreadable(folder, error) from error


def _open_hub(name: str, configuration: str, split: str, explicit: tuple) -> Source:
    from datasets import load_dataset

    try:
        return _read_dataset(load_dataset(name, *filter(None, [configuration]), split=split), explicit)
    except Exception as error:  # datasets passes on whatever the network and the file readers raise
        if isinstance(error, ValueError) and re.search("split|[Cc]onfig", str(error)):
            choice = f"{name}:split か {name}:設定名:split と書いて選んでください"
            raise UserError(f"{name} の {show_name(split)} は読めません。{choice}。理由：{error}") from error
        raise UserError(explain_hub_error(error, f"データセット {name}")) from error


def _read_dataset(data, explicit: tuple) -> Source:
    data.data.validate(full=True)  # a damaged file would end the process, not raise
    names = tuple(data.column_names)
    return Source("件目", list(enumerate(data.select_columns(_find_useful(names, explicit)), 1)), [], names)
