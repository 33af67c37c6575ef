"""Files of any bytes, encodings, shapes and sizes: rows or our own messages come out, and no row is lost."""

import gzip
import json
import os
import random
import resource
import time
from pathlib import Path

import openpyxl
import pyarrow
from pyarrow import parquet
from test_row_cases import NO_PAIRS, SHAPES

from dpo_helpers.data.own_rows import check_rows, describe_problems
from dpo_helpers.data.row_checks import OWN_KEYS
from dpo_helpers.errors import UserError

FILES = int(os.environ.get("FUZZ_FILES", "1000"))  # 10,000 were tried once
ENCODINGS = (
    "utf-8",
    "utf-8-sig",
    "utf-16",
    "utf-16-le",
    "utf-16-be",
    "utf-32",
    "cp932",
    "euc_jp",
    "iso2022_jp",
)
SUFFIXES = (
    ".jsonl",
    ".json",
    ".csv",
    ".tsv",
    ".jsonl.gz",
    ".csv.gz",
    ".xlsx",
    ".parquet",
    ".ndjson",
    ".saved",
)
ODD_TEXTS = (
    "",
    " ",
    "質問:",
    "\0",
    "\ud83d",
    "\u2028",
    "\ufeff",
    "\x1b[31m",
    "\u202e",
    "<script>",
    "a,b\n",
    '"',
    "NaN",
)
STRETCHES = (
    b"\n",
    b'"',
    b",",
    b"\r",
    b"[",
    b"]",
    b"{",
    b"}",
    b"\\ud800",
    b"\0",
    b"\xff",
    b"\x1b$B",
    b"'",
    b"PK",
)
OURS = {"prompt": "p", "chosen": "c", "rejected": "r", **{key: ["x"] for key in OWN_KEYS}}
BASE = [OURS, *(record for record, *_ in (*SHAPES.values(), *NO_PAIRS.values()))]


def draw_value(draw: random.Random, value):
    """Return a value, or something else of the kind that a careless export puts into its place."""
    fate = draw.random()
    if fate < 0.9:
        return value
    text = draw.choice(ODD_TEXTS)
    other = (
        None,
        text,
        3,
        -1.5,
        float("nan"),
        True,
        [],
        {},
        [text],
        {"role": text},
        [[value]],
        str(value),
        "長い" * 60_000,
    )
    return draw.choice(other)


def draw_records(draw: random.Random) -> list[dict]:
    """Return one to thirty records of one shape, or of any."""
    shapes = [draw.choice(BASE)] if draw.random() < 0.7 else BASE
    records = []
    for i in range(draw.choice((1, 2, 5, 30))):
        record = {name: draw_value(draw, value) for name, value in draw.choice(shapes).items()}
        if draw.random() < 0.1:
            record[draw.choice(("x\ny", "", "\x1b[1m", "\ud800", "備考", *OWN_KEYS))] = draw_value(
                draw, "はい"
            )
        records.append(
            {name: f"{i}{v}" if isinstance(v, str) and i % 3 == 0 else v for name, v in record.items()}
        )
    return records


def write_file(draw: random.Random, path, records: list[dict]) -> bool:
    """Write records as the name says; return whether every one of them is a record of the file."""
    names, suffix = list(dict.fromkeys(name for record in records for name in record)), "".join(path.suffixes)
    cells = [[record.get(name) for name in names] for record in records]
    if suffix == ".xlsx":
        book = openpyxl.Workbook()
        for line in [names, *cells]:
            texts = ["".join(c for c in str(cell) if c.isprintable())[:30_000] for cell in line]
            book.active.append([None if text in ("None", "") else text for text in texts])
        book.save(path)
        return False
    if suffix in (".parquet", ".arrow"):
        columns = [
            [json.dumps(cell) if cell is not None else None for cell in column]
            for column in zip(*cells, strict=True)
        ]
        table = pyarrow.table(columns, names=[name.encode(errors="replace").decode() for name in names])
        if suffix == ".parquet":
            parquet.write_table(table, path)
        else:
            path.parent.mkdir(exist_ok=True)
            with pyarrow.ipc.new_stream(str(path), table.schema) as stream:
                stream.write_table(table)
        return True
    if "json" in suffix:
        ascii_only = draw.random() < 0.3
        texts = [json.dumps(record, ensure_ascii=ascii_only or draw.random() < 0.1) for record in records]
        text = "\n".join(texts) if suffix != ".json" else f"[{','.join(texts)}]"
    else:
        mark = "\t" if "tsv" in suffix else draw.choice(",,,;")
        quoted = [
            ['"' + str("" if c is None else c).replace('"', '""') + '"' for c in line]
            for line in [names, *cells]
        ]
        text = "\r\n".join(map(mark.join, quoted))
    encoding = draw.choice(ENCODINGS) if draw.random() < 0.4 else "utf-8"
    content = text.encode(encoding, "replace")
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    return "json" in suffix and encoding == "utf-8"


def make_saved_folder(folder: Path) -> Path:
    """Make the folder of a saved data set and return the file for its table."""
    folder.mkdir(exist_ok=True)
    state = dict.fromkeys(("_format_columns", "_format_type", "_split"))
    state |= {"_data_files": [{"filename": "data.arrow"}], "_fingerprint": "1", "_format_kwargs": {}}
    (folder / "state.json").write_text(json.dumps(state | {"_output_all_columns": False}))
    (folder / "dataset_info.json").write_text("{}")
    return folder / "data.arrow"


def damage(draw: random.Random, content: bytes) -> bytes:
    """Replace, insert or cut stretches of bytes, among them those that the formats are made of."""
    content = bytearray(content)
    for _ in range(draw.randint(1, 5)):
        start = draw.randrange(len(content) + 1)
        stretch = draw.choice([*STRETCHES, draw.randbytes(draw.randint(0, 8))])
        content[start : start + draw.choice((0, 0, 1, 2, 30, 300))] = stretch * draw.choice((1, 1, 1, 200))
    return bytes(content)


def test_any_file_gives_rows_or_our_own_messages_and_no_row_is_lost(tmp_path):
    kept = refused = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(FILES):
        draw = random.Random(seed)
        source = path = tmp_path / f"rows{draw.choice(SUFFIXES)}"
        records = draw_records(draw)
        if path.suffix == ".saved":
            path = make_saved_folder(source)
        is_whole = write_file(draw, path, records)
        if draw.random() < 0.5:
            path.write_bytes(damage(draw, path.read_bytes()))
            is_whole = False
        start = time.process_time()
        try:
            checked = check_rows(source)
        except UserError as error:
            str(error).encode()
            assert not is_whole, (seed, str(error))
            refused += 1
            continue
        finally:
            assert time.process_time() - start < 10, seed
        kept += len(checked.rows)
        told = describe_problems(checked, path.name) + "".join(checked.notes)
        assert "\x1b" not in told.encode().decode()
        if is_whole:
            assert len(checked.rows) + len(checked.problems) == len(records), seed
        for row in checked.rows:
            assert set(row) == {"prompt", "chosen", "rejected"} and row["chosen"] != row["rejected"]
            assert all(text.strip() for text in row.values()) and row["prompt"].endswith("\n回答:\n")
            assert "\0" not in "".join(row.values()).encode().decode()
    assert kept > FILES and refused > FILES / 20  # the files are neither all good nor all bad
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024
