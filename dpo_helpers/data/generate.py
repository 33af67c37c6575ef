"""Makes the Japanese preference rows (prompt, chosen, rejected) and splits rows; reading files is not done
here.

Two kinds of question are held out. `new_concept`: no training row names the concept. `new_wording`: the same
fact is trained, but asked in other words.
"""

import json
import random
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

from dpo_helpers.config import UserError

PROMPT_TEMPLATE = (
    "質問: {question}\n回答:\n"  # it ends in a newline: no tokenizer tried merges that with an answer
)
QUESTION_PREFIXES = ("質問:", "質問：")
ANSWER_MARK = "回答:"
SIDES = ("chosen", "rejected")
FIELDS = ("AI", "プログラミング", "データサイエンス")
UNSEEN = ("new_concept", "new_wording")
# Shares of the rejected answers. The first two are the hard ones: true sentences, well written, and wrong
# here.
KIND_SHARES = {
    "wrong_fact": 0.25,
    "off_form": 0.25,
    "vague": 0.1,
    "evasive": 0.1,
    "unfinished": 0.1,
    "repetitive": 0.1,
    "rude": 0.1,
}
NEAR = 4  # characters: lengths that differ by less count as equally near
CHOICES = 4  # rejected answers to be had for one prompt and kind: two longer and two shorter than chosen
# Characters plus kanji of prompt and answer: below this, all of them stay within 128 tokens of GPT-2's
# vocabulary.
HEAVIEST = 102
CONCEPT_SHARE = 2 / 3  # of held_out_fraction: ten of 51 concepts a field at 0.3, each asked about five times


class Fact(NamedTuple):
    """One thing to know: what `form` of question about `concept` it answers."""

    field: str
    concept: str
    form: str


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
    """Read topics.json: `questions` and `rejections` (texts by form and kind), `facts` {field: {group: …}},
    `asked` (what the notebooks ask), `near` (pairs of concepts that may share a fact).
    """
    return json.loads((Path(__file__).parent / "topics.json").read_text(encoding="utf-8"))


@cache
def list_groups() -> dict[str, tuple[str, str]]:
    """Return {concept: (field, group)} of all concepts."""
    facts = load_topics()["facts"]
    return {
        name: (field, group)
        for field in FIELDS
        for group in facts[field]
        for name in facts[field][group]["concepts"]
    }


def list_forms() -> list[str]:
    return list(load_topics()["questions"])


def list_wordings(fact: Fact) -> list[str]:
    """Return the three questions that the fact answers; how a mechanism is asked about depends on the
    group.
    """
    wordings = load_topics()["questions"][fact.form]
    if isinstance(wordings, dict):
        wordings = wordings[_find_group(fact.concept)["how"]]
    return [wording.format(fact.concept) for wording in wordings]


def tell_fact(fact: Fact, name: str = "") -> str:
    """Return the sentence of a fact, about its own concept or, falsely, about another `name`."""
    sentences = _find_group(fact.concept)["concepts"][fact.concept]
    return sentences[list_forms().index(fact.form)].format(name or fact.concept)


def list_asked() -> list[tuple[Fact, str]]:
    """Return (fact, question) of what the notebooks ask: the facts are always trained, these words never."""
    groups = list_groups()
    return [
        (Fact(groups[name][0], name, form), words.format(name))
        for name, form, words in load_topics()["asked"]
    ]


def generate_preferences(num_samples: int, seed: int, held_out_fraction: float = 0.3) -> list[dict]:
    """Return `num_samples` different rows; the same arguments give the same rows in the same order
    everywhere.

    Keys: prompt, chosen, rejected, field, concept, question_form, rejection_kind, unseen ("" for a row to
    train on, else one of UNSEEN). Half of the held-out rows are of each kind. A false answer takes its
    sentence from a concept of the same side, so that no sentence about a held-out concept is trained on. In
    each kind every second rejected answer is longer (in characters) than the chosen one. UserError where
    there are not so many rows.
    """
    held_count = round(num_samples * held_out_fraction / 2)
    trained, held = divide_concepts(seed, held_out_fraction)
    train_count = num_samples - 2 * held_count
    rows = [
        *_fill_cells(_train_cells(train_count, trained, seed), train_count, trained, seed, ""),
        *_fill_cells(_new_concept_cells(held, seed), held_count, held, seed, "new_concept"),
        *_fill_cells(
            _new_wording_cells(train_count, trained, seed), held_count, trained, seed, "new_wording"
        ),
    ]
    return _shuffle(rows, f"{seed}/rows")


def split_rows(rows: list[dict], held_out_fraction: float, seed: int) -> tuple[list[dict], list[dict]]:
    """Return (training rows, held-out rows).

    Generated rows say themselves where they belong (`unseen`). Others are split by whole prompt, or by their
    column `group` where they have one, so that no prompt stands on both sides. UserError when a side is
    empty.
    """
    if all("unseen" in row for row in rows):
        sides = [bool(row["unseen"]) for row in rows]
    else:
        groups = sorted({row.get("group") or row["prompt"] for row in rows})
        count = max(1, round(len(groups) * held_out_fraction)) if len(groups) > 1 else 0
        held_out = set(_shuffle(groups, f"{seed}/split")[:count])
        sides = [(row.get("group") or row["prompt"]) in held_out for row in rows]
    training = [row for row, held in zip(rows, sides, strict=True) if not held]
    evaluation = [row for row, held in zip(rows, sides, strict=True) if held]
    if not training or not evaluation:
        raise UserError(
            f"{len(rows)} 行を学習用と評価用に分けられません（学習用 {len(training)} 行、"
            f"評価用 {len(evaluation)} 行）。"
            "違う質問の行を増やすか、HELD_OUT_FRACTION を変えてください。"
        )
    return training, evaluation


@cache
def divide_concepts(seed: int, held_out_fraction: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return (trained, held-out) concepts, fields alternating; what the notebooks ask about is always
    trained.
    """
    always = {fact.concept for fact, _ in list_asked()} | set(FIELDS)
    trained, held = [], []
    for field in FIELDS:
        names = sorted(name for name, (own, _) in list_groups().items() if own == field)
        free = _shuffle([name for name in names if name not in always], f"{seed}/concepts/{field}")
        count = max(2, round(len(names) * held_out_fraction * CONCEPT_SHARE))
        held.append(free[:count])
        trained.append(_shuffle([*free[count:], *(always & set(names))], f"{seed}/trained/{field}"))
    return tuple(_interleave(trained)), tuple(_interleave(held))


def _shuffle(items, key: str) -> list:
    """Shuffle by a string key. Only random() is used: its sequence is the same on every Python version."""
    draw = random.Random(key)
    return sorted(items, key=lambda _: draw.random())


def _interleave(columns: list[list]) -> list:
    longest = max(map(len, columns))
    return [column[i] for i in range(longest) for column in columns if i < len(column)]


def _find_group(concept: str) -> dict:
    field, group = list_groups()[concept]
    return load_topics()["facts"][field][group]


def _list_facts(concepts, seed: int) -> list[Fact]:
    """Return all facts of the concepts: first one of each concept, then a second of each, and so on."""
    forms = {name: _shuffle(list_forms(), f"{seed}/forms/{name}") for name in concepts}
    groups = list_groups()
    return [
        Fact(groups[name][0], name, forms[name][turn])
        for turn in range(len(list_forms()))
        for name in concepts
    ]


def _plan_training(count: int, concepts, seed: int) -> list[tuple[Fact, str, list[str]]]:
    """Return (fact, held-out question, questions to train on) of the facts that `count` rows teach.

    Every fact is taught in two wordings before a further fact is taken.
    """
    asked = dict(list_asked())
    facts = [*asked, *(fact for fact in _list_facts(concepts, seed) if fact not in asked)]
    plan = []
    for fact in facts[: max(len(asked), -(-count // 2))]:
        order = _shuffle(list_wordings(fact), f"{seed}/wordings/{fact.concept}/{fact.form}")
        held = asked.get(fact, order[0])
        plan.append((fact, held, [question for question in order if question != held]))
    return plan


def _train_cells(count: int, concepts, seed: int) -> list[tuple[Fact, str]]:
    plan = _plan_training(count, concepts, seed)
    return [(fact, questions[turn]) for turn in range(2) for fact, _, questions in plan]


def _new_wording_cells(count: int, concepts, seed: int) -> list[tuple[Fact, str]]:
    """Return the held-out question of every trained fact, those that the notebooks ask first."""
    plan = [(fact, held) for fact, held, _ in _plan_training(count, concepts, seed)]
    asked = len(list_asked())
    return plan[:asked] + _shuffle(plan[asked:count], f"{seed}/new wording")


def _new_concept_cells(concepts, seed: int) -> list[tuple[Fact, str]]:
    facts = _list_facts(concepts, seed)
    order = {
        fact: _shuffle(list_wordings(fact), f"{seed}/wordings/{fact.concept}/{fact.form}") for fact in facts
    }
    return [(fact, order[fact][turn]) for turn in range(3) for fact in facts]


def _fill_cells(cells: list[tuple[Fact, str]], count: int, side, seed: int, unseen: str) -> list[dict]:
    """Make `count` rows of (fact, question) cells, round after round, with the kinds in their shares.

    A cell whose rejected answers are used up is passed over; no fact has one kind twice in a row.
    """
    rows, used, last, by_kind = [], set(), {}, Counter()
    for number in range(len(cells) * len(KIND_SHARES) * CHOICES):
        if len(rows) == count:
            break
        fact, question = cells[number % len(cells)]
        kinds = _shuffle(_list_kinds(fact), f"{seed}/kinds/{unseen}/{number}")
        for kind in sorted(kinds, key=lambda k: (k == last.get(fact), (by_kind[k] + 1) / KIND_SHARES[k])):
            left = [
                text for text in _choose(kind, fact, question, side, seed) if (question, text) not in used
            ]
            if left:
                # in turn longer and shorter than the chosen answer, where there is a choice
                left.sort(key=lambda text: (len(text) > len(tell_fact(fact))) != by_kind[kind] % 2)
                rows.append(_make_row(fact, question, left[0], kind, unseen))
                used.add((question, left[0]))
                by_kind[kind] += 1
                last[fact] = kind
                break
    if len(rows) < count:
        raise UserError(
            f"生成できる行が足りません（必要：{count:,} 行、作れるのは {len(rows):,} 行まで）。"
            "NUM_SAMPLES を減らしてください。"
        )
    return rows


def _make_row(fact: Fact, question: str, rejected: str, kind: str, unseen: str) -> dict:
    return {
        "prompt": make_prompt(question),
        "chosen": tell_fact(fact),
        "rejected": rejected,
        "field": fact.field,
        "concept": fact.concept,
        "question_form": fact.form,
        "rejection_kind": kind,
        "unseen": unseen,
    }


def _list_kinds(fact: Fact) -> list[str]:
    """Return the kinds of rejected answer that are false beyond doubt.

    Much of what is true of a concept is also true of the field that it belongs to.
    """
    is_field = "wrong_from" in _find_group(fact.concept) and fact.form not in ("definition", "mechanism")
    return [kind for kind in KIND_SHARES if not (is_field and kind == "wrong_fact")]


def make_rejected(kind: str, fact: Fact, side) -> list[str]:
    """Return every rejected answer of one kind for one question; false facts come from concepts of `side`."""
    chosen = tell_fact(fact)
    others = [Fact(fact.field, fact.concept, form) for form in list_forms() if form != fact.form]
    if kind == "wrong_fact":
        return [tell_fact(other, fact.concept) for other in _list_wrong_facts(fact, side)]
    if kind == "off_form":
        return [tell_fact(other) for other in others]
    if kind == "unfinished":
        return _unfinished(chosen, fact.concept, [tell_fact(other) for other in others])
    if kind == "repetitive":
        return _repetitive(chosen, fact.concept)
    return [text.format(fact.concept) for text in load_topics()["rejections"][kind]]


def _list_wrong_facts(fact: Fact, side) -> list[Fact]:
    """Return facts of the same field and form that are false under this concept's name: of no near
    concept.
    """
    field, group = list_groups()[fact.concept]
    allowed = _find_group(fact.concept).get("wrong_from")
    near = {name for pair in load_topics()["near"] if fact.concept in pair for name in pair}
    found = []
    for name in side:
        own, its_group = list_groups()[name]
        if own != field or name in near or its_group == group or (allowed and its_group not in allowed):
            continue
        other = Fact(field, name, fact.form)
        if fact.concept not in tell_fact(other).replace(name, ""):
            found.append(other)
    return found


def _unfinished(chosen: str, concept: str, others: list[str]) -> list[str]:
    """Cut sentences in the middle: the chosen one, or another fact followed by the beginning of the chosen
    one.
    """
    shorter = [chosen[: int(len(chosen) * share)] for share in (0.6, 0.7, 0.8, 0.9)]
    longer = [(other + chosen)[: len(chosen) + extra] for other in others for extra in (1, 2, 3, 4)]
    return [text for text in shorter + longer if text[-1] not in "。、" and concept in text]


def _repetitive(chosen: str, concept: str) -> list[str]:
    """Repeat a piece of the answer, or a filler of plain kana, as a model that is stuck does.

    A kanji can cost three tokens: what repeats the answer stays short, and the fillers serve above that.
    """
    start = chosen.index("、") + 1 if "、" in chosen[:-8] else len(concept) + 1
    pieces = [chosen[start : start + size] for size in (3, 4, 5, 6, 8)]
    loops = [piece * times for piece in pieces for times in range(3, 12) if len(piece) * times < 24]
    loops += [
        filler * times
        for filler in ("とても、", "それは、", "つまり、", "なので、")
        for times in range(3, 12)
    ]
    return [f"{concept}は、{loop.rstrip('。、')}です。" for loop in loops]


@cache
def _choose(kind: str, fact: Fact, question: str, side: tuple[str, ...], seed: int) -> list[str]:
    """Pick four rejected answers, in turn longer and shorter than the chosen one; one side fills in for the
    other.

    Their lengths are near the chosen one's, so that a text far from the usual length gives nothing away
    either.
    """
    length, prompt = len(tell_fact(fact)), make_prompt(question)
    texts = sorted({text for text in make_rejected(kind, fact, side) if _weigh(prompt + text) < HEAVIEST})
    texts = _shuffle(texts, f"{seed}/{question}/{kind}")
    texts.sort(
        key=lambda text: abs(len(text) - length) // NEAR
    )  # stable: near lengths first, in random order
    longer = [text for text in texts if len(text) > length]
    shorter = [text for text in texts if len(text) < length]
    return (_interleave([longer, shorter]) if longer and shorter else texts)[:CHOICES]


def _weigh(text: str) -> int:
    return len(text) + sum("一" <= letter <= "鿿" for letter in text)
