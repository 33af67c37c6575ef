"""Validates the user's own preference rows and says row by row what is wrong with them; row_sources opens
files, row_checks judges one row.
"""

import json
import sys
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dpo_helpers.data.row_checks import REASONS, BadRow, normalize_record
from dpo_helpers.data.row_sources import EXTRA_KEYS, KEYS, open_source
from dpo_helpers.errors import UserError

BATCH_ROWS = 10_000


class RowProblem(NamedTuple):
    """What is wrong with one row: where it stands, a key of REASONS, and the Japanese sentence."""

    position: int
    reason: str
    message: str


class RowErrors(UserError):
    """Some rows are wrong; `problems` holds all of them, the text the first 20."""

    def __init__(self, text: str, problems: list[RowProblem]):
        super().__init__(text)
        self.problems = problems


class PreferenceRows(Sequence):
    """A read-only sequence of row dicts over Arrow batches, because a million rows as a list of dicts need 1
    GiB.

    `problems` are the rows that were left out, `unit` is how their position is called, and `measured` the
    RowTokens of all readable rows where a tokenizer was given. A slice is a list.
    """

    def __init__(self, batches, problems: list[RowProblem], unit: str, measured: list):
        import pyarrow

        self.table = pyarrow.Table.from_batches(batches, _schema())
        self.problems, self.unit, self.measured = problems, unit, measured

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return _present(self.table.slice(index % len(self), 1).to_pylist()[0])

    def __iter__(self):
        for batch in self.table.to_batches():
            yield from map(_present, batch.to_pylist())


def _present(row: dict) -> dict:
    return {key: value for key, value in row.items() if value is not None}


def _schema():
    import pyarrow

    return pyarrow.schema([(key, pyarrow.large_string()) for key in KEYS + EXTRA_KEYS])


def load_preferences(
    source,
    columns: dict | None = None,
    on_error: str = "raise",
    dropped_file=None,
    tokenizer=None,
    max_length: int = 128,
    split="train",
) -> PreferenceRows:
    """Return the valid rows of a CSV, TSV, JSON, JSONL, Parquet or Excel file, or of a Hub data set's
    `split`.

    `columns` maps prompt, chosen, rejected to the file's own names where they are not among ALIASES. Prompts
    are put into the project's template, answers are stripped of outer white space, conversations become text.
    With a tokenizer, rows that leave nothing to learn within `max_length` tokens count as too long. Of rows
    that repeat or contradict an earlier one, the later is reported. Raises RowErrors with every wrong row,
    or, with `on_error="drop"`, leaves them out and writes them to `dropped_file` (JSON Lines) if given;
    raises UserError when the source cannot be read or no row is left.
    """
    columns = columns or {}
    if on_error not in ("raise", "drop") or not set(columns) <= set(KEYS + EXTRA_KEYS):
        raise UserError(
            f'on_error は "raise" か "drop"、columns は {", ".join(KEYS)} から列名への対応にしてください。'
        )
    try:
        unit, total, records = open_source(source, columns, split)
        rows = _collect(records, unit, total, tuple(columns.items()), tokenizer, max_length)
    except OSError as error:
        raise UserError(f"{source} を読めません（{error}）。場所とアクセス権を確かめてください。") from error
    if dropped_file is not None and on_error == "drop":
        _write_lines(
            dropped_file,
            (
                {"place": f"{p.position}{unit}", "reason": p.reason, "message": p.message}
                for p in rows.problems
            ),
        )
    if not rows and not rows.problems:
        raise UserError(f"{source} に行がありません。ファイルの中身を確かめてください。")
    if rows.problems and (on_error == "raise" or not rows):
        raise RowErrors(describe_problems(rows, str(source)), rows.problems)
    return rows


def describe_problems(rows: PreferenceRows, source: str) -> str:
    """Say in Japanese which rows are wrong: the count, the first 20, how many for each reason, and what to
    do.
    """
    bad, total = len(rows.problems), len(rows) + len(rows.problems)
    lines = [f"  {item.position}{rows.unit}: {item.message}" for item in rows.problems[:20]]
    if bad > 20:
        lines.append(f"  ほか {bad - 20:,} 行")
    if bad == total > 1 and len({item.message for item in rows.problems}) == 1:
        lines = [f"  すべての行: {rows.problems[0].message}"]
    reasons = "、".join(f"{row['理由']} {row['行数']:,}" for row in count_problems(rows))
    lines.append(
        "元のデータを直すか、これらの行を除いてください（ノートブックでは DROP_BAD_ROWS "
        "をオンに、ターミナルでは --on-error drop）。"
    )
    if any(item.reason == "missing" for item in rows.problems):
        lines.append(
            "列の名前を prompt、chosen、rejected（または 質問、良い回答、悪い回答）に直すと読めます。"
        )
    return f"{source} の {total:,} 行のうち {bad:,} 行に誤りがあります（{reasons}）。\n" + "\n".join(lines)


def count_problems(rows: PreferenceRows) -> list[dict]:
    """Return how many rows were left out for each reason, as rows of a Japanese table."""
    counts = Counter(item.reason for item in rows.problems)
    return [{"理由": text, "行数": counts[reason]} for reason, text in REASONS.items() if counts[reason]]


def _write_lines(path, entries) -> None:
    """Write dicts as JSON Lines one by one, so that a million rows are never one text."""
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    except OSError as error:
        raise UserError(f"{path} に書き込めません（{error}）。書き込める場所を指定してください。") from error


def _collect(records, unit: str, total: int, explicit: tuple, tokenizer, max_length: int) -> PreferenceRows:
    """Check every record by itself, then against the earlier ones, and keep the good rows as Arrow
    batches.
    """
    import pyarrow
    from tqdm.auto import tqdm

    batches, problems, measured, waiting = [], [], [], []
    positions, chosen_keys, rejected_keys = array("q"), array("q"), array("q")

    def flush():
        if tokenizer is not None:
            measured.extend(_leave_out_too_long(waiting, tokenizer, max_length, problems))
        for position, row in waiting:
            positions.append(position)
            chosen_keys.append(
                hash((row["prompt"], row["chosen"]))
            )  # 64 bits: two of a million rows collide once in 10^7 files
            rejected_keys.append(hash((row["prompt"], row["rejected"])))
        batches.append(pyarrow.RecordBatch.from_pylist([row for _, row in waiting], schema=_schema()))
        waiting.clear()

    for position, record in tqdm(records, total=total, desc="行の確認", unit="行", disable=total < 20_000):
        try:
            waiting.append((position, normalize_record(record, explicit)))
        except BadRow as bad:
            problems.append(RowProblem(position, *bad.args))
        if len(waiting) == BATCH_ROWS:
            flush()
    flush()
    repeats = _find_repeats(chosen_keys, rejected_keys)
    for index, (reason, other) in repeats.items():
        what = (
            "と同じ行です"
            if reason == "duplicate"
            else "と、同じ質問の chosen と rejected が入れ替わっているようです"
        )
        problems.append(RowProblem(positions[index], reason, f"{positions[other]}{unit}{what}"))
    start = 0
    for number, batch in enumerate(batches):
        if repeats:
            batches[number] = batch.filter(
                pyarrow.array([start + i not in repeats for i in range(len(batch))], "bool")
            )
        start += len(batch)
    return PreferenceRows(batches, sorted(problems), unit, measured)


def _leave_out_too_long(waiting: list, tokenizer, max_length: int, problems: list[RowProblem]) -> list:
    """Take rows that leave nothing to learn within `max_length` out of `waiting`; return the RowTokens of
    all of them.
    """
    from dpo_helpers.data.tokens import measure_rows

    measured = measure_rows([row for _, row in waiting], tokenizer, max_length)
    for (position, _), row in zip(waiting, measured, strict=True):
        if not row.usable:
            text = f"長すぎて、{max_length} トークンで切ると学べるところが残りません（{row.tokens} トークン）"
            problems.append(RowProblem(position, "too_long", text))
    waiting[:] = [item for item, row in zip(waiting, measured, strict=True) if row.usable]
    return measured


def _find_repeats(chosen_keys: array, rejected_keys: array) -> dict[int, tuple[str, int]]:
    """Return {index of a row: (reason, index of the first row that it repeats or contradicts)}; arrays, as a
    million keys are large.

    Swapped-looking: with the same prompt, a text is chosen in one row and rejected in another.
    """
    import numpy

    if not chosen_keys:
        return {}
    chosen, rejected = (numpy.frombuffer(keys, "int64") for keys in (chosen_keys, rejected_keys))
    both, here = (
        chosen * 1_000_003 + rejected,
        numpy.arange(len(chosen)),
    )  # the sum wraps around, as a hash may

    def first_index(of, among):
        values, first = numpy.unique(among, return_index=True)
        place = numpy.searchsorted(values, of).clip(max=len(values) - 1)
        return numpy.where(values[place] == of, first[place], len(among))

    repeats = {}
    for reason, other in (
        ("duplicate", first_index(both, both)),
        ("swapped", first_index(chosen, rejected)),
        ("swapped", first_index(rejected, chosen)),
    ):
        for index in numpy.flatnonzero(other < here).tolist():
            repeats.setdefault(index, (reason, int(other[index])))
    return repeats


def collect_rows(config, tokenizer, source: str = "", on_error: str = "raise", folder=None) -> Sequence:
    """Return the rows of a run: generated ones, or all of `source`; those that leave nothing to learn are
    left out, and told.

    With `on_error="drop"` the wrong rows of `source` are counted too, and listed in
    folder/dropped_rows.jsonl.
    """
    from dpo_helpers.data.generate import generate_preferences
    from dpo_helpers.data.tokens import drop_unusable

    if not source:
        rows = generate_preferences(config.num_samples, config.seed, config.held_out_fraction)
        rows, dropped = drop_unusable(rows, tokenizer, config.max_length)
        if dropped:
            print(
                f"{config.max_length} トークンで切ると学べるところが残らない {len(dropped):,} "
                "行を除きました。MAX_LENGTH を増やすと使えます。"
            )
        return rows
    listed = Path(folder) / "dropped_rows.jsonl" if folder else None
    rows = load_preferences(
        source, on_error=on_error, dropped_file=listed, tokenizer=tokenizer, max_length=config.max_length
    )
    print(f"{source}：{len(rows):,} 行を使います。")
    if rows.problems:
        reasons = "、".join(f"{line['理由']} {line['行数']:,}" for line in count_problems(rows))
        print(f"{len(rows.problems):,} 行を除きました（{reasons}）。一覧：{listed}")
    return rows


def run_data(arguments, load_tokenizer) -> int:
    """Generate or check rows as the options say; return 0, or 1 for row errors (told on standard error).
    UserError: unreadable.
    """
    from dpo_helpers.data.generate import generate_preferences
    from dpo_helpers.data.tokens import build_token_report, describe_token_report, measure_rows

    if (
        not (arguments.check or arguments.output or arguments.tokenizer)
        or min(arguments.count, arguments.max_length) < 1
    ):
        raise UserError(
            "--output（書き込み先）、--check（検査）、--tokenizer（トークン数）のどれかと、"
            "1 以上の数を指定してください。"
        )
    tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else None
    problems = []
    try:
        if arguments.check:
            columns = {ours: own for own, _, ours in (pair.partition("=") for pair in arguments.column)}
            rows = load_preferences(
                arguments.check, columns, "drop", arguments.dropped_file, tokenizer, arguments.max_length
            )
            problems, measured = rows.problems, rows.measured
            if problems:
                print(f"⚠️ {describe_problems(rows, arguments.check)}", file=sys.stderr)
        else:
            rows = generate_preferences(arguments.count, arguments.seed)
            measured = measure_rows(rows, tokenizer, arguments.max_length) if tokenizer else []
        failed = bool(problems) and arguments.on_error == "raise"
    except RowErrors as error:  # no row is left, whatever on_error says
        print(f"⚠️ {error}", file=sys.stderr)
        rows, problems, measured, failed = [], error.problems, [], True
    report = build_token_report(measured, arguments.max_length) if measured else None
    if arguments.output and not failed:
        _write_lines(arguments.output, rows)
    if arguments.json:
        listed = [item._asdict() for item in problems]
        print(
            json.dumps(
                {"rows_kept": len(rows), "rows_reported": len(listed), "problems": listed, "tokens": report},
                ensure_ascii=False,
            )
        )
    else:
        print(f"使える行：{len(rows):,}、誤りのある行：{len(problems):,}")
        for line in describe_token_report(report) if report else []:
            print(f"{line['項目']}：{line['値']}（{line['見方']}）")
    return int(failed)
