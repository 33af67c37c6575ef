import pytest

from dpo_helpers.data.tokens import encode_prompts
from dpo_helpers.model.answer import find_stop_tokens, generate_response

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
    first = generate_response(*embedded, QUESTIONS, temperature=1.5, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert first == generate_response(*embedded, QUESTIONS, temperature=1.5, seed=1)
    assert first != generate_response(*embedded, QUESTIONS, temperature=1.5, seed=2)


def test_a_model_in_training_goes_on_in_training(embedded):
    model, tokenizer = embedded
    model.train()
    generate_response(model, tokenizer, QUESTIONS[0], max_new_tokens=2)
    assert model.training
    model.eval()


def test_the_models_own_stop_tokens_end_an_answer_too(embedded):
    model, tokenizer = embedded
    model.generation_config.eos_token_id = [5, 0]
    assert find_stop_tokens(model, tokenizer) == [0, 5]
    model.generation_config.eos_token_id = 0
