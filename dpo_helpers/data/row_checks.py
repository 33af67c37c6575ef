"""Turns one record of the user's data into a row in our keys and template, or says in Japanese what is
wrong with it.
"""

from dpo_helpers.data.prompt import make_prompt
from dpo_helpers.data.row_sources import EXTRA_KEYS, KEYS, match_columns

REASONS = {
    "missing": "列が足りない",
    "unreadable": "読み取れない",
    "empty": "空",
    "blank": "空白だけ",
    "not_text": "文字列でない",
    "conversation": "会話の形が違う",
    "identical": "二つの回答が同じ",
    "duplicate": "同じ行がある",
    "swapped": "良い悪いが入れ替わっている",
    "too_long": "長すぎる",
}
SPEAKERS = {"human": "user", "gpt": "assistant"}  # ShareGPT's names for the chat roles
EMPTY_PROMPT = make_prompt("")


class BadRow(Exception):
    """Carries the reason (a key of REASONS) and the Japanese sentence out of the checks of one row."""


def normalize_record(record: dict | str, explicit: tuple) -> dict:
    """Return the row of one record, in our keys and template, or raise BadRow with everything that is
    wrong with it.
    """
    if isinstance(record, str):
        raise BadRow("unreadable", record)
    names, trouble, only_prompt_missing = match_columns(tuple(record), explicit)
    values = {key: record[name] for key, name in names.items()}
    is_conversation = any(isinstance(values.get(key), list) for key in KEYS)
    if trouble and not (is_conversation and only_prompt_missing):
        raise BadRow("missing", trouble)
    if is_conversation:
        values |= _split_conversation(values)
    defects = [defect for key in KEYS if (defect := _find_defect(key, values[key]))]
    row = (
        {}
        if defects
        else {"prompt": make_prompt(values["prompt"]), **{key: values[key].strip() for key in KEYS[1:]}}
    )
    if row and row["chosen"] == row["rejected"]:
        defects = [("identical", "chosen と rejected が同じです")]
    if row and row["prompt"] == EMPTY_PROMPT:
        defects.append(("empty", "prompt に質問の文がありません"))
    if defects:
        raise BadRow(defects[0][0], "。".join(text for _, text in defects))
    for key in EXTRA_KEYS:
        if key in values and isinstance(values[key], str) and values[key].strip() and _is_sound(values[key]):
            row[key] = values[key].strip()
    return row


def _find_defect(key: str, value) -> tuple[str, str] | None:
    if isinstance(value, str):
        if not value:
            return "empty", f"{key} が空です"
        if value.isspace():
            return "blank", f"{key} が空白だけです"
        return None if _is_sound(value) else ("not_text", f"{key} に壊れた文字があります")
    if value is None or value != value:  # not a number is how tables say that nothing is there
        return "empty", f"{key} が空です"
    shown = value if isinstance(value, (int, float)) else type(value).__name__
    return "not_text", f"{key} が文字列ではありません（{shown}）"


def _is_sound(text: str) -> bool:
    """Half a surrogate pair, which JSON can carry, is no character: no file and no tokenizer would take
    it.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _split_conversation(values: dict) -> dict:
    """Turn messages into texts: what both conversations begin with belongs to the prompt, and one answer
    each is left.
    """
    prompt, chosen, rejected = (_read_messages(key, values.get(key)) for key in KEYS)
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    inside = chosen[:shared]
    if prompt and prompt not in (inside[: len(prompt)], inside[-len(prompt) :]):
        inside = prompt + inside
    for key, rest in (("chosen", chosen[shared:]), ("rejected", rejected[shared:])):
        if [role for role, _ in rest] != ["assistant"]:
            raise BadRow("conversation", f"{key} が、assistant の発言一つで終わる会話になっていません")
    if not inside or inside[-1][0] != "user":
        raise BadRow("conversation", "user の発言（質問）で終わる部分がありません")
    if not inside[-1][1].strip():
        raise BadRow("empty", "最後の質問（user の発言）が空です")
    texts = [make_prompt(text).rstrip("\n") if role == "user" else text.strip() for role, text in inside]
    return {"prompt": "\n".join(texts), "chosen": chosen[-1][1], "rejected": rejected[-1][1]}


def _read_messages(key: str, value) -> list[tuple[str, str]]:
    """Return (role, text) of each message; a plain text is one message of the user or of the assistant."""
    if isinstance(value, str):
        return [("user" if key == "prompt" else "assistant", value)]
    if not value and key == "prompt":
        return []
    if not isinstance(value, list):
        raise BadRow(*_find_defect(key, value))
    messages = []
    for item in value:
        role, text = (
            (item.get("role", item.get("from")), item.get("content", item.get("value")))
            if isinstance(item, dict)
            else (0, 0)
        )
        if not isinstance(role, str) or not isinstance(text, str):
            raise BadRow("not_text", f"{key} の発言に role と content の文字列がありません")
        messages.append((SPEAKERS.get(role, role), text))
    return messages
