"""Turns one record of the user's data into a row in our keys and template, or says in Japanese what is wrong
with it.
"""

import ast
import json
import re
import unicodedata
from collections import Counter
from functools import lru_cache

from dpo_helpers.config import UserError
from dpo_helpers.data.generate import REJECTION_KINDS, load_topics, make_prompt, strip_question

KEYS = ("prompt", "chosen", "rejected")
OWN_KEYS = ("field", "concept", "question_form", "rejection_kind")  # of the rows that generate.py makes
REASONS = {
    "missing": "列が足りない",
    "unreadable": "読み取れない",
    "empty": "空",
    "blank": "空白だけ",
    "not_text": "文字列でない",
    "garbled": "文字化け",
    "conversation": "会話の形が違う",
    "no_choice": "良し悪しが決まらない",
    "identical": "二つの回答が同じ",
    "duplicate": "同じ行がある",
    "swapped": "良い悪いが入れ替わっている",
    "too_long": "長すぎる",
}
LONGEST_TEXT = 100_000  # characters; twelve times what the longest MAX_LENGTH can hold
# What people and public data sets call each role; an earlier name wins over a later one only for the prompt.
ALIASES = {
    "prompt": "prompt question instruction query user_prompt problem "
    "質問 質問文 問い 問題 指示 指示文 プロンプト",
    "chosen": "chosen good better preferred accepted good_answer chosen_answer chosen_response "
    "response_chosen preferred_output preferred_response 良い回答 よい回答 良い答え 良い応答 好ましい回答",
    "rejected": "rejected bad worse dispreferred bad_answer rejected_answer rejected_response "
    "response_rejected non_preferred_output dispreferred_response 悪い回答 わるい回答 悪い答え 悪い応答 好ましくない回答",
    "system": "system system_prompt system_message システム システムプロンプト",
    "input": "input 入力",
    "history": "history chat_history 履歴",
    "conversations": "conversations conversation messages dialogue dialog context 会話",
    "outputs": "output outputs responses completions answers candidates generations ranked_responses 回答",
    "scores": "scores score ratings rating ranks rank ranking",
    "group": "",  # rows of one group stay on one side of the split; only a named column is one
}
ALIASES = {role: names.split() for role, names in ALIASES.items()}
SPEAKERS = {
    "user": "user human prompter instruction question q customer ユーザー ユーザ 人間 質問 質問者 指示 入力",
    "assistant": "assistant gpt model bot chatbot ai response answer a アシスタント 回答 回答者 応答",
    "system": "system developer システム",
}
SPEAKERS = {name: role for role, names in SPEAKERS.items() for name in names.split()}
ROLE_KEYS, TEXT_KEYS = ("role", "from", "speaker"), ("content", "value", "text", "parts")
# a speaker's mark at the beginning of a line: "Human: ", "### 応答:", "<|im_start|>user"
MARK = re.compile(
    r"^[ \t]*(?:<\|im_start\|>(\w+)\n|(?:#+ ?)?(" + "|".join(SPEAKERS) + r")[ \t]*[:：][ \t]*)", re.I | re.M
)
TEMPLATE = re.compile(
    r"<\|\w+\|>|\[/?INST\]|<<SYS>>|<start_of_turn>|</s>|^#{2,} ?\w+ ?[:：]"
    r"|^(?:Human|User|USER|Assistant|ASSISTANT|ユーザー|アシスタント) ?[:：]",
    re.M,
)
TEMPLATE_NOTE = (
    "文章の中にテンプレートの記号（<|…|>、### …:、Human: など）があります。文の一部としてそのまま学習します。"
    "要らなければ、元のデータから除いてください。"
)
# what UTF-8 looks like after it was read as CP932 or Latin-1, and what stands for a letter that was lost
GARBLED = re.compile("\ufffd|[縺繧繝].{0,4}[縺繧繝]|ã[\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹Œ].?ã")
AS_TEXT = re.compile(r"\s*(?:array\()?[\[{]\s*[\[{]?\s*['\"](?:role|from|content|value|messages)['\"]\s*:")
ANSWER_STEMS = re.compile(
    "|".join(
        ("answer", "response", "completion", "output", "conversation", "text", "回答", "応答", "返答", "案")
    )
)
SIDE_MARKS = (("a", "b"), ("1", "2"), ("0", "1"), ("left", "right"))
CHOICE_NAME = re.compile(
    "choice|chosen|prefer|winner|better|best|select|label|vote|pick|^pw$|どちら|選|良い|好|評価|判定|勝"
)
CHOICE = re.compile(
    r"(?:model|option|answer|response|回答|応答|選択肢|案)?[_:]*(a|b|0|1|2|left|right|左|右)(?:_?の?方.*)?"
)
SIDE_WORDS = {"左": "left", "右": "right"}


class NumberText(str):
    """A number or date of a spreadsheet as text, so that the change can be counted."""


class BadRow(Exception):
    """Carries the reason (a key of REASONS) and the Japanese sentence out of the checks of one row."""


def show_name(name: str) -> str:
    """Return a name as it may stand in a message: control characters escaped, and not too long."""
    shown = (
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in str(name)[:80]
    )
    return "".join(shown)


def fold_name(name) -> str:
    """Make names comparable, whatever the case and width of their letters: 'Good Answer' is good_answer."""
    return re.sub(r"[\s-]+", "_", unicodedata.normalize("NFKC", str(name)).strip().casefold())


def read_mapping(columns: dict | None) -> tuple[tuple[str, str], ...]:
    """Return (role, name of the column) for {name: role}, or {role: name} where that is the only reading."""
    mapping = []
    for left, right in (columns or {}).items():
        swapped = right not in ALIASES or (left in KEYS and right not in KEYS)
        name, role = (right, left) if swapped else (left, right)
        if role not in ALIASES:
            raise UserError(
                f"列の対応 {show_name(left)}={show_name(right)} が分かりません。"
                "列名=役割 の形で書いてください。"
                f"役割は {'、'.join(ALIASES)} です。"
            )
        mapping.append((role, name))
    return tuple(mapping)


@lru_cache(maxsize=256)
def match_columns(names: tuple[str, ...], explicit: tuple[tuple[str, str], ...] = ()) -> tuple[dict, str]:
    """Return ({role: name of the column}, "" or in Japanese what keeps the columns from becoming pairs).

    `explicit` holds (role, name); it wins over the role's own name, and that over the other ALIASES. A prompt
    that is missing is no trouble yet: conversations carry theirs in the answers.
    """
    wanted = dict(explicit)
    found = {role: name for role, name in explicit if name in names}
    troubles = [f"{show_name(name)} の列がありません。" for _, name in explicit if name not in names]
    free = [name for name in names if name not in found.values()]
    for role, aliases in ALIASES.items():
        hits = [name for name in free if name == role] or [
            name for name in free if fold_name(name) in aliases
        ]
        if role in wanted or not hits:
            continue
        if len(hits) > 1 and role in KEYS:
            shown = "、".join(map(show_name, hits))
            troubles.append(f"{role} にあたる列が {len(hits)} つあります（{shown}）。")
        found[role] = hits[0]
    for substitute in ("input", "conversations"):  # a prompt only where nothing else is one
        if "prompt" not in found and substitute in found:
            found["prompt"] = found.pop(substitute)
    has_sides = {"chosen", "rejected"} <= set(found)
    for role in ("conversations", *(("outputs", "scores") if has_sides else ())):
        found.pop(role, None)  # it repeats what stands in chosen and rejected
    pair = None if has_sides or "outputs" in found else _find_pair(names)
    if pair:
        found |= {"first": pair[0], "second": pair[1]}
    if set(OWN_KEYS) <= set(names):
        found |= {key: key for key in OWN_KEYS}
    if troubles or not (has_sides or "outputs" in found or pair):
        return found, "".join(troubles) + explain_columns(names, found)
    return found, ""


def explain_columns(names: tuple[str, ...], found: dict) -> str:
    """Say which columns are missing, what each one there was taken for, and what to do about it."""
    roles = {name: role for role, name in found.items() if role not in OWN_KEYS}
    shown = [
        f"{show_name(name)}（{roles[name]}）" if name in roles else show_name(name) for name in names[:20]
    ]
    missing = [key for key in KEYS if key not in found]
    text = f"{'、'.join(missing)} の列がありません。" if missing else ""
    text += f"ある列：{'、'.join(shown) or 'なし'}。"
    return text + _advise_on_columns(names, found, missing)


def _advise_on_columns(names: tuple[str, ...], found: dict, missing: list[str]) -> str:
    free = [name for name in names if name not in found.values()]
    answer = next((n for n in names if ANSWER_STEMS.search(fold_name(n)) or fold_name(n) == "output"), None)
    mark = next((n for n in names if n != answer and CHOICE_NAME.search(fold_name(n))), None)
    mark = mark or next((n for n in names if n in found.values() and n == found.get("scores")), None)
    if pair := _find_pair(names):
        return (
            f"{show_name(pair[0])} と {show_name(pair[1])} のどちらが良いかを示す列がありません。"
            "良いほうを chosen、悪いほうを rejected の列に書いてください。"
        )
    if {"chosen", "rejected"} <= set(missing) and mark and answer:
        return (
            f"回答が一つと印（{show_name(answer)} と {show_name(mark)}）の形です。DPO には良い回答と"
            f"悪い回答のペアが要ります。同じ質問の行を二つずつ合わせ、{show_name(mark)} が良いほうの "
            f"{show_name(answer)} を chosen、悪いほうを rejected の列に書いてください。"
        )
    if {"chosen", "rejected"} <= set(missing) and mark:
        return (
            f"どちらが良いか（{show_name(mark)}）はありますが、回答の文がありません。二つの回答の文を "
            "chosen（良いほう）と rejected（悪いほう）の列に書いてください。"
        )
    pairs = [
        (show_name(name), role) for name, role in zip(free or ["列名"], missing or ["prompt"], strict=False)
    ]
    terminal = " ".join(f"--column {name}={role}" for name, role in pairs)
    notebook = ", ".join(f'"{name}": "{role}"' for name, role in pairs)
    return (
        f"列の対応を書くと読めます。例：ターミナルでは {terminal}、ノートブックでは COLUMNS = {{{notebook}}}"
    )


def normalize_record(record: dict | str, explicit: tuple = (), changes: Counter | None = None) -> dict:
    """Return the row of one record, in our keys and template, or raise BadRow with everything that is wrong.

    What is changed on the way is counted in `changes` under a Japanese sentence.
    """
    changes = Counter() if changes is None else changes
    if isinstance(record, str):
        raise BadRow("unreadable", record)
    record = open_task(record)
    found, trouble = match_columns(tuple(record), explicit)
    if trouble:
        raise BadRow("missing", trouble)
    values = {role: record[name] for role, name in found.items()}
    _join_input(values, changes)
    if not {"chosen", "rejected"} <= set(values):
        values |= _pick_answers(record, found, changes)
    _split_texts(values, changes)
    turns = _read_sides(values, changes)
    if not turns["prompt"] and "prompt" not in values and len(turns["chosen"]) == 1:
        raise BadRow("missing", explain_columns(tuple(record), found))
    prompt, chosen, rejected = _join_turns(turns, _read_context(values, changes))
    row = {"prompt": _write_prompt(prompt), "chosen": chosen.strip(), "rejected": rejected.strip()}
    if row["chosen"] == row["rejected"]:
        raise BadRow("identical", "chosen と rejected が同じです")
    if any(TEMPLATE.search(text) for text in row.values()):
        changes[TEMPLATE_NOTE] += 1
    if any(isinstance(value, NumberText) for value in values.values()):
        changes["数値や日付のセルを文字として読みました。"] += 1
    if isinstance(group := values.get("group"), str | int):
        row["group"] = str(group)
    return row | _find_own_values(values)


def _join_input(values: dict, changes: Counter) -> None:
    """Put Alpaca's second column behind the instruction; it is often empty."""
    prompt, more = values.get("prompt"), values.get("input")
    if isinstance(prompt, str) and isinstance(more, str) and more.strip():
        values["prompt"] = f"{prompt}\n{more}"
        changes["input の文を instruction の後につなげました。"] += 1


def _find_own_values(values: dict) -> dict:
    """Return our own columns where they hold what generate.py writes; a user's columns of those names steer
    nothing.
    """
    facts = load_topics()["facts"].get(values.get("field")) if isinstance(values.get("field"), str) else None
    known = facts and values.get("concept") in facts and values.get("rejection_kind") in REJECTION_KINDS
    return {key: values[key] for key in OWN_KEYS} if known else {}


def open_task(record: dict) -> dict:
    """Return a Label Studio task as a plain record: its data, and what the annotators selected."""
    data, annotations = record.get("data"), record.get("annotations")
    if not isinstance(data, dict) or not isinstance(annotations, list):
        return record
    results = [
        result.get("value")
        for annotation in annotations
        if isinstance(annotation, dict) and isinstance(annotation.get("result"), list)
        for result in annotation["result"]
        if isinstance(result, dict)
    ]
    picked = [v.get("selected") or v.get("choices") for v in results if isinstance(v, dict)]
    picked = {choice if isinstance(choice, str) else str(choice[0]) for choice in picked if choice}
    return {**data, "selected": picked.pop() if len(picked) == 1 else "、".join(sorted(picked))}


@lru_cache(maxsize=256)
def _find_pair(names: tuple[str, ...]) -> tuple[str, str, tuple[str, str]] | None:
    """Return the columns of two answers, such as 回答A and 回答B, and what tells them apart."""
    folded = {fold_name(name): name for name in names}
    for left, right in SIDE_MARKS:
        for key, name in folded.items():
            stem = key.removesuffix(left)
            if (
                stem != key
                and stem + right in folded
                and (ANSWER_STEMS.search(stem) or (not stem and left == "a"))
            ):
                return name, folded[stem + right], (left, right)
    return None


def _pick_answers(record: dict, found: dict, changes: Counter) -> dict:
    """Return chosen and rejected of a record with a list of answers, or with two and a choice."""
    if "outputs" in found:
        return _rank_answers(record, found, changes)
    left, right, marks = _find_pair(tuple(record))
    choices = {}
    for name, value in record.items():
        if name not in (left, right, found.get("prompt")) and isinstance(value, str | int):
            named = bool(CHOICE_NAME.search(fold_name(name)))
            side = _read_side(str(value), (fold_name(left), fold_name(right)), marks, named)
            if side is not None:
                choices[name] = side
            elif named:
                choices.setdefault("", value)
    sides = {side for name, side in choices.items() if name}
    if not choices:
        raise BadRow("missing", explain_columns(tuple(record), found))
    if len(sides) != 1:
        raise BadRow(
            "no_choice", f"どちらの回答が良いかが決まりません（{show_name(choices.get('', '食い違い'))}）"
        )
    better, worse = (left, right) if sides == {0} else (right, left)
    changes[f"{show_name(left)} と {show_name(right)} を、選ばれたほうを chosen として読みました。"] += 1
    return {"chosen": record[better], "rejected": record[worse]}


def _read_side(value: str, names: tuple[str, str], marks: tuple[str, str], named: bool) -> int | None:
    """Return 0 for the first answer, 1 for the second; a digit counts only in a column named as a choice."""
    text = fold_name(value)
    if text in names:
        return names.index(text)
    match = CHOICE.fullmatch(text)
    mark = SIDE_WORDS.get(match[1], match[1]) if match else ""
    if mark in ("left", "right"):
        return int(mark == "right")
    if mark not in marks or (text.isdigit() and not named):
        return None
    return marks.index(mark)


def _rank_answers(record: dict, found: dict, changes: Counter) -> dict:
    """Return the best and the worst of a list of answers, by scores or ranks, or by the order of `output`."""
    name, score_name = found["outputs"], found.get("scores", "")
    answers, scores = _read_list(record[name]), _read_list(record.get(score_name))
    if not isinstance(answers, list) or len(answers) < 2:
        raise BadRow("missing", explain_columns(tuple(record), found))
    if all(isinstance(answer, dict) for answer in answers):
        names = [key for key in answers[0] if fold_name(key) in ALIASES["scores"] or "score" in key]
        score_name, scores = (names[0], [a.get(names[0]) for a in answers]) if names else (score_name, scores)
        answers = [next((a[k] for k in ("response", "answer", *TEXT_KEYS) if k in a), None) for a in answers]
    if isinstance(scores, list) and len(scores) == len(answers):
        if not all(isinstance(score, int | float) for score in scores) or len(set(scores)) < 2:
            raise BadRow("no_choice", f"{show_name(name)} の点数に差がないか、数ではありません")
        best_first = sorted(range(len(answers)), key=lambda i: scores[i], reverse="rank" not in score_name)
        answers = [answers[i] for i in best_first]
    elif fold_name(name) not in ("output", "outputs", "ranked_responses"):
        raise BadRow("no_choice", f"{show_name(name)} の回答の良し悪し（scores か rank）がありません")
    changes[f"{show_name(name)} のリストから、いちばん良い回答と悪い回答をペアにしました。"] += 1
    return {"chosen": answers[0], "rejected": answers[-1]}


def _read_list(value):
    """Return the list that a text is written as (in JSON or Python), or the value itself."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{", "array(")):
        return value
    # pandas writes an array of messages without commas between them
    python = re.sub(r"\}\s*\n\s*\{", "}, {", re.sub(r"^\s*array\(|,\s*dtype=object\)\s*$", "", value))
    for read, text in ((json.loads, value), (ast.literal_eval, python)):
        try:
            return read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue  # the other notation, or a text that only begins like a list
    return value


def _split_texts(values: dict, changes: Counter) -> None:
    """Find the prompt in answers that are plain texts: whole transcripts, or a prompt that they repeat."""
    prompt, chosen, rejected = (values.get(key) for key in KEYS)
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        return
    if not prompt:
        shared = next(
            (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), len(chosen)
        )
        marks = [mark for mark in MARK.finditer(chosen) if mark.end() <= shared]
        if len(marks) > 1 and not chosen[: marks[0].start()].strip():
            values |= _split_transcripts(chosen, rejected, marks)
            changes["会話の全文から、共通の部分を prompt に分けました。"] += 1
    elif isinstance(prompt, str) and (head := prompt.strip()):
        rests = [
            text.lstrip().removeprefix(head) for text in (chosen, rejected) if text.lstrip().startswith(head)
        ]
        ends_open = any(mark.end() == len(head) for mark in MARK.finditer(head))
        if len(rests) == 2 and all(ends_open or rest.startswith("\n") for rest in rests):
            values |= {
                key: MARK.sub("", rest.strip(), count=1) for key, rest in zip(KEYS[1:], rests, strict=True)
            }
            changes["chosen と rejected の先頭から、prompt と同じ文を除きました。"] += 1


def _split_transcripts(chosen: str, rejected: str, marks: list[re.Match]) -> dict:
    """Divide two transcripts behind the last speaker's mark that they share."""
    speakers = [_find_speaker(mark[1] or mark[2]) for mark in marks]
    answers = [text[marks[-1].end() :].removesuffix("<|im_end|>\n") for text in (chosen, rejected)]
    if speakers[-1] != "assistant" or any(
        _find_speaker(mark[1] or mark[2]) == "user" for answer in answers for mark in MARK.finditer(answer)
    ):
        raise BadRow("conversation", "chosen と rejected の違いが、最後の返答一つだけではありません")
    ends = [mark.start() for mark in marks[1:]]
    texts = [chosen[mark.end() : end] for mark, end in zip(marks, ends, strict=False)]
    turns = [
        {"role": speaker, "content": text.replace("<|im_end|>", "").strip()}
        for speaker, text in zip(speakers, texts, strict=False)
    ]
    return {"prompt": turns, "chosen": answers[0], "rejected": answers[1]}


def _find_speaker(name: str | None) -> str:
    return SPEAKERS.get(fold_name(name or ""), "")


def _read_sides(values: dict, changes: Counter) -> dict[str, list[tuple[str, str]]]:
    """Return the messages of prompt, chosen and rejected, or raise BadRow with the defects of all three."""
    turns, defects = {"prompt": []}, []
    has_inside = any(isinstance(_read_list(values[key]), list | dict) for key in KEYS[1:])
    for key in KEYS:
        if key == "prompt" and (key not in values or (has_inside and not values[key])):
            continue
        try:
            turns[key] = _read_messages(key, values[key], changes)
        except BadRow as bad:
            defects.append(bad.args)
    if defects:
        raise BadRow(defects[0][0], "。".join(text for _, text in defects))
    return turns


def _read_messages(key: str, value, changes: Counter) -> list[tuple[str, str]]:
    """Return (role, text) of each message; a plain text is one message of the user or of the assistant."""
    if isinstance(value, str):
        check_text(key, value)
        if not AS_TEXT.match(value):
            return [("user" if key == "prompt" else "assistant", value)]
        value = _read_list(value)
        if isinstance(value, str):
            raise BadRow(
                "conversation", f"{key} はメッセージのリストを文字にしたもののようですが、読めません"
            )
        changes["文字になっていたメッセージのリストを、会話として読みました。"] += 1
    if isinstance(value, dict):
        value = value["messages"] if "messages" in value else [value] if _is_message(value) else value
    if not isinstance(value, list):
        empty = value is None or value != value  # not a number is how tables say that nothing is there
        shown = value if isinstance(value, int | float) else type(value).__name__
        text = f"{key} が空です" if empty else f"{key} が文字列ではありません（{shown}）"
        raise BadRow("empty" if empty else "not_text", text)
    if not value:
        raise BadRow("empty", f"{key} が空です")
    return [_read_message(key, message) for message in value]


def _is_message(value) -> bool:
    return isinstance(value, dict) and any(key in value for key in ROLE_KEYS)


def _read_message(key: str, message) -> tuple[str, str]:
    role = next((message[k] for k in ROLE_KEYS if message.get(k)), None) if _is_message(message) else None
    text = next((message[k] for k in TEXT_KEYS if message.get(k) is not None), None) if role else None
    if isinstance(text, list):
        text = "".join(_read_part(key, part) for part in text)
    if not isinstance(role, str) or not isinstance(text, str):
        raise BadRow("not_text", f"{key} の発言に role と content の文字列がありません")
    if not (speaker := _find_speaker(role)):
        advice = "user、assistant、system のどれかに直してください"
        raise BadRow("conversation", f"{key} の発言の役割 {show_name(role)} が分かりません。{advice}")
    if text.strip():
        check_text(key, text)
    return speaker, text


def _read_part(key: str, part) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise BadRow("not_text", f"{key} の発言に文でないもの（{show_name(kind)}）があります")
    return text


def check_text(key: str, text: str) -> None:
    """Raise BadRow if a text is nothing that a file, a tokenizer and a reader could take."""
    if not text:
        raise BadRow("empty", f"{key} が空です")
    if text.isspace():
        raise BadRow("blank", f"{key} が空白だけです")
    if len(text) > LONGEST_TEXT:
        raise BadRow("too_long", f"{key} が長すぎます（{len(text):,} 文字、上限 {LONGEST_TEXT:,} 文字）")
    if "\0" in text:
        raise BadRow("not_text", f"{key} に NUL（文字でないもの）があります")
    try:
        text.encode()  # half a surrogate pair, which JSON can carry, is no character
    except UnicodeEncodeError:
        raise BadRow("not_text", f"{key} に壊れた文字があります") from None
    if found := GARBLED.search(text):
        raise BadRow("garbled", f"{key} が文字化けしています（{found[0]}）")


def _read_context(values: dict, changes: Counter) -> list[tuple[str, str]]:
    """Return what the record's other columns put before and into the prompt: system, history and input."""
    context = []
    if isinstance(system := values.get("system"), str) and system.strip():
        check_text("system", system)
        context.append(("system", system))
        changes["system の文を prompt の先頭に入れました。"] += 1
    history = _read_list(values.get("history"))
    if history:
        pairs = history if isinstance(history, list) else []
        if all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs) and pairs:
            history = [
                {"role": role, "content": text}
                for pair in pairs
                for role, text in zip(("user", "assistant"), pair, strict=True)
            ]
        context += _read_messages("history", history, changes)
        changes["history のやりとりを prompt の前に入れました。"] += 1
    return context


def _join_turns(turns: dict, context: list) -> tuple[list[tuple[str, str]], str, str]:
    """Return (the turns before the answers, chosen, rejected).

    What both conversations begin with belongs to the prompt, whether a prompt repeats it or not.
    """
    prompt, chosen, rejected = (turns[key] for key in KEYS)
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    inside = chosen[:shared]
    for key, rest in (("chosen", chosen[shared:]), ("rejected", rejected[shared:])):
        if [role for role, _ in rest] != ["assistant"]:
            raise BadRow("conversation", f"{key} が、assistant の発言一つで終わる会話になっていません")
        check_text(key, rest[0][1])
    for before in (prompt if prompt != chosen else [], context):
        if before and before not in (inside[: len(before)], inside[-len(before) :]):
            inside = before + inside
    if not inside or inside[-1][0] != "user":
        raise BadRow("conversation", "user の発言（質問）で終わる部分がありません")
    if not inside[-1][1].strip():
        raise BadRow("empty", "最後の質問（user の発言）が空です")
    return inside, chosen[-1][1], rejected[-1][1]


def _write_prompt(turns: list[tuple[str, str]]) -> str:
    """Put turns into the project's template; what the system says stands at the head of the next question."""
    parts, instructions = [], []
    for role, text in turns:
        if role == "system":
            instructions.append(text.strip())
        elif role == "user":
            parts.append(make_prompt("\n\n".join([*instructions, strip_question(text)])).rstrip("\n"))
            instructions = []
        else:
            parts.append(text.strip())
    prompt = make_prompt("\n".join(parts))
    if prompt == make_prompt(""):
        raise BadRow("empty", "prompt に質問の文がありません")
    return prompt
