"""The one template of a question, and the names of a row's sides, which data, evaluation and generation
share.
"""

PROMPT_TEMPLATE = (
    "質問: {question}\n回答:\n"  # ends in a newline: no tokenizer tried merges that with an answer
)
QUESTION_PREFIXES = ("質問:", "質問：")
ANSWER_MARK = "回答:"
SIDES = ("chosen", "rejected")


def strip_question(text: str) -> str:
    """Return the bare question: without 質問: in front, and without the answer's mark of a whole prompt."""
    text = text.strip().removesuffix(ANSWER_MARK).strip()
    for prefix in QUESTION_PREFIXES:
        text = text.removeprefix(prefix).strip()
    return text


def make_prompt(question: str) -> str:
    """Put a question into the one template that data, evaluation and generation share."""
    return PROMPT_TEMPLATE.format(question=strip_question(question))
