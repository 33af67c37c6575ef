"""Turns questions into answers with a given model, in one of its roles; it neither loads nor trains one."""

from contextlib import contextmanager

from dpo_helpers.data.prompt import strip_question
from dpo_helpers.data.tokens import encode_prompts, find_end_of_turn
from dpo_helpers.machine import halve_on_out_of_memory

# The roles of one PeftModel, as a reader meets them. The reference is the model before DPO.
ANSWER_ROLES = {"base": "① ベースモデル", "reference": "② 教師あり学習の後", "policy": "③ DPO の後"}


@contextmanager
def evaluating(model):
    """Put a model into evaluation without gradients, and back into the mode in which it was."""
    import torch

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


@contextmanager
def use_role(model, role: str):
    """Let a PeftModel answer as "base" (no adapter), "reference" (before DPO) or "policy" (as it is now)."""
    if role == "policy":
        yield
    elif role == "base" or "ref" not in model.peft_config:
        with model.disable_adapter():
            yield
    else:
        model.set_adapter("ref")
        try:
            yield
        finally:
            model.set_adapter("default")


def generate_response(
    model,
    tokenizer,
    questions,
    max_new_tokens: int = 80,
    sample_seed: int | None = None,
    batch_size: int = 32,
):
    """Answer one question (str in, str out) or a list of them (list in, list out), without the prompt.

    Greedy, or, with a `sample_seed`, drawn at temperature 1 from the whole distribution, reproducibly and
    without touching the caller's random state. An answer ends at EOS or after `max_new_tokens`; half a
    character at that limit is dropped.
    """
    if isinstance(questions, str):
        return generate_response(model, tokenizer, [questions], max_new_tokens, sample_seed, batch_size)[0]
    import torch

    greedy = sample_seed is None
    options = {
        "do_sample": not greedy,
        **({} if greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}),
        "max_new_tokens": max_new_tokens,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": find_stop_tokens(model, tokenizer),
    }
    prompts = encode_prompts(tokenizer, questions)

    def answer_all(size: int) -> list[str]:
        if not greedy:
            torch.manual_seed(sample_seed)
        answers = []
        for start in range(0, len(prompts), size):
            # (batch, prompt tokens), padded on the left so that every answer begins in the same column
            ids = {"input_ids": prompts[start : start + size]}
            batch = tokenizer.pad(ids, padding_side="left", return_tensors="pt")
            made = model.generate(**batch.to(model.device), **options)
            answers += tokenizer.batch_decode(
                made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
            )
        return answers

    with evaluating(model), torch.random.fork_rng():
        answers = halve_on_out_of_memory(answer_all, batch_size, "回答の生成")
    return [answer.rstrip("\ufffd").strip() for answer in answers]


def find_stop_tokens(model, tokenizer) -> list[int]:
    """Return the ids that end an answer: the tokenizer's EOS, and the model's (a chat model may end
    otherwise).
    """
    own = model.generation_config.eos_token_id
    ids = own if isinstance(own, list) else [own]
    ids = [tokenizer.eos_token_id, find_end_of_turn(tokenizer), *ids]
    return sorted({token for token in ids if token is not None})


def answer_roles(model, tokenizer, questions: list[str], roles=tuple(ANSWER_ROLES)) -> list[dict[str, str]]:
    """Return {role: greedy answer} for each question; without a warm-up there is no `reference` of its
    own.
    """
    columns = {}
    for role in roles:
        if role != "reference" or "ref" in model.peft_config:
            with use_role(model, role):
                columns[role] = generate_response(model, tokenizer, questions)
    return [dict(zip(columns, answers, strict=True)) for answers in zip(*columns.values(), strict=True)]


def tabulate_answers(model, tokenizer, rows: list[dict], roles=tuple(ANSWER_ROLES)) -> list[dict]:
    """Answer the rows' questions in each role; return table rows with the chosen answers beside."""
    questions = [strip_question(row["prompt"]) for row in rows]
    answers = answer_roles(model, tokenizer, questions, roles)
    return [
        {
            "質問": question,
            **{ANSWER_ROLES[role]: text for role, text in texts.items()},
            "良い回答": row["chosen"],
        }
        for question, texts, row in zip(questions, answers, rows, strict=True)
    ]
