"""Makes the Japanese preference rows (prompt, chosen, rejected) and splits rows by concept; reading files
is not done here.
"""

import json
import random
from functools import cache
from pathlib import Path

from dpo_helpers.errors import UserError

PROMPT_TEMPLATE = (
    "質問: {question}\n回答:\n"  # it ends in a newline: no tokenizer tried merges that with an answer
)
QUESTION_PREFIXES = ("質問:", "質問：")
ANSWER_MARK = "回答:"
SIDES = ("chosen", "rejected")
FIELDS = ("AI", "プログラミング", "データサイエンス")
REJECTION_KINDS = ("vague", "evasive", "wrong_concept", "off_topic", "unfinished", "repetitive", "rude")
CHOICES_PER_CELL = (
    4  # rejected answers to be had for one prompt and kind: two longer and two shorter than chosen
)
LONGEST_ANSWER = 39  # characters; with any question that is at most 128 tokens in GPT-2's vocabulary


def strip_question(text: str) -> str:
    """Return the bare question: without 質問: in front, and without the answer's mark of a whole prompt."""
    text = text.strip().removesuffix(ANSWER_MARK).strip()
    for prefix in QUESTION_PREFIXES:
        text = text.removeprefix(prefix).strip()
    return text


def make_prompt(question: str) -> str:
    """Put a question into the one template that data, evaluation and generation share."""
    return PROMPT_TEMPLATE.format(question=strip_question(question))


@cache
def load_topics() -> dict:
    """Read topics.json: `questions` {form: [wording]}, `rejections` {kind: [text]}, `facts` {field:
    {concept: [fact per form]}}.
    """
    return json.loads((Path(__file__).parent / "topics.json").read_text(encoding="utf-8"))


def generate_preferences(num_samples: int, seed: int, held_out_fraction: float = 0.2) -> list[dict]:
    """Return `num_samples` different rows; the same arguments give the same rows in the same order
    everywhere.

    Keys: prompt, chosen, rejected, field, concept, question_form, rejection_kind. Fields and kinds come in
    equal shares, and in each kind every second rejected answer is longer (in characters) than the chosen one,
    so that length tells nothing. A rejected answer that speaks of another concept takes it from the same side
    of the split that `split_rows` makes with the same seed and fraction: no sentence about a held-out concept
    is ever trained on. Raises UserError when more rows are asked for than there are.
    """
    order = _order_concepts(seed, held_out_fraction)
    prompts = [
        (form, wording) for form, wordings in load_topics()["questions"].items() for wording in wordings
    ]
    rows_per_block = len(prompts) * len(REJECTION_KINDS)
    available = len(order) * rows_per_block * CHOICES_PER_CELL
    if num_samples > available:
        raise UserError(
            f"生成できるのは {available:,} 行までです（指定：{num_samples:,} 行）。"
            "NUM_SAMPLES を減らしてください。"
        )
    sides = _group_by_side(order)
    plans = {concept: _plan_concept(concept, seed, len(prompts)) for _, concept, _ in order}
    first_choices, counts, rows = {}, dict.fromkeys(REJECTION_KINDS, 0), []
    for number in range(num_samples):
        turn, place = divmod(number, len(order))
        field, concept, held_out = order[place]
        # 12 prompts and 7 kinds share no divisor: stepping through both at once meets every pair of them
        # once.
        prompt_order, kind_order = plans[concept]
        form, wording = prompts[prompt_order[turn % len(prompts)]]
        kind = kind_order[turn % len(kind_order)]
        cell = (concept, turn % rows_per_block)
        if cell not in first_choices:
            first_choices[cell] = counts[kind] % CHOICES_PER_CELL
            counts[kind] += 1
        choice = (first_choices[cell] + turn // rows_per_block) % CHOICES_PER_CELL
        chosen = _fact(field, concept, form)
        texts = _rejected_answers(kind, field, concept, form, sides[held_out])
        rejected = _choose(texts, len(chosen), f"{seed}/{concept}/{wording}/{kind}")[choice]
        rows.append(
            {
                "prompt": make_prompt(wording.format(concept)),
                "chosen": chosen,
                "rejected": rejected,
                "field": field,
                "concept": concept,
                "question_form": form,
                "rejection_kind": kind,
            }
        )
    return rows


def split_rows(rows: list[dict], held_out_fraction: float, seed: int) -> tuple[list[dict], list[dict]]:
    """Return (training rows, held-out rows) with no concept on both sides, in proportion within each field.

    Rows without a concept are split by prompt, so that no prompt is on both sides. Raises UserError when one
    side is empty.
    """
    facts = load_topics()["facts"]
    if all(row.get("concept") in facts.get(row.get("field"), ()) for row in rows):
        held_out = {concept for _, concept, held in _order_concepts(seed, held_out_fraction) if held}
    else:
        groups: dict[str, dict] = {}
        for row in rows:
            groups.setdefault(row.get("field") or "", {})[_group_of(row)] = True
        held_out = set()
        for name, members in sorted(groups.items()):
            count = max(1, round(len(members) * held_out_fraction)) if len(members) > 1 else 0
            held_out.update(_shuffle(sorted(members), f"{seed}/split/{name}")[:count])
    training = [row for row in rows if _group_of(row) not in held_out]
    evaluation = [row for row in rows if _group_of(row) in held_out]
    if not training or not evaluation:
        raise UserError(
            f"{len(rows)} 行を学習用と評価用に分けられません（学習用 {len(training)} 行、"
            f"評価用 {len(evaluation)} 行）。"
            "違う質問の行を増やすか、HELD_OUT_FRACTION を変えてください。"
        )
    return training, evaluation


def _group_of(row: dict) -> str:
    return row.get("concept") or row["prompt"]


def _shuffle(items: list, key: str) -> list:
    """Shuffle by a string key. Only random() is used: its sequence is the same on every Python version."""
    draw = random.Random(key)
    return sorted(items, key=lambda _: draw.random())


@cache
def _order_concepts(seed: int, held_out_fraction: float) -> list[tuple[str, str, bool]]:
    """Return (field, concept, is held out) so that every stretch of the list holds fields and sides in
    their shares.
    """
    columns = []
    for field in FIELDS:
        names = _shuffle(sorted(load_topics()["facts"][field]), f"{seed}/concepts/{field}")
        count = round(len(names) * held_out_fraction)
        held, trained = names[:count], names[count:]
        spread = [
            ((i + 0.5) / len(part), name, part is held)
            for part in (held, trained)
            for i, name in enumerate(part)
        ]
        columns.append([(field, name, is_held) for _, name, is_held in sorted(spread)])
    return [entry for line in zip(*columns, strict=True) for entry in line]


def _group_by_side(order) -> dict[bool, dict[str, list[str]]]:
    sides = {held: {field: [] for field in FIELDS} for held in (False, True)}
    for field, concept, held in order:
        sides[held][field].append(concept)
    return sides


def _plan_concept(concept: str, seed: int, prompts: int) -> tuple[list[int], list[str]]:
    kinds = _shuffle(list(REJECTION_KINDS), f"{seed}/kinds/{concept}")
    return _shuffle(list(range(prompts)), f"{seed}/prompts/{concept}"), kinds


def _fact(field: str, concept: str, form: str) -> str:
    topics = load_topics()
    return topics["facts"][field][concept][list(topics["questions"]).index(form)].format(concept)


def _rejected_answers(
    kind: str, field: str, concept: str, form: str, side: dict[str, list[str]]
) -> list[str]:
    """Return every rejected answer of one kind for one question."""
    forms = list(load_topics()["questions"])
    chosen = _fact(field, concept, form)
    if kind == "wrong_concept":  # true, answers this form, but explains another concept of the field
        return [_fact(field, other, form) for other in side[field] if other != concept]
    if kind == "off_topic":  # true, but about another field and another form
        return [
            _fact(other_field, other, other_form)
            for other_field in FIELDS
            if other_field != field
            for other in side[other_field]
            for other_form in forms
            if other_form != form
        ]
    if kind == "unfinished":
        return _unfinished(chosen, [_fact(field, concept, other) for other in forms if other != form])
    if kind == "repetitive":
        return _repetitive(chosen, concept)
    return [text.format(concept) for text in load_topics()["rejections"][kind]]


def _unfinished(chosen: str, others: list[str]) -> list[str]:
    """Cut sentences in the middle: the chosen one (shorter), or another fact and the beginning of the
    chosen one (longer).
    """
    shorter = [chosen[: int(len(chosen) * share)] for share in (0.5, 0.6, 0.7, 0.8)]
    longer = [(other + chosen)[: len(chosen) + extra] for other in others for extra in (2, 3, 4, 5)]
    return [text for text in shorter + longer if text[-1] not in "。、"]


def _repetitive(chosen: str, concept: str) -> list[str]:
    """Repeat a few characters of the answer, or a filler word, as a model that is stuck does.

    Loops of the answer stay under 28 characters (a kanji can cost three tokens); fillers of plain kana serve
    above that.
    """
    start = chosen.index("、") + 1 if "、" in chosen[:-8] else len(concept) + 1
    loops = [chosen[start : start + size] * times for size in (2, 3, 4, 5, 6) for times in range(3, 14)]
    loops = [text for loop in loops for text in (loop, chosen[:start] + loop) if len(text) < 28]
    fillers = ("とても、", "それは、", "つまり、", "です。", "ます。", "はい、", "なので、", "また、")
    return loops + [filler * times for filler in fillers for times in range(3, 14)]


def _choose(texts: list[str], chosen_length: int, key: str) -> list[str]:
    """Pick four texts, in turn longer and shorter than the chosen answer; where one side has too few, the
    other fills in.
    """
    different = sorted({text for text in texts if len(text) <= LONGEST_ANSWER})
    texts = _shuffle(different, key)
    half = CHOICES_PER_CELL // 2
    longer = [text for text in texts if len(text) > chosen_length][:half]
    shorter = [text for text in texts if len(text) < chosen_length][:half]
    spare = [text for text in texts if text not in longer + shorter]
    while len(longer) < half:
        longer.append(spare.pop())
    while len(shorter) < half:
        shorter.append(spare.pop())
    return [text for pair in zip(longer, shorter, strict=True) for text in pair]
