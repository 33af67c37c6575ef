"""Answers of a model: batches, limits, sampling, and the roles in which one PeftModel answers."""

from contextlib import contextmanager

import pytest

from dpo_helpers.data.tokens import encode_prompts
from dpo_helpers.model.answer import (
    answer_roles,
    evaluating,
    find_stop_tokens,
    generate_response,
    tabulate_answers,
    use_role,
)

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor "
    "%}{% if add_generation_prompt %}<assistant>{% endif %}"
)
QUESTIONS = ["変数とは何ですか？", "強化学習の利点は何ですか？どんなときに使いますか？", "散布図"]


@pytest.fixture(scope="module")
def embedded(embedded_folder):
    from dpo_helpers.config import RunConfig
    from dpo_helpers.model.load import load_base_model

    return load_base_model(RunConfig(model_name=str(embedded_folder)))


@pytest.mark.parametrize("template", [None, CHAT])
def test_a_question_with_and_without_its_mark_gives_the_same_token_ids(embedded_folder, template):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_folder)
    tokenizer.chat_template = template
    (ids,) = encode_prompts(tokenizer, ["AIとは何ですか？"])
    assert [ids] == encode_prompts(tokenizer, ["質問: AIとは何ですか？"])
    assert tokenizer.decode(ids) == (
        "<user>AIとは何ですか？<|endoftext|><assistant>" if template else "質問: AIとは何ですか？\n回答:\n"
    )


def test_a_list_gives_the_answers_of_one_by_one(embedded):
    together = generate_response(*embedded, QUESTIONS)
    assert together == [generate_response(*embedded, question) for question in QUESTIONS]
    assert all(together) and not any("質問" in answer or "<|endoftext|>" in answer for answer in together)


@pytest.mark.parametrize("number", [0, 1])
def test_out_of_memory_in_any_batch_gives_the_same_answers_from_smaller_ones(
    embedded, monkeypatch, capsys, number
):
    import torch

    model, tokenizer = embedded
    expected, generate, calls = generate_response(model, tokenizer, QUESTIONS), model.generate, []

    def fail_once(input_ids, **options):
        calls.append(len(input_ids))
        if len(calls) == number + 1:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return generate(input_ids=input_ids, **options)

    monkeypatch.setattr(model, "generate", fail_once)
    assert generate_response(model, tokenizer, QUESTIONS, batch_size=2) == expected
    assert calls == [[2], [2, 1]][number] + [1, 1, 1]
    assert "回答の生成で一度に計算する数を 1 に減らして続けます" in capsys.readouterr().out


def test_an_empty_list_has_no_answers(embedded):
    assert generate_response(*embedded, []) == []


def test_an_answer_cut_by_the_limit_ends_in_a_whole_character(embedded):
    for limit in range(1, 12):
        assert "\ufffd" not in generate_response(*embedded, QUESTIONS[0], max_new_tokens=limit)[-1:]


def test_sampling_goes_by_its_seed_and_leaves_the_callers_random_state_alone(embedded):
    import torch

    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = generate_response(*embedded, QUESTIONS, sample_seed=0)
    assert torch.equal(before, torch.get_rng_state())
    assert first == generate_response(*embedded, QUESTIONS, sample_seed=0)
    assert first not in (
        generate_response(*embedded, QUESTIONS, sample_seed=1),
        generate_response(*embedded, QUESTIONS),
    )


def test_a_model_goes_back_into_the_mode_in_which_it_was(embedded):
    import torch

    model, _ = embedded
    for mode in (True, False):
        model.train(mode)
        with evaluating(model):
            assert not model.training and not torch.is_grad_enabled()
        assert model.training == mode and torch.is_grad_enabled()
    model.train()
    with pytest.raises(ValueError, match="in the middle"), evaluating(model):
        raise ValueError("in the middle")
    assert model.training
    model.eval()


class Adapted:
    """Switches roles like a PeftModel, and notes who answers; without a warm-up it has no adapter `ref`."""

    def __init__(self, *adapters):
        self.peft_config, self.answers_as = dict.fromkeys(adapters), "default"

    def set_adapter(self, name):
        self.answers_as = name

    @contextmanager
    def disable_adapter(self):
        before, self.answers_as = self.answers_as, None
        yield
        self.answers_as = before


@pytest.mark.parametrize(
    ("adapters", "expected"),
    [
        (("default", "ref"), {"base": None, "reference": "ref", "policy": "default"}),
        (("default",), {"base": None, "reference": None, "policy": "default"}),
    ],
)
def test_a_role_is_taken_for_a_while(adapters, expected):
    model, found = Adapted(*adapters), {}
    for role in expected:
        with use_role(model, role):
            found[role] = model.answers_as
        assert model.answers_as == "default"
    assert found == expected


def test_each_role_answers_and_a_reference_without_a_warm_up_is_left_out(monkeypatch):
    def answer(model, tokenizer, questions):
        return [f"{model.answers_as}: {question}" for question in questions]

    monkeypatch.setattr("dpo_helpers.model.answer.generate_response", answer)
    assert answer_roles(Adapted("default", "ref"), None, ["A", "B"]) == [
        {"base": "None: A", "reference": "ref: A", "policy": "default: A"},
        {"base": "None: B", "reference": "ref: B", "policy": "default: B"},
    ]
    row = {"prompt": "質問: A\n回答:\n", "chosen": "手本"}
    assert tabulate_answers(Adapted("default"), None, [row]) == [
        {"質問": "A", "① ベースモデル": "None: A", "③ DPO の後": "default: A", "良い回答": "手本"}
    ]


def test_the_models_own_stop_tokens_end_an_answer_too(embedded):
    model, tokenizer = embedded
    model.generation_config.eos_token_id = [5, 0]
    assert find_stop_tokens(model, tokenizer) == [0, 5]
    model.generation_config.eos_token_id = 0
