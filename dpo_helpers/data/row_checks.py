"""Makes a row in our keys and template of one record of the user's data, or says why there is none."""

import ast
import json
import re
import unicodedata
import warnings
from collections import Counter
from functools import lru_cache
from itertools import pairwise

from dpo_helpers.data.generate import UNSEEN
from dpo_helpers.data.prompt import make_prompt, strip_question
from dpo_helpers.data.topics import KIND_SHARES, list_groups
from dpo_helpers.errors import UserError

KEYS = ("prompt", "chosen", "rejected")
OWN_KEYS = (
    "field",
    "concept",
    "question_form",
    "rejection_kind",
    "unseen",
)  # of the rows that generate.py makes
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
# What people and public data sets call each role.
ALIASES = {
    "prompt": "question instruction query user_prompt problem 質問 質問文 問い 問題 指示 指示文 プロンプト",
    "chosen": "good better preferred accepted good_answer chosen_answer chosen_response response_chosen "
    "preferred_output preferred_response 良い回答 よい回答 良い答え 良い応答 好ましい回答",
    "rejected": "bad worse dispreferred bad_answer rejected_answer rejected_response response_rejected "
    "non_preferred_output dispreferred_response 悪い回答 わるい回答 悪い答え 悪い応答 "
    "好ましくない回答",
    "system": "system_prompt system_message システム システムプロンプト",
    "input": "入力",
    "history": "chat_history 履歴",
    "conversations": "conversation messages dialogue dialog context 会話",
    "outputs": "output response responses completion completions answer answers candidates generations "
    "ranked_responses 回答",
    "scores": "score ratings rating ranks rank ranking",
    "group": "",  # rows of one group stay on one side of the split; only a column that the user names is one
}
ALIASES = {role: {role, *names.split()} for role, names in ALIASES.items()}
SPEAKERS = {
    "user": "user human prompter instruction question q customer ユーザー ユーザ 人間 質問 質問者 指示 入力",
    "assistant": "assistant gpt model bot chatbot ai response answer a アシスタント 回答 回答者 応答",
    "system": "system developer システム",
}
SPEAKERS = {name: role for role, names in SPEAKERS.items() for name in names.split()}
ROLE_KEYS = ("role", "from", "speaker")
TEXT_KEYS = ("content", "value", "text", "parts", "response", "answer")
# a speaker's mark at the beginning of a line: "Human: ", "### 応答:", "<|im_start|>user"
MARK = re.compile(
    rf"^[ \t]*(?:<\|im_start\|>(?=\w+\n)|(?:#+ ?)?(?=(?:{'|'.join(SPEAKERS)})[ \t]*[:：]))"
    r"(\w+)[ \t]*[:：\n][ \t]*",
    re.I | re.M,
)
TEMPLATE = re.compile(
    r"<\|\w+\|>|\[/?INST\]|<<SYS>>|<start_of_turn>|</s>|^#{2,} ?\w+ ?[:：]"
    r"|^(?:Human|User|USER|Assistant|ASSISTANT|ユーザー|アシスタント) ?[:：]",
    re.M,
)
TEMPLATE_NOTE = "テンプレートの記号（<|…|>、### …:、Human: など）が文章にあり、そのまま学習します。"
# NUL, half a surrogate pair, a lost letter, and UTF-8 that was read as CP932 or as Latin-1
BROKEN = re.compile("[\0\ud800-\udfff\ufffd]|[縺繧繝].{0,4}[縺繧繝]|ã[\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹Œ].?ã")
MESSAGES_AS_TEXT = re.compile(
    r"\s*+(?:array\()?[\[{]\s*+[\[{]?\s*+['\"](?:role|from|content|value|messages)['\"]\s*:"
)
ANSWER_NAME = re.compile("answer|response|completion|output|conversation|text|回答|応答|返答|案")
CHOICE_NAME = re.compile(
    "choice|chosen|prefer|winner|better|best|select|label|vote|pick|thumb|feedback|correct|^pw$|"
    "どちら|選|良い|好|評価|判定|勝"
)
CHOICE = re.compile(
    "(?:model|option|answer|response|回答|応答|選択肢|案)?[_:]*(a|b|0|1|2|left|right|左|右)(?:_?[のがを方はほ番つ].*)?"
)
SIDE_MARKS = (("a", "b"), ("1", "2"), ("0", "1"))


class NumberText(str):
    """A number or date of a spreadsheet as text, so that the change can be counted."""


class BadRow(Exception):
    """Carries the reason (a key of REASONS) and the Japanese sentence out of the checks of one row."""


def show_name(name) -> str:
    """Return a name as it may stand in a message: control characters escaped, and not too long."""
    letters = str(name)[:80]
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in letters)


def fold_name(name) -> str:
    """Make names comparable, whatever the case and width of their letters: 'Good Answer' is good_answer."""
    return re.sub(r"[\s-]+", "_", unicodedata.normalize("NFKC", str(name)).strip().casefold())


# --- columns ---


def read_mapping(columns: dict | None) -> tuple[tuple[str, str], ...]:
    """Return (role, name of the column) for {name: role}, or for {role: name} if that is the only reading."""
    mapping = []
    for name, role in (columns or {}).items():
        if role not in ALIASES or (name in KEYS and role not in KEYS):
            name, role = role, name
        if role not in ALIASES:
            raise UserError(
                f"列の対応 {show_name(role)}={show_name(name)} が分かりません。"
                f"列名=役割 の形で書いてください。役割は {'、'.join(ALIASES)} です。"
            )
        mapping.append((role, name))
    return tuple(mapping)


@lru_cache(maxsize=256)
def match_columns(names: tuple[str, ...], explicit: tuple[tuple[str, str], ...] = ()) -> tuple[dict, str]:
    """Return ({role: name of the column}, "" or in Japanese what keeps the columns from becoming pairs).

    `explicit` holds (role, name); it wins over the role's own name, and that over its ALIASES. A prompt that
    is missing is no trouble yet: conversations carry theirs in the answers.
    """
    found = {role: name for role, name in explicit if name in names}
    troubles = [f"{show_name(name)} の列がありません。" for _, name in explicit if name not in names]
    free = [name for name in names if name not in found.values()]
    folded = {name: fold_name(name) for name in free}
    for role in [role for role in ALIASES if role not in dict(explicit) and role != "group"]:
        hits = [name for name in free if folded[name] in ALIASES[role]]
        hits = [name for name in hits if name == role] or hits
        if len(hits) > 1 and role in KEYS:
            shown = "、".join(map(show_name, hits))
            troubles.append(f"{role} にあたる列が {len(hits)} つあります（{shown}）。")
        found |= {role: hits[0]} if hits else {}
    for substitute in ("input", "conversations"):  # a prompt only where nothing else is one
        if "prompt" not in found and substitute in found:
            found["prompt"] = found.pop(substitute)
    has_sides = {"chosen", "rejected"} <= found.keys()
    for role in ("conversations", *(("outputs", "scores") if has_sides else ())):
        found.pop(role, None)  # it repeats what stands in chosen and rejected
    if not has_sides and (pair := _find_pair(names, "prompt" in found)):
        found |= {"first": pair[0], "second": pair[1]}
        found.pop("outputs", None)
    if set(OWN_KEYS) <= set(names):
        found |= {key: key for key in OWN_KEYS}
    if troubles or not (has_sides or "outputs" in found or "first" in found):
        return found, "".join(troubles) + explain_columns(names, found)
    return found, ""


@lru_cache(maxsize=256)
def _find_pair(names: tuple[str, ...], has_prompt: bool = True) -> tuple[str, str, tuple[str, str]] | None:
    """Return the columns of two answers, such as 回答A and 回答B, and what tells them apart."""
    folded = {fold_name(name): name for name in names}
    for left, right in SIDE_MARKS:
        for key, name in folded.items():
            stem = key.removesuffix(left)
            is_answer = ANSWER_NAME.search(stem) if stem else left == "a" and has_prompt
            if stem != key and stem + right in folded and is_answer:
                return name, folded[stem + right], (left, right)
    return None


def explain_columns(names: tuple[str, ...], found: dict) -> str:
    """Say which columns are missing, what each one there was taken for, and what to do about it."""
    roles = {name: role for role, name in found.items() if role not in (*OWN_KEYS, "outputs", "scores")}
    shown = [show_name(name) + (f"（{roles[name]}）" if name in roles else "") for name in names[:20]]
    missing = [key for key in KEYS if key not in found]
    text = f"{'、'.join(missing)} の列がありません。" if missing else ""
    text += f"ある列：{'、'.join(shown) or 'なし'}。"
    answer, mark = _find_first(ANSWER_NAME, names), _find_first(CHOICE_NAME, names) or found.get("scores")
    if "first" in found:
        first, second = show_name(found["first"]), show_name(found["second"])
        return text + f"{first} と {second} のどちらが良いかを示す列を加えてください。"
    if mark and mark != answer and {"chosen", "rejected"} <= set(missing):
        text += "DPO には、同じ質問への良い回答（chosen）と悪い回答（rejected）のペアが要ります。"
        if not answer:
            return text + f"どちらが良いか（{show_name(mark)}）だけで、回答の文がないので、加えてください。"
        text += f"回答が一つと印（{show_name(answer)} と {show_name(mark)}）の行は、"
        return text + "同じ質問で印の違う二つを合わせて 1 行にしてください。"
    free = [show_name(name) for name in names if name not in roles] or ["列名"]
    pairs = list(zip(free, missing or ["prompt"], strict=False))
    terminal = " ".join(f"--column {name}={role}" for name, role in pairs)
    notebook = ", ".join(f'"{name}": "{role}"' for name, role in pairs)
    text += f"列の対応を書くと読めます。例：ターミナルでは {terminal}、"
    return text + f"ノートブックでは COLUMNS = {{{notebook}}}"


def _find_first(pattern: re.Pattern, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if pattern.search(fold_name(name))), None)


# --- one record ---


def normalize_record(record: dict | str, explicit: tuple = (), changes: Counter | None = None) -> dict:
    """Return the row of one record, in our keys and template, or raise BadRow with everything that is wrong.

    What is changed on the way is counted in `changes` under a Japanese sentence.
    """
    said: set[str] = set()
    if isinstance(record, str):
        raise BadRow("unreadable", record)
    record = open_task(record)
    found, trouble = match_columns(tuple(record), explicit)
    if trouble:
        raise BadRow("missing", trouble)
    values = {role: record[name] for role, name in found.items()}
    if "outputs" in found:
        values |= _rank_answers(record, found, said)
    elif "first" in found:
        values |= _pick_answer(record, found, said)
    context = _read_context(values, said)
    _split_texts(values, said)
    turns = _read_sides(values, said)
    if "prompt" not in values and isinstance(values["chosen"], str) and len(turns["chosen"]) == 1:
        raise BadRow("missing", explain_columns(tuple(record), found))
    row = _join_turns(turns, context)
    if row["chosen"] == row["rejected"]:
        raise BadRow("identical", "chosen と rejected が同じです")
    if TEMPLATE.search("\n".join(row.values())):
        said.add(TEMPLATE_NOTE)
    if NumberText in map(type, values.values()):
        said.add("数値や日付のセルを文字として読みました。")
    if isinstance(group := values.get("group"), str | int):
        row["group"] = str(group)
    if changes is not None:
        changes.update(said)
    return row | _find_own_values(values)


def _find_own_values(values: dict) -> dict:
    """Return our own columns where they hold what generate.py writes; a user's columns of those names steer
    nothing.
    """
    unseen = values.get("unseen") or ""
    own = {key: values[key] for key in OWN_KEYS if isinstance(values.get(key), str)} | {"unseen": unseen}
    if len(own) < len(OWN_KEYS) or own["rejection_kind"] not in KIND_SHARES or unseen not in ("", *UNSEEN):
        return {}
    return own if list_groups().get(own["concept"], ("",))[0] == own["field"] else {}


def open_task(record: dict) -> dict:
    """Return a Label Studio task as a plain record: its data, and what all annotators selected."""
    data, annotations = record.get("data"), record.get("annotations")
    if not isinstance(data, dict) or not isinstance(annotations, list):
        return record
    text = json.dumps(
        annotations, ensure_ascii=False, default=str
    )  # Parquet holds times, which JSON does not
    found = set(re.findall(r'"(?:selected|choices)": \[?"([^"]*)"', text))
    return {**data, "selected": "、".join(sorted(found))}


def _pick_answer(record: dict, found: dict, said: set) -> dict:
    """Return chosen and rejected of a record with two answers and a choice."""
    first, second, marks = _find_pair(tuple(record), "prompt" in found)
    sides, unclear = set(), None
    for name, value in record.items():
        if name in found.values() or not isinstance(value, str | int) or len(str(value)) > 100:
            continue
        is_named = bool(CHOICE_NAME.search(fold_name(name)))
        names = [(fold_name(first), fold_name(second)), (fold_name(record[first]), fold_name(record[second]))]
        side = _read_side(fold_name(value), [*names, marks, ("left", "right"), ("左", "右")], is_named)
        sides |= set() if side is None else {side}
        unclear = value if is_named and side is None else unclear
    if not sides and unclear is None:
        raise BadRow("missing", explain_columns(tuple(record), found))
    if len(sides) != 1:
        raise BadRow("no_choice", f"どちらの回答が良いかが決まりません（{show_name(unclear) or '空'}）")
    said.add(f"{show_name(first)} と {show_name(second)} を、選ばれたほうを chosen として読みました。")
    better, worse = (first, second) if sides == {0} else (second, first)
    return {"chosen": record[better], "rejected": record[worse]}


def _read_side(value: str, pairs: list[tuple[str, str]], is_named: bool) -> int | None:
    """Return 0 for the first answer, 1 for the second; a digit counts only in a column named as a choice."""
    match = CHOICE.fullmatch(value)
    mark = match[1] if match else value
    for left, right in pairs:
        for text in (value, mark):
            if text in (left, right) and (is_named or not text.isdigit()):
                return int(text == right)
    return None


def _rank_answers(record: dict, found: dict, said: set) -> dict:
    """Return the best and the worst of a list of answers, by scores or ranks, or by the order of `output`."""
    name, score_name = found["outputs"], found.get("scores", "")
    answers, scores = _read_list(record[name]), _read_list(record.get(score_name))
    if not isinstance(answers, list) or len(answers) < 2:
        raise BadRow("missing", explain_columns(tuple(record), found))
    if all(isinstance(answer, dict) for answer in answers):
        if score_name := next((key for key in answers[0] if re.search("score|rating|rank", key)), score_name):
            scores = [answer.get(score_name) for answer in answers]
        answers = [next((answer[key] for key in TEXT_KEYS if key in answer), None) for answer in answers]
    if isinstance(scores, list) and len(scores) == len(answers):
        if not all(isinstance(score, int | float) for score in scores) or len(set(scores)) < 2:
            raise BadRow("no_choice", f"{show_name(name)} の点数に差がないか、数ではありません")
        order = sorted(range(len(answers)), key=lambda i: scores[i], reverse="rank" not in score_name)
        answers = [answers[i] for i in order]
    elif fold_name(name) not in ("output", "outputs", "ranked_responses"):
        raise BadRow("no_choice", f"{show_name(name)} の回答の良し悪し（scores か rank）がありません")
    said.add(f"{show_name(name)} のリストから、いちばん良い回答と悪い回答をペアにしました。")
    return {"chosen": answers[0], "rejected": answers[-1]}


def _read_list(value):
    """Return the list that a text is written as (in JSON or Python), or the value itself."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{", "array(")):
        return value
    # pandas writes an array of messages without commas between them
    python = re.sub(r"^\s*array\(|,\s*dtype=object\)\s*$", "", value)
    python = re.sub(r"\}\s++\{", lambda found: "}, {" if "\n" in found[0] else found[0], python)
    for read, text in ((json.loads, value), (ast.literal_eval, python)):
        try:
            with warnings.catch_warnings(action="ignore"):  # of escapes in what may be no Python at all
                return read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue  # the other notation, or a text that only begins like a list
    return value


# --- texts and messages ---


def _split_texts(values: dict, said: set) -> None:
    """Find the prompt in answers that are plain texts: whole transcripts, or a prompt that they repeat."""
    prompt, chosen, rejected = (values.get(key) for key in KEYS)
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        return
    if not prompt and MARK.search(chosen):
        letters = enumerate(zip(chosen, rejected, strict=False))
        shared = next((i for i, (left, right) in letters if left != right), min(len(chosen), len(rejected)))
        marks = [mark for mark in MARK.finditer(chosen) if mark.end() <= shared]
        if len(marks) > 1 and not chosen[: marks[0].start()].strip():
            values |= _split_transcripts(chosen, rejected, marks)
            said.add("会話の全文から、共通の部分を prompt に分けました。")
    elif isinstance(prompt, str) and (head := prompt.strip()) and chosen.lstrip().startswith(head):
        rests = [text.lstrip().removeprefix(head) for text in (chosen, rejected)]
        ends_open = any(mark.end() == len(head) for mark in MARK.finditer(head))
        if rejected.lstrip().startswith(head) and all(ends_open or rest.startswith("\n") for rest in rests):
            values |= {key: MARK.sub("", rest.strip(), 1) for key, rest in zip(KEYS[1:], rests, strict=True)}
            said.add("chosen と rejected の先頭から、prompt と同じ文を除きました。")


def _split_transcripts(chosen: str, rejected: str, marks: list[re.Match]) -> dict:
    """Divide two transcripts behind the last speaker's mark that they share."""
    speakers = [SPEAKERS.get(fold_name(mark[1]), "") for mark in marks]
    answers = [text[marks[-1].end() :].removesuffix("<|im_end|>\n") for text in (chosen, rejected)]
    later = [SPEAKERS.get(fold_name(mark[1])) for answer in answers for mark in MARK.finditer(answer)]
    if speakers[-1] != "assistant" or "user" in later:
        raise BadRow("conversation", "chosen と rejected の違いが、最後の返答一つだけではありません")
    texts = [chosen[mark.end() : after.start()] for mark, after in pairwise(marks)]
    turns = [
        {"role": speaker, "content": text.replace("<|im_end|>", "").strip()}
        for speaker, text in zip(speakers, texts, strict=False)
    ]
    return {"prompt": turns, "chosen": answers[0], "rejected": answers[1]}


def _read_sides(values: dict, said: set) -> dict[str, list[tuple[str, str]]]:
    """Return the messages of prompt, chosen and rejected, or raise BadRow with the defects of all three."""
    turns, defects = {"prompt": []}, []
    carries_prompt = any(
        not isinstance(values[key], str) or MESSAGES_AS_TEXT.match(values[key]) for key in KEYS[1:]
    )
    for key in KEYS:
        if key == "prompt" and not values.get(key) and (carries_prompt or key not in values):
            continue
        try:
            turns[key] = _read_messages(key, values[key], said)
        except BadRow as bad:
            defects.append(bad.args)
    if defects:
        raise BadRow(defects[0][0], "。".join(text for _, text in defects))
    return turns


def _read_messages(key: str, value, said: set) -> list[tuple[str, str]]:
    """Return (role, text) of each message; a plain text is one message of the user or of the assistant."""
    if isinstance(value, str):
        check_text(key, value)
        if not MESSAGES_AS_TEXT.match(value):
            return [("user" if key == "prompt" else "assistant", value)]
        value = _read_list(value)
        if isinstance(value, str):
            raise BadRow(
                "conversation", f"{key} はメッセージのリストを文字にしたもののようですが、読めません"
            )
        said.add("文字になっていたメッセージのリストを、会話として読みました。")
    if isinstance(value, dict):
        value = value["messages"] if "messages" in value else [value] if _find(value, ROLE_KEYS) else value
    if value is None or value == [] or value != value:  # not a number is how tables say that nothing is there
        raise BadRow("empty", f"{key} が空です")
    if not isinstance(value, list):
        shown = value if isinstance(value, int | float) else type(value).__name__
        raise BadRow("not_text", f"{key} が文字列ではありません（{shown}）")
    return [_read_message(key, message) for message in value]


def _find(message, keys: tuple[str, ...]):
    """Return the value of the first key that a message has; Arrow gives every message the keys of all."""
    values = [message.get(key) for key in keys] if isinstance(message, dict) else []
    return next((value for value in values if value is not None), None)


def _read_message(key: str, message) -> tuple[str, str]:
    role, text = _find(message, ROLE_KEYS), _find(message, TEXT_KEYS)
    for part in text if isinstance(text, list) else ():
        if not isinstance(part if isinstance(part, str) else _find(part, ("text",)), str):
            kind = _find(part, ("type",)) or type(part).__name__
            raise BadRow("not_text", f"{key} の発言に文でないもの（{show_name(kind)}）があります")
    if isinstance(text, list):
        text = "".join(part if isinstance(part, str) else part["text"] for part in text)
    if not isinstance(role, str) or not isinstance(text, str):
        raise BadRow("not_text", f"{key} の発言に role と content の文字列がありません")
    if not (speaker := SPEAKERS.get(fold_name(role))):
        advice = "user、assistant、system のどれかに直してください"
        raise BadRow("conversation", f"{key} の発言の役割 {show_name(role)} が分かりません。{advice}")
    if text.strip():
        check_text(key, text)
    return speaker, text


def check_text(key: str, text: str) -> None:
    """Raise BadRow if a text is nothing that a file, a tokenizer and a reader could take."""
    if not text:
        raise BadRow("empty", f"{key} が空です")
    if text.isspace():
        raise BadRow("blank", f"{key} が空白だけです")
    if len(text) > LONGEST_TEXT:
        raise BadRow("too_long", f"{key} が長すぎます（{len(text):,} 文字、上限 {LONGEST_TEXT:,} 文字）")
    if broken := BROKEN.search(text):
        if broken[0] == "\0":
            raise BadRow("not_text", f"{key} に NUL（文字でないもの）があります")
        if "\ud800" <= broken[0] <= "\udfff":
            raise BadRow("not_text", f"{key} に壊れた文字があります")
        raise BadRow("garbled", f"{key} が文字化けしています（{broken[0]}）")


def _read_context(values: dict, said: set) -> list[tuple[str, str]]:
    """Return what other columns put before the prompt (system, history), and join `input` to it."""
    context, prompt, more = [], values.get("prompt"), values.get("input")
    for key in ("system", "input"):
        if not isinstance(values.get(key) or "", str):
            raise BadRow("not_text", f"{key} が文字列ではありません（{type(values[key]).__name__}）")
    if isinstance(prompt, str) and more and more.strip():
        values["prompt"] = f"{prompt}\n{more}"
        said.add("input の文を prompt の後につなげました。")
    if (system := values.get("system")) and system.strip():
        check_text("system", system)
        context.append(("system", system))
        said.add("system の文を prompt の先頭に入れました。")
    if history := _read_list(values.get("history")):
        if isinstance(history, list) and all(isinstance(p, list | tuple) and len(p) == 2 for p in history):
            texts = [text for pair in history for text in pair]
            history = [
                {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)
            ]
        context += _read_messages("history", history, said)
        said.add("history のやりとりを prompt の前に入れました。")
    return context


def _join_turns(turns: dict, context: list) -> dict:
    """Return the row of messages: what both conversations begin with belongs to the prompt."""
    prompt, chosen, rejected = (turns[key] for key in KEYS)
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    inside = chosen[:shared]
    for key, rest in (("chosen", chosen[shared:]), ("rejected", rejected[shared:])):
        if len(rest) != 1 or rest[0][0] != "assistant":
            raise BadRow("conversation", f"{key} が、assistant の発言一つで終わる会話になっていません")
        if not rest[0][1].strip():
            raise BadRow("empty", f"{key} が空です")
    for before in (prompt if prompt != chosen else [], context):
        if before and before not in (inside[: len(before)], inside[-len(before) :]):
            inside = before + inside
    if not inside or inside[-1][0] != "user":
        raise BadRow("conversation", "user の発言（質問）で終わる部分がありません")
    if not strip_question(inside[-1][1]):
        raise BadRow("empty", "prompt に質問の文がありません")
    return {
        "prompt": _write_prompt(inside),
        "chosen": chosen[-1][1].strip(),
        "rejected": rejected[-1][1].strip(),
    }


def _write_prompt(turns: list[tuple[str, str]]) -> str:
    """Put turns into the project's template; what the system says stands at the head of the next question."""
    if len(turns) == 1:
        return make_prompt(turns[0][1])
    parts, instructions = [], []
    for role, text in turns:
        if role == "system":
            instructions.append(text.strip())
        elif role == "user":
            parts.append(make_prompt("\n\n".join([*instructions, strip_question(text)])).rstrip("\n"))
            instructions = []
        else:
            parts.append(text.strip())
    return make_prompt("\n".join(parts))
