"""Measures what a model writes: whether an answer says the right thing, in good manners; it judges nothing.

An answer counts by the text that it is nearest to, by sentence chrF (Popović 2015, as sacrebleu computes it).
What the question itself gives away is taken out first: a model that repeats the question has said nothing.
"""

import re
from functools import lru_cache
from typing import NamedTuple

from dpo_helpers.data.prompt import strip_question
from dpo_helpers.data.tokens import encode_answers
from dpo_helpers.model.answer import evaluating, generate_response, use_role

BAD_MANNERS = ("vague", "evasive", "rude")  # the kinds of rejected answer that are a matter of manners
SHORTEST_RUN = 3  # characters of the question that count as repeated
SHORTLIST = 12  # texts whose chrF is worked out: those that share the most pairs of characters
LOOP_LENGTH, LOOP_COUNT = 4, 3  # four characters that stand three times or more are a loop
ENDINGS = ("。", "！", "？", "!", "?")  # 。 has no ASCII twin: a plain dot also stands in 3.14 and e.g.
JAPANESE = re.compile(r"[぀-ヿ㐀-䶿一-鿿ｦ-ﾟ々]")  # kana, kanji, half-width kana
MEASURES = ("right", "names", "ends", "loops", "japanese", "manners")


class Interval(NamedTuple):
    low: float
    high: float


def share_interval(successes: int, count: int) -> Interval:
    """Return Wilson's 95 % interval of a share (Wilson 1927)."""
    from scipy.stats import binomtest

    found = binomtest(successes, count).proportion_ci(method="wilson")
    return Interval(float(found.low), float(found.high))


def paired_difference(before: list[bool], after: list[bool]) -> tuple[float, Interval]:
    """Return (share after minus share before of the same questions, its 95 % interval).

    The interval is that of Agresti and Min (2005): half a question is added to each cell of the 2 × 2 table,
    so that it has a width where nothing changed.
    """
    count = len(before)
    won = sum(b < a for b, a in zip(before, after, strict=True))
    lost = sum(b > a for b, a in zip(before, after, strict=True))
    total, up, down = count + 2, won + 0.5, lost + 0.5
    middle = (up - down) / total
    half = 1.959964 * ((up + down) - (up - down) ** 2 / total) ** 0.5 / total
    return (won - lost) / count, Interval(max(-1.0, middle - half), min(1.0, middle + half))


def has_loop(answer: str) -> bool:
    """Say whether some four characters in a row stand three times or more in one answer, overlaps counted."""
    grams = [answer[i : i + LOOP_LENGTH] for i in range(len(answer) - LOOP_LENGTH + 1)]
    return any(grams.count(gram) >= LOOP_COUNT for gram in set(grams))


def measure_japanese(text: str) -> float:
    """Return the share of kana and kanji among all letters (digits and punctuation are none); 0 for no
    letters.
    """
    letters = [character for character in text if character.isalpha()]
    return sum(bool(JAPANESE.match(letter)) for letter in letters) / len(letters) if letters else 0.0


@lru_cache(maxsize=10_000)
def _runs_of(text: str) -> frozenset[str]:
    return frozenset(text[i : i + SHORTEST_RUN] for i in range(len(text) - SHORTEST_RUN + 1))


@lru_cache(maxsize=200_000)
def take_out(text: str, question: str, concept: str) -> str:
    """Return the text without the concept's name and without every run of 3 or more characters of the
    question.
    """
    if concept and concept in text:
        text = text.replace(concept, "\0")
    if _runs_of(text).isdisjoint(_runs_of(question)):  # most texts share nothing with most questions
        return text.replace("\0", "")
    kept, start = [], 0
    while start < len(text):
        end = start
        while end < len(text) and text[start : end + 1] in question:
            end += 1
        if end - start < SHORTEST_RUN:
            kept.append(text[start])
            end = start + 1
        start = end
    return "".join(kept).replace("\0", "")


@lru_cache(maxsize=200_000)
def _pair_bits(text: str) -> int:
    """Return the text's pairs of characters as a set of 4,096 bits: quick to intersect."""
    bits = 0
    for i in range(len(text) - 1):
        bits |= 1 << ((ord(text[i]) * 31 + ord(text[i + 1])) % 4096)
    return bits


def find_nearest(text: str, candidates: list[str]) -> str | None:
    """Return the candidate with the highest sentence chrF; None for an empty text and for a tie of
    different ones.
    """
    if not text.strip():
        return None
    bits, different = _pair_bits(text), set(candidates)
    shared = {
        each: (bits & (own := _pair_bits(each))).bit_count() / (own.bit_count() + 8) for each in different
    }
    scores = {each: _chrf(text, each) for each in sorted(different, key=shared.get, reverse=True)[:SHORTLIST]}
    best = max(scores.values())
    first, *others = [each for each, score in scores.items() if score == best]
    return None if others or best == 0 else first


@lru_cache(maxsize=200_000)
def _chrf(text: str, reference: str) -> float:
    return _metric().sentence_score(text, [reference]).score


@lru_cache(maxsize=1)
def _metric():
    from sacrebleu.metrics import CHRF

    return CHRF()


def write_answers(model, tokenizer, rows: list[dict], config, roles) -> dict[str, dict[str, list[str]]]:
    """Let each role answer the rows' questions; return {role: {"greedy": texts, "sampled": texts}}.

    Sampled is what a chat shows: temperature 1, seeded by the run's seed.
    """
    questions = [strip_question(row["prompt"]) for row in rows]
    limit, written = _limit_answers(tokenizer, rows, config.max_length), {}
    for role in roles:
        with evaluating(model), use_role(model, role):
            written[role] = {
                "greedy": generate_response(model, tokenizer, questions, limit),
                "sampled": generate_response(model, tokenizer, questions, limit, sample_seed=config.seed),
            }
    return written


def _limit_answers(tokenizer, rows: list[dict], max_length: int) -> int:
    """Return how many tokens an answer may have: a little more than the longest chosen one, within the
    trained length.
    """
    encoded = encode_answers(tokenizer, [(row["prompt"], row["chosen"]) for row in rows])
    longest_prompt = max(len(start) for start, _ in encoded)
    longest_answer = max(len(ids) - len(start) for start, ids in encoded)
    return max(16, min(longest_answer + 16, max_length - longest_prompt))


def check_answers(answers: list[str], asked: list[dict], all_rows: list[dict]) -> list[dict]:
    """Say of each answer to the rows `asked` whether it is right, names, ends, loops, and has bad manners.

    right: nearest to the row's own chosen answer among those of all rows. names: holds the concept's name
    (True where rows have none). japanese: the share of Japanese letters. manners: nearest to a rejected
    answer of the kinds of BAD_MANNERS; for rows without kinds, nearer to the row's own rejected answer than
    to its chosen one.
    """
    chosen = list(dict.fromkeys(row["chosen"] for row in all_rows))
    bad = list(dict.fromkeys(row["rejected"] for row in all_rows if row.get("rejection_kind") in BAD_MANNERS))
    checks = []
    for answer, row in zip(answers, asked, strict=True):
        question, concept = strip_question(row["prompt"]), row.get("concept", "")
        said = take_out(answer, question, concept)
        right, wrong = ([take_out(text, question, concept) for text in texts] for texts in (chosen, bad))
        own = take_out(row["chosen"], question, concept)
        if "rejection_kind" not in row:
            wrong, nearby = [take_out(row["rejected"], question, concept)], [own]
        else:
            nearby = right
        checks.append(
            {
                "right": find_nearest(said, right) == own,
                "names": concept in answer,
                "ends": answer.endswith(ENDINGS),
                "loops": has_loop(answer),
                "japanese": measure_japanese(answer),
                "manners": find_nearest(said, [*nearby, *wrong]) in set(wrong) - {own},
            }
        )
    return checks


def summarize_checks(checks: list[dict]) -> dict:
    """Return questions, the share of each measure, and Wilson's 95 % interval of `right` and `manners`."""
    count = len(checks)
    summary = {"questions": count} | {name: sum(check[name] for check in checks) / count for name in MEASURES}
    intervals = {
        name: share_interval(sum(check[name] for check in checks), count) for name in ("right", "manners")
    }
    return summary | {"interval": {name: list(interval) for name, interval in intervals.items()}}
