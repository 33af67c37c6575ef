"""Turns questions into answers with a given model, before or after its training; it neither loads nor
trains one.
"""

from contextlib import contextmanager

from dpo_helpers.data.tokens import encode_prompts
from dpo_helpers.machine import halve_on_out_of_memory

ANSWER_STAGES = {"base": "① ベースモデル", "reference": "② 教師あり学習の後", "policy": "③ DPO の後"}


def generate_response(
    model,
    tokenizer,
    questions,
    max_new_tokens: int = 80,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    batch_size: int = 32,
):
    """Answer one question (str in, str out) or a list of them (list in, list out), without the prompt.

    `temperature` 0 is greedy; above it, tokens are drawn from the smallest set with probability `top_p`,
    reproducibly with `seed` and without touching the caller's random state. An answer ends at EOS or after
    `max_new_tokens`; half a character at that limit is dropped.
    """
    if isinstance(questions, str):
        return generate_response(
            model, tokenizer, [questions], max_new_tokens, temperature, top_p, seed, batch_size
        )[0]
    import torch

    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p}
        if temperature > 0
        else {"do_sample": False}
    )
    limits = {
        "max_new_tokens": max_new_tokens,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": find_stop_tokens(model, tokenizer),
    }
    prompts = encode_prompts(tokenizer, questions)

    def answer_all(size: int) -> list[str]:
        answers = []
        for start in range(0, len(prompts), size):
            # (batch, prompt tokens), padded on the left so that every answer begins in the same column
            batch = tokenizer.pad(
                {"input_ids": prompts[start : start + size]}, padding_side="left", return_tensors="pt"
            )
            ids = model.generate(**batch.to(model.device), **limits, **sampling)
            answers += tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return answers

    was_training = model.training
    model.eval()
    with torch.random.fork_rng(), torch.no_grad():
        if seed is not None:
            torch.manual_seed(seed)
        answers = halve_on_out_of_memory(answer_all, batch_size, "回答の生成")
    model.train(was_training)
    return [answer.rstrip("\ufffd").strip() for answer in answers]


def find_stop_tokens(model, tokenizer) -> list[int]:
    """Return the ids that end an answer: the tokenizer's EOS, and those of the model (a chat model may end
    its turn otherwise).
    """
    own = model.generation_config.eos_token_id
    ids = own if isinstance(own, list) else [own]
    return sorted({tokenizer.eos_token_id, *(token for token in ids if token is not None)})


@contextmanager
def use_stage(model, stage: str):
    """Let a PeftModel answer as "base" (no adapter), "reference" (before DPO) or "policy" (as it is now)."""
    if stage == "policy":
        yield
    elif stage == "base" or "ref" not in model.peft_config:
        with model.disable_adapter():
            yield
    else:
        model.set_adapter("ref")
        try:
            yield
        finally:
            model.set_adapter("default")


def answer_stages(
    model, tokenizer, questions: list[str], stages=tuple(ANSWER_STAGES)
) -> list[dict[str, str]]:
    """Return {stage: greedy answer} for each question; a run without a warm-up has no `reference` of its
    own, so no column.
    """
    columns = {}
    for stage in stages:
        if stage != "reference" or "ref" in model.peft_config:
            with use_stage(model, stage):
                columns[stage] = generate_response(model, tokenizer, questions)
    return [dict(zip(columns, answers, strict=True)) for answers in zip(*columns.values(), strict=True)]
