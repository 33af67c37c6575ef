"""What there is to know and to ask (topics.json), and the bad answers that can be made of it."""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

FIELDS = ("AI", "プログラミング", "データサイエンス")
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


# Forms whose facts nearly answer each other's questions: one is no wrong answer to the other.
CLOSE_FORMS = ({"purpose", "strength"}, {"definition", "mechanism"})


class Fact(NamedTuple):
    """One thing to know: what `form` of question about `concept` it answers."""

    field: str
    concept: str
    form: str


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


def find_group(concept: str) -> dict:
    field, group = list_groups()[concept]
    return load_topics()["facts"][field][group]


def list_wordings(fact: Fact) -> list[str]:
    """Return the three questions that the fact answers; how a mechanism is asked about depends on the
    group.
    """
    wordings = load_topics()["questions"][fact.form]
    if isinstance(wordings, dict):
        wordings = wordings[find_group(fact.concept)["how"]]
    return [wording.format(fact.concept) for wording in wordings]


def tell_fact(fact: Fact, name: str = "") -> str:
    """Return the sentence of a fact, about its own concept or, falsely, about another `name`."""
    sentences = find_group(fact.concept)["concepts"][fact.concept]
    return sentences[list_forms().index(fact.form)].format(name or fact.concept)


def list_asked() -> list[tuple[Fact, str]]:
    """Return (fact, question) of what the notebooks ask: the facts are always trained, these words never."""
    groups = list_groups()
    return [
        (Fact(groups[name][0], name, form), words.format(name))
        for name, form, words in load_topics()["asked"]
    ]


def list_kinds(fact: Fact) -> list[str]:
    """Return the kinds of rejected answer that are false beyond doubt.

    Much of what is true of a concept is also true of the field that it belongs to.
    """
    is_field = "wrong_from" in find_group(fact.concept) and fact.form not in ("definition", "mechanism")
    return [kind for kind in KIND_SHARES if not (is_field and kind == "wrong_fact")]


def make_rejected(kind: str, fact: Fact, side) -> list[str]:
    """Return every rejected answer of one kind for one question; false facts come from concepts of `side`."""
    chosen = tell_fact(fact)
    others = [Fact(fact.field, fact.concept, form) for form in list_forms() if form != fact.form]
    if kind == "wrong_fact":
        return [tell_fact(other, fact.concept) for other in _list_wrong_facts(fact, side)]
    if kind == "off_form":
        return [tell_fact(other) for other in others if {fact.form, other.form} not in CLOSE_FORMS]
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
    allowed = find_group(fact.concept).get("wrong_from")
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
