"""Measures generated answers: repetition, variety, length, ends, script, likeness to the chosen ones; it
judges nothing.
"""

import math
import re

from dpo_helpers.data.generate import strip_question
from dpo_helpers.data.look import pick_rows
from dpo_helpers.data.tokens import encode_answers
from dpo_helpers.judge.scores import score_answers
from dpo_helpers.model.answer import evaluating, use_role

ROLES = {"before": "base", "after": "policy"}  # the names in metrics.json, and those of inference.use_role
LOOP_LENGTH, LOOP_COUNT = 4, 3  # four characters that stand three times or more are a loop
ENDINGS = ("。", "！", "？", "!", "?")  # 。 has no ASCII twin: a plain dot also stands in 3.14 and e.g.
JAPANESE = re.compile(r"[぀-ヿ㐀-䶿一-鿿ｦ-ﾟ々]")  # kana, kanji, half-width kana
Z_95 = 1.959964  # the 97.5 % point of the normal distribution


def accuracy_interval(successes: int, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval (Wilson 1927) of a share; unlike p ± 2 s it has a width at 0 and 1,
    and in few rows.
    """
    share, square = successes / count, Z_95**2
    middle = share + square / (2 * count)
    half = Z_95 * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    low, high = ((middle + sign * half) / (1 + square / count) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)  # at 0 and 1 the formula is exact, the rounding is not


def has_loop(answer: str) -> bool:
    """Say whether some four characters in a row stand three times or more in one answer, overlaps counted."""
    grams = [answer[i : i + LOOP_LENGTH] for i in range(len(answer) - LOOP_LENGTH + 1)]
    return any(grams.count(gram) >= LOOP_COUNT for gram in set(grams))


def check_answer(answer: str, concept: str = "") -> dict[str, bool]:
    """Say of one answer whether it ends with 。, names the concept undamaged and is clean: no loop, no
    U+FFFD (half a character).
    """
    return {
        "ends": answer.endswith("。"),
        "names": concept in answer,
        "clean": bool(answer) and "\ufffd" not in answer and not has_loop(answer),
    }


def measure_distinct(answers: list[str]) -> float:
    """Return distinct-2 (Li et al. 2016) of characters: different bigrams over all bigrams of all answers; 0
    for none.

    It falls as there are more answers, so compare only the same number of them.
    """
    bigrams = [answer[i : i + 2] for answer in answers for i in range(len(answer) - 1)]
    return len(set(bigrams)) / len(bigrams) if bigrams else 0.0


def measure_japanese(answers: list[str]) -> float:
    """Return the share of kana and kanji among all letters (digits and punctuation are none); 0 for no
    letters.
    """
    letters = [character for answer in answers for character in answer if character.isalpha()]
    return sum(bool(JAPANESE.match(letter)) for letter in letters) / len(letters) if letters else 0.0


def measure_answers(
    answers: list[str], references: list[str], cut: list[bool] | None = None
) -> dict[str, float]:
    """Return what can be said of answers without reading them; `cut` marks those that the limit ended, not
    the model.

    repetition: share of answers with a loop; distinct_2; mean_length in characters; ends: share whose last
    character is 。！？ and that were not cut; japanese; chrf: 0 to 100, corpus level (Popović 2015: character
    1- to 6-grams, beta 2).
    """
    from sacrebleu.metrics import CHRF  # here, because it costs a moment and few functions need it

    count = len(answers)
    whole = [not each for each in cut] if cut else [True] * count
    return {
        "answers": count,
        "repetition": sum(map(has_loop, answers)) / count,
        "distinct_2": measure_distinct(answers),
        "mean_length": sum(map(len, answers)) / count,
        "ends": sum(
            is_whole and answer.endswith(ENDINGS) for answer, is_whole in zip(answers, whole, strict=True)
        )
        / count,
        "japanese": measure_japanese(answers),
        "chrf": CHRF().corpus_score(answers, [references]).score,
    }


def compare_generation(
    model, tokenizer, rows: list[dict], config, count: int = 40
) -> tuple[dict[str, dict], list[dict]]:
    """Let the base and the policy answer the same held-out questions greedily; return (measures, answers).

    The measures are {"before": ..., "after": ..., "chosen": ...} as `measure_answers` gives them; the last
    one is of the chosen answers themselves, because nobody's answers need to end or be Japanese more often
    than those do. The answers are a table of prompt, before, after and chosen, a line for each of
    `pick_rows(rows, count, config.seed)`.
    """
    from dpo_helpers.model.answer import generate_response

    asked = pick_rows(rows, count, config.seed)
    references = [row["chosen"] for row in asked]
    limit = _limit_answers(tokenizer, asked, config.max_length)
    measures, texts = {}, {}
    for name, role in ROLES.items():
        with use_role(model, role):
            texts[name] = generate_response(
                model, tokenizer, [strip_question(row["prompt"]) for row in asked], max_new_tokens=limit
            )
        # an answer that ended by itself spent one of its tokens on EOS
        cut = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) >= limit for text in texts[name]]
        measures[name] = measure_answers(texts[name], references, cut)
    measures["chosen"] = measure_answers(references, references)
    columns = {"prompt": [row["prompt"] for row in asked], **texts, "chosen": references}
    return measures, [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def _limit_answers(tokenizer, rows: list[dict], max_length: int) -> int:
    """Return how many tokens an answer may have: a little more than the longest chosen one, within the
    trained length.
    """
    pairs = [(row["prompt"], row["chosen"]) for row in rows]
    encoded = [(ids[:max_length], len(start)) for start, ids in encode_answers(tokenizer, pairs)]
    longest_prompt = max(prompt_length for _, prompt_length in encoded)
    longest_answer = max(len(ids) - prompt_length for ids, prompt_length in encoded)
    return max(16, min(longest_answer + 16, max_length - longest_prompt))


def measure_reference_distance(model, tokenizer, pairs: list[tuple[str, str]], max_length: int) -> float:
    """Estimate how far the policy is from its reference: mean of log p_policy - log p_reference per token, in
    nats.

    `pairs` are prompts and the policy's own answers. For sampled answers the mean over answers would be a
    Monte Carlo estimate of the KL divergence; greedy answers are the policy's likeliest ones, so it is a
    proxy that can only be compared with itself. EOS counts as a token of every answer, also of a cut one.
    """
    scores = {}
    for role in ("policy", "reference"):
        with evaluating(model), use_role(model, role):
            scores[role] = score_answers(model, tokenizer, pairs, max_length)
    tokens = []
    for start, ids in encode_answers(tokenizer, pairs):
        ids, prompt_length = ids[:max_length], len(start)
        tokens.append(
            max(1, len(ids) - prompt_length)
        )  # a prompt that fills max_length leaves none, and a difference of 0
    differences = zip(scores["policy"], scores["reference"], tokens, strict=True)
    return sum((policy - reference) / count for policy, reference, count in differences) / len(pairs)
