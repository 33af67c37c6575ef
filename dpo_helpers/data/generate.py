"""Makes the Japanese preference rows (prompt, chosen, rejected) and splits rows; reading files is not done
here.

Two kinds of question are held out. `new_concept`: no training row names the concept. `new_wording`: the same
fact is trained, but asked in other words.
"""

import random
from collections import Counter
from functools import cache

from dpo_helpers.data.prompt import make_prompt
from dpo_helpers.data.topics import (
    FIELDS,
    KIND_SHARES,
    Fact,
    list_asked,
    list_forms,
    list_groups,
    list_kinds,
    list_wordings,
    make_rejected,
    tell_fact,
)
from dpo_helpers.errors import UserError

UNSEEN = ("new_concept", "new_wording")
NEAR = 4  # characters: lengths that differ by less count as equally near
CHOICES = 4  # rejected answers to be had for one prompt and kind: two longer and two shorter than chosen
# Characters plus kanji of prompt and answer: below this, all of them stay within 128 tokens of GPT-2's
# vocabulary.
HEAVIEST = 101
CONCEPT_SHARE = 2 / 3  # of held_out_fraction: ten of 51 concepts a field at 0.3, each asked about five times


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
        trained.append(_shuffle([*free[count:], *sorted(always & set(names))], f"{seed}/trained/{field}"))
    return tuple(_interleave(trained)), tuple(_interleave(held))


def _shuffle(items, key: str) -> list:
    """Shuffle by a string key. Only random() is used: its sequence is the same on every Python version."""
    draw = random.Random(key)
    return sorted(items, key=lambda _: draw.random())


def _interleave(columns: list[list]) -> list:
    longest = max(map(len, columns))
    return [column[i] for i in range(longest) for column in columns if i < len(column)]


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
        kinds = _shuffle(list_kinds(fact), f"{seed}/kinds/{unseen}/{number}")
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
