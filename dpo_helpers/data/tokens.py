"""Counts what the installed TRL makes of rows at a given `max_length`: what it cuts, drops or cannot learn
from; it trains nothing.
"""

import math
import re
from datetime import date
from importlib.metadata import version
from typing import NamedTuple

from dpo_helpers.data.prompt import SIDES, make_prompt, strip_question
from dpo_helpers.errors import UserError


class RowTokens(NamedTuple):
    """One row in tokens, and what the installed TRL does with it."""

    tokens: int  # of prompt, longer answer and end mark, before the cut
    answer_tokens: int  # of both answers with their end marks
    answer_characters: int
    cut: bool
    without_answer: bool  # the prompt alone fills max_length
    equal: bool  # the cut leaves two equal answers
    merged: bool  # a token spans prompt and answer
    # neither without an answer nor equal at any TRL from 0.29.1 on, so that all versions train on the same
    # rows
    usable: bool


def format_row(row: dict, has_chat_template: bool) -> dict:
    """Return prompt, chosen and rejected as TRL reads them: text, or messages for a chat template."""
    if not has_chat_template:
        return {name: row[name] for name in ("prompt", *SIDES)}
    answers = {side: [{"role": "assistant", "content": row[side]}] for side in SIDES}
    return {"prompt": [{"role": "user", "content": strip_question(row["prompt"])}], **answers}


def encode_prompts(tokenizer, prompts: list[str]) -> list[list[int]]:
    """Return the token ids of questions, in the tokenizer's chat template or in the project's.

    A question with 質問: in front gives the same ids as without.
    """
    if not (prompts and tokenizer.chat_template):
        return tokenizer([make_prompt(prompt) for prompt in prompts])["input_ids"] if prompts else []
    messages = [[{"role": "user", "content": strip_question(prompt)}] for prompt in prompts]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def encode_answers(tokenizer, pairs: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """Return (ids of the prompt, ids of prompt, answer and end mark) of each (prompt, answer), uncut.

    These are the ids that TRL makes of the same rows.
    """
    end, prompts = tokenizer.eos_token, [prompt for prompt, _ in pairs]
    if tokenizer.chat_template:
        messages = [
            [{"role": "user", "content": strip_question(prompt)}, {"role": "assistant", "content": answer}]
            for prompt, answer in pairs
        ]
        starts = encode_prompts(tokenizer, prompts)
        whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    else:
        starts = tokenizer(prompts)["input_ids"]
        whole = tokenizer([prompt + answer.removesuffix(end) + end for prompt, answer in pairs])["input_ids"]
    return list(zip(starts, whole, strict=True))


PROBE = [{"role": "user", "content": "問"}, {"role": "assistant", "content": "答え"}]
WRITES_DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


def find_end_of_turn(tokenizer) -> int | None:
    """Return the token that the chat template sets behind an answer, where that is a special one, else None.

    It need not be EOS: a model that learns to end its turn with it must be stopped there.
    """
    if not tokenizer.chat_template:
        return tokenizer.eos_token_id
    text = tokenizer.apply_chat_template(PROBE, tokenize=False)
    end = text[text.rindex(PROBE[1]["content"]) + len(PROBE[1]["content"]) :].strip()
    ids = tokenizer(end, add_special_tokens=False)["input_ids"]
    return (
        ids[0] if ids and ids[0] in tokenizer.all_special_ids + list(tokenizer.added_tokens_decoder) else None
    )


def find_opening(tokenizer) -> str:
    """Return what the template's generation prompt opens that no trained answer has, e.g. <think>."""
    if not tokenizer.chat_template:
        return ""
    start = tokenizer.apply_chat_template(PROBE[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(PROBE, tokenize=False)
    return start[_common_length(start, whole[: whole.rindex(PROBE[1]["content"])]) :]


def settle_template(tokenizer) -> list[str]:
    """Make the chat template write the same before an answer in training and in use, on every day.

    Returns in Japanese what was changed. TRL lets an answer begin behind the generation prompt or, from 1.15
    on, where the two diverge: with one text for both there is one beginning, in the saved tokenizer too.
    """
    notes = []
    if formats := {found[1] for found in WRITES_DATE.findall(tokenizer.chat_template or "")}:
        dates = {form: date(2025, 1, 1).strftime(form) for form in sorted(formats)}
        macro = "{%- macro strftime_now(form) -%}{{ " + str(dates) + "[form] }}{%- endmacro -%}"
        tokenizer.chat_template = macro + tokenizer.chat_template
        notes.append("チャットテンプレートが今日の日付を書くので、いつも 2025 年 1 月 1 日にします。")
    if opening := find_opening(tokenizer):
        tokenizer.chat_template = (
            "{%- set text -%}" + tokenizer.chat_template + "{%- endset -%}"
            "{{- text[:-" + str(len(opening)) + "] if add_generation_prompt else text -}}"
        )
        notes.append(
            f"チャットテンプレートが回答の前に開く {opening.strip()} は、学習する回答にないので除きます。"
        )
    return notes


def measure_rows(rows, tokenizer, max_length: int) -> list[RowTokens]:
    """Measure every row as the installed TRL would prepare and cut it at `max_length` tokens."""
    # From 1.15 on TRL lets the answer begin where prompt and answer diverge, which only a merged token moves.
    splits_at_divergence, measured, rows = _trl_is_at_least("1.15"), [], list(rows)
    sides = [encode_answers(tokenizer, [(row["prompt"], row[side]) for row in rows]) for side in SIDES]
    for row, (prompt, chosen), (_, rejected) in zip(rows, *sides, strict=True):
        start = min(_common_length(prompt, chosen), _common_length(prompt, rejected))
        fates = [_find_fate(chosen, rejected, begin, max_length) for begin in (len(prompt), start)]
        tokens, characters = max(len(chosen), len(rejected)), len(row["chosen"]) + len(row["rejected"])
        answer_tokens, merged = len(chosen) + len(rejected) - 2 * len(prompt), start < len(prompt)
        fate, usable = fates[splits_at_divergence], not any(map(any, fates))
        cut = tokens > max_length
        measured.append(RowTokens(tokens, answer_tokens, characters, cut, *fate, merged, usable))
    return measured


def _trl_is_at_least(wanted: str) -> bool:
    from packaging.version import Version

    return Version(version("trl")) >= Version(wanted)


def _common_length(left: list[int], right: list[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )


def _find_fate(chosen, rejected, start: int, max_length: int) -> tuple[bool, bool]:
    """Return (no answer token is left, both answers are equal after the cut) where TRL begins the answers
    at `start`.
    """
    return start >= max_length, start < max_length and chosen[start:max_length] == rejected[start:max_length]


def build_token_report(measured: list[RowTokens], max_length: int) -> dict:
    """Sum up measured rows; `trl_drops`: the installed TRL drops `rows_without_answer`, else it trains on
    them at a loss of ln 2.
    """
    if not measured:
        raise UserError("行がないので、トークン数を調べられません。データを確かめてください。")
    lengths = sorted(row.tokens for row in measured)
    return {
        "rows": len(measured),
        "max_length": max_length,
        "tokens_per_character": round(
            sum(r.answer_tokens for r in measured) / max(1, sum(r.answer_characters for r in measured)), 3
        ),
        "longest": lengths[-1],
        "max_length_for_99_percent": lengths[math.ceil(0.99 * len(lengths)) - 1],
        "rows_cut": sum(row.cut for row in measured),
        "rows_without_answer": sum(row.without_answer for row in measured),
        "trl_drops": _trl_is_at_least("1.9"),
        "rows_equal_after_cut": sum(row.equal for row in measured),
        "rows_merged_at_boundary": sum(row.merged for row in measured),
        "rows_usable": sum(row.usable for row in measured),
    }


def describe_token_report(report: dict) -> list[dict]:
    """Return the report as rows of a Japanese table."""
    fate = "捨てる" if report["trl_drops"] else "答えのないまま学習する"
    lines = {
        "rows": ("行数", "調べた行の数"),
        "tokens_per_character": ("回答 1 文字あたりのトークン数", "大きいほど、入る文が短くなる"),
        "longest": ("最も長い行（トークン）", "質問、長いほうの回答、終端記号の合計"),
        "max_length_for_99_percent": ("99 % の行が入る max_length", f"今の上限は {report['max_length']}"),
        "rows_cut": ("途中で切られる行", "回答の終わりが失われる"),
        "rows_without_answer": ("質問だけで上限に達する行", f"この版の TRL は{fate}"),
        "rows_equal_after_cut": ("切ると二つの回答が同じになる行", "二つの回答に差がなく学習に使えません"),
        "rows_merged_at_boundary": ("質問と回答の境目をまたぐトークンがある行", "0 が望ましい"),
        "rows_usable": ("学習に使える行", "残りは自動で除きます"),
    }
    return [{"項目": name, "値": report[key], "読み方": note} for key, (name, note) in lines.items()]


def plot_token_report(measured: list[RowTokens], max_length: int, path=None):
    """Draw how long the rows are (the longer side, in tokens) beside the limit; save the picture to `path`
    if given.
    """
    import matplotlib.pyplot as plt
    import matplotlib_fontja  # noqa: F401  (imported for its effect: a font with Japanese glyphs)

    figure, axis = plt.subplots(figsize=(7, 3.5), layout="constrained")
    tokens = [row.tokens for row in measured]
    width = max(
        1, (max(tokens) - min(tokens)) // 40
    )  # whole tokens: other bins would hold two lengths here and none there
    axis.hist(tokens, bins=range(min(tokens), max(tokens) + width + 1, width), color="#0072B2")
    axis.axvline(max_length, color="#D55E00", linestyle="--", label=f"上限 max_length = {max_length}")
    axis.set(
        title="行の長さ：線より右の行は途中で切られる",
        xlabel="質問と長いほうの回答の長さ（トークン）",
        ylabel="行数",
    )
    axis.legend(fontsize=9)
    if path is not None:
        figure.savefig(path, dpi=110)
    plt.close(figure)  # a notebook shows the returned figure; an open one would come a second time
    return figure


def drop_unusable(rows, tokenizer, max_length: int) -> tuple[list[dict], list[dict]]:
    """Return (rows with something left to learn at `max_length`, the others), so that every TRL trains on
    the same rows.
    """
    sides = {True: [], False: []}
    for row, measured in zip(rows, measure_rows(rows, tokenizer, max_length), strict=True):
        sides[measured.usable].append(row)
    if not sides[True]:
        raise UserError(
            f"{max_length} トークンに収まる行がありません。MAX_LENGTH を増やすか、質問を短くしてください。"
        )
    return sides[True], sides[False]
