"""Collects the rows of a run, generated ones or the user's own, and says what is wrong with which of them."""

import json
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from dpo_helpers.data.generate import generate_preferences
from dpo_helpers.data.row_checks import (
    CHOICE_NAME,
    OWN_KEYS,
    REASONS,
    BadRow,
    fold_name,
    match_columns,
    normalize_record,
    open_task,
    read_mapping,
    show_name,
)
from dpo_helpers.data.row_sources import open_source
from dpo_helpers.data.tokens import (
    RowTokens,
    build_token_report,
    describe_token_report,
    drop_unusable,
    measure_rows,
)
from dpo_helpers.errors import UserError
from dpo_helpers.files import write_rows

TOKEN_BATCH = 5_000  # rows whose token ids are held at once


class RowProblem(NamedTuple):
    """What is wrong with one row: where it stands, a key of REASONS, and the Japanese sentence."""

    position: int
    reason: str
    message: str


class CheckedRows(NamedTuple):
    """What a source gave: rows and problems together are its records."""

    rows: list[dict]
    problems: list[RowProblem]
    notes: list[str]  # what was guessed, changed or not used, counted
    unit: str  # how a position is called: 行目 or 件目
    measured: list[RowTokens]  # of all readable rows, where a tokenizer was given


class RowErrors(UserError):
    """Some rows are wrong; `problems` holds all of them, the text the first 20."""

    def __init__(self, text: str, problems: list[RowProblem]):
        super().__init__(text)
        self.problems = problems


def check_rows(
    source, columns: dict | None = None, tokenizer=None, max_length: int = 128, split: str = "train"
) -> CheckedRows:
    """Read a file, a saved data set or a Hub data set (see open_source) and judge every row of it.

    `columns` maps names of columns to prompt, chosen, rejected or another role of ALIASES. Prompts are put
    into the project's template, answers are stripped of outer white space, conversations become text. With a
    tokenizer, rows that leave nothing to learn within `max_length` tokens count as too long. Of rows that
    repeat or contradict earlier ones, the later is the problem. UserError: the source cannot be read.
    """
    explicit = read_mapping(columns)
    opened = open_source(source, explicit, split)
    if not opened.records:
        raise UserError(f"{show_name(source)} に行がありません。ファイルの中身を確かめてください。")
    changes, numbered, problems = Counter(), [], []
    for position, record in _show_progress(opened.records, "行の確認"):
        try:
            numbered.append((position, normalize_record(record, explicit, changes)))
        except BadRow as bad:
            problems.append(RowProblem(position, *bad.args))
    numbered, measured, too_long = _leave_out_too_long(numbered, tokenizer, max_length)
    conflicts = find_conflicts(numbered, opened.unit)
    wrong = {problem.position for problem in conflicts}
    rows = [row for position, row in numbered if position not in wrong]
    notes = opened.notes + _note_columns(opened, explicit, _keep_own_columns(rows))
    notes += [f"{sentence}（{count:,} 行）" for sentence, count in changes.items()]
    return CheckedRows(rows, sorted(problems + too_long + conflicts), notes, opened.unit, measured)


def _show_progress(items: list, what: str):
    from tqdm.auto import tqdm

    return tqdm(items, desc=what, unit="行", disable=len(items) < 20_000)


def _keep_own_columns(rows: list[dict]) -> bool:
    """Take our own columns out of rows that were not all made by us; return whether they stay."""
    stays = bool(rows) and all("concept" in row for row in rows)
    for row in rows if not stays else ():
        for key in OWN_KEYS:
            row.pop(key, None)
    return stays


def _note_columns(opened, explicit: tuple, are_ours: bool) -> list[str]:
    """Name the columns that no row is made of."""
    records = [open_task(record) for _, record in opened.records if isinstance(record, dict)]
    shapes = {tuple(record) for record in records}
    found = [match_columns(shape, explicit)[0] for shape in shapes]
    used = {name for roles in found for role, name in roles.items() if are_ours or role not in OWN_KEYS}
    if any("first" in roles for roles in found):
        used |= {name for shape in shapes for name in shape if CHOICE_NAME.search(fold_name(name))}
    names = dict.fromkeys(name for shape in [opened.names, *shapes] for name in shape)
    unused = [show_name(name) for name in names if name not in used]
    more = f" ほか {len(unused) - 20}" if len(unused) > 20 else ""
    return [f"使わない列：{'、'.join(unused[:20])}{more}"] if unused else []


def _leave_out_too_long(numbered: list, tokenizer, max_length: int) -> tuple[list, list, list[RowProblem]]:
    """Return (numbered rows with something to learn, the RowTokens of all, the problems)."""
    if tokenizer is None:
        return numbered, [], []
    measured = []
    for start in _show_progress(range(0, len(numbered), TOKEN_BATCH), "トークン数"):
        batch = [row for _, row in numbered[start : start + TOKEN_BATCH]]
        measured += measure_rows(batch, tokenizer, max_length)
    kept, problems = [], []
    for (position, row), tokens in zip(numbered, measured, strict=True):
        if tokens.usable:
            kept.append((position, row))
        else:
            text = (
                f"長すぎて、{max_length} トークンで切ると学べるところが残りません（{tokens.tokens} トークン）"
            )
            problems.append(RowProblem(position, "too_long", text))
    return kept, measured, problems


def find_conflicts(numbered: list[tuple[int, dict]], unit: str = "行目") -> list[RowProblem]:
    """Return the rows that repeat an earlier one, reverse it, or close a circle of preferences.

    All that is compared stands under one whole prompt, system and earlier turns included. Rankings that are
    written out as pairs (A over B, A over C, B over C) are no conflict.
    """
    pairs: dict[tuple, int] = {}
    better: dict[str, dict] = {}  # {prompt: {rejected: {chosen: position}}}
    problems = []
    for position, row in numbered:
        prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
        if (other := pairs.get((prompt, chosen, rejected))) is not None:
            problems.append(RowProblem(position, "duplicate", f"{other}{unit}と同じ行です"))
        elif (other := pairs.get((prompt, rejected, chosen))) is not None:
            text = f"{other}{unit}と、同じ質問の chosen と rejected が入れ替わっているようです"
            problems.append(RowProblem(position, "swapped", text))
        else:
            pairs[prompt, chosen, rejected] = position
            better.setdefault(prompt, {}).setdefault(rejected, {})[chosen] = position
    return problems + [problem for graph in better.values() for problem in _break_circles(graph, unit)]


def _break_circles(graph: dict[str, dict[str, int]], unit: str) -> list[RowProblem]:
    """Take the latest row out of each circle of {rejected: {chosen: position}} until none is left."""
    from graphlib import CycleError, TopologicalSorter

    problems = []
    while len(graph) > 2:
        try:
            TopologicalSorter(graph).prepare()
            break
        except CycleError as error:
            circle = error.args[1]  # each stands before the one that it is better than; the first is the last
            edges = {graph[worse][better]: (worse, better) for better, worse in pairwise(circle)}
            latest = max(edges)
            others = "、".join(f"{position}{unit}" for position in sorted(edges)[:-1][:5])
            worse, better = edges[latest]
            del graph[worse][better]
            text = f"{others}と合わせると、同じ質問の回答の順位が一回りして決まりません"
            problems.append(RowProblem(latest, "swapped", text))
    return problems


def load_preferences(
    source,
    columns: dict | None = None,
    on_error: str = "raise",
    dropped_file=None,
    tokenizer=None,
    max_length: int = 128,
    split: str = "train",
) -> list[dict]:
    """Return the good rows of check_rows, whose arguments these are.

    Raises RowErrors with every wrong row, or, with `on_error="drop"`, leaves them out and writes them to
    `dropped_file` (JSON Lines) if given; no row left is an error either way.
    """
    checked = check_rows(source, columns, tokenizer, max_length, split)
    return settle_problems(checked, str(source), on_error, dropped_file)


def settle_problems(checked: CheckedRows, source: str, on_error: str, dropped_file=None) -> list[dict]:
    """Return the rows, or raise RowErrors where there are problems that `on_error` does not drop."""
    if on_error not in ("raise", "drop"):
        raise UserError('on_error は "raise" か "drop" にしてください。')
    if dropped_file is not None and on_error == "drop":
        _write_lines(dropped_file, _list_problems(checked))
    if checked.problems and (on_error == "raise" or not checked.rows):
        raise RowErrors(describe_problems(checked, source), checked.problems)
    return checked.rows


def _list_problems(checked: CheckedRows) -> list[dict]:
    return [
        {"place": f"{p.position}{checked.unit}", "reason": p.reason, "message": p.message}
        for p in checked.problems
    ]


def _write_lines(path, rows: list[dict]) -> None:
    try:
        write_rows(path, rows)
    except OSError as error:
        raise UserError(f"{path} に書き込めません（{error}）。書き込める場所を指定してください。") from error


def describe_problems(checked: CheckedRows, source: str) -> str:
    """Say which rows are wrong: the count, the first 20, how many for each reason, and what to do."""
    problems, total = checked.problems, len(checked.rows) + len(checked.problems)
    lines = [f"  {item.position}{checked.unit}: {item.message}" for item in problems[:20]]
    if len(problems) > 20:
        lines.append(f"  ほか {len(problems) - 20:,} 行")
    if len(problems) == total > 1 and len({item.message for item in problems}) == 1:
        lines = [f"  すべての行: {problems[0].message}"]
    reasons = "、".join(f"{row['理由']} {row['行数']:,}" for row in count_problems(problems))
    lines.append(
        "元のデータを直すか、これらの行を除いてください（ノートブックでは DROP_BAD_ROWS をオンに、"
        "ターミナルでは --on-error drop）。"
    )
    head = f"{show_name(source)} の {total:,} 行のうち {len(problems):,} 行に誤りがあります（{reasons}）。"
    return "\n".join([head, *lines])


def count_problems(problems: list[RowProblem]) -> list[dict]:
    """Return how many rows were left out for each reason, as rows of a Japanese table."""
    counts = Counter(item.reason for item in problems)
    return [{"理由": text, "行数": counts[reason]} for reason, text in REASONS.items() if counts[reason]]


def collect_rows(
    config, tokenizer, source: str = "", on_error: str = "raise", folder=None, columns: dict | None = None
) -> list[dict]:
    """Return the rows of a run, generated or all of `source`, and tell what was left out, changed or guessed.

    With `on_error="drop"` the wrong rows of `source` are listed in folder/dropped_rows.jsonl.
    """
    if not source:
        rows = generate_preferences(config.num_samples, config.seed, config.held_out_fraction)
        rows, dropped = drop_unusable(rows, tokenizer, config.max_length)
        if dropped:
            print(
                f"{config.max_length} トークンで切ると学べない {len(dropped):,} 行を除きました。"
                "MAX_LENGTH を増やすと使えます。"
            )
        return rows
    listed = Path(folder) / "dropped_rows.jsonl" if folder else None
    checked = check_rows(source, columns, tokenizer, config.max_length)
    print("\n".join([f"{show_name(source)}：{len(checked.rows):,} 行を使います。", *checked.notes]))
    rows = settle_problems(checked, source, on_error, listed)
    if checked.problems:
        reasons = "、".join(f"{line['理由']} {line['行数']:,}" for line in count_problems(checked.problems))
        print(
            f"{len(checked.problems):,} 行を除きました（{reasons}）。" + (f"一覧：{listed}" if listed else "")
        )
    return rows


def parse_columns(pairs: list[str]) -> dict[str, str]:
    """Turn the terminal's 列名=役割 words into the mapping that `columns` takes."""
    if wrong := [show_name(pair) for pair in pairs if "=" not in pair]:
        raise UserError(f"--column は 列名=役割 の形で書いてください（誤り：{'、'.join(wrong)}）。")
    return dict(pair.rsplit("=", 1) for pair in pairs)


def run_data(arguments, load_tokenizer) -> int:
    """Generate or check rows as the options say; return 0, or 1 for row errors (told on standard error).
    UserError: unreadable.
    """

    if (
        not (arguments.check or arguments.output or arguments.tokenizer)
        or min(arguments.count, arguments.max_length) < 1
    ):
        raise UserError(
            "--output（書き込み先）、--check（検査）、--tokenizer（トークン数）のどれかと、"
            "1 以上の数を指定してください。"
        )
    tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else None
    if arguments.check:
        columns = parse_columns(arguments.column)
        checked = check_rows(arguments.check, columns, tokenizer, arguments.max_length)
        print("\n".join(checked.notes), file=sys.stderr)
        if checked.problems:
            print(f"⚠️ {describe_problems(checked, arguments.check)}", file=sys.stderr)
        if arguments.dropped_file and arguments.on_error == "drop":
            _write_lines(arguments.dropped_file, _list_problems(checked))
    else:
        rows = generate_preferences(arguments.count, arguments.seed)
        measured = measure_rows(rows, tokenizer, arguments.max_length) if tokenizer else []
        checked = CheckedRows(rows, [], [], "行目", measured)
    rows, problems, measured = checked.rows, checked.problems, checked.measured
    failed = bool(problems) and (arguments.on_error == "raise" or not rows)
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
            print(f"{line['項目']}：{line['値']}（{line['読み方']}）")
    return int(failed)
