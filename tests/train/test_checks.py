from types import SimpleNamespace

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dpo_helpers.config import RunConfig
from dpo_helpers.errors import UserError
from dpo_helpers.train.checks import (
    check_lora_targets,
    check_stop_tokens,
    check_template,
    check_token_ids,
    check_training,
)

ROW = {"prompt": "質問: 秋の果物は？\n回答:\n", "chosen": "りんごです。", "rejected": "知りません。"}


@pytest.fixture(scope="module")
def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=64))


@pytest.fixture
def tokenizer(gpt2_tokenizer):
    import copy

    return copy.deepcopy(gpt2_tokenizer)


def test_what_fits_together_passes(gpt2, tokenizer):
    check_training(gpt2, tokenizer, [ROW], RunConfig())


def test_a_token_without_an_embedding_is_named_with_its_row(gpt2, tokenizer):
    tokenizer.add_tokens(["<理由>"])
    check_token_ids(gpt2, tokenizer, [ROW])  # none of the rows uses it
    with pytest.raises(
        UserError, match=r"2 行目のトークン <理由>（番号 50257）に、モデルの埋め込み（50257 個）"
    ):
        check_token_ids(gpt2, tokenizer, [ROW, {**ROW, "chosen": "<理由>りんご"}])


@pytest.mark.parametrize(
    ("is_tied", "targets", "wrong"),
    [
        (True, "q_proj, lm_head", "lm_head は入力と出力で重みを共有している"),
        (True, "embed_tokens,lm_head", "embed_tokens、lm_head は"),
        (False, "lm_head", "lm_head は出力の層"),
        (False, "embed_tokens", ""),
        (True, "q_proj", ""),
        (True, "all-linear", ""),
    ],
)
def test_lora_on_the_output_or_on_tied_embeddings_is_refused(is_tied, targets, wrong):
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            vocab_size=20,
            tie_word_embeddings=is_tied,
        )
    )
    if not wrong:
        check_lora_targets(model, RunConfig(lora_targets=targets))
        return
    with pytest.raises(UserError, match=f"LORA_TARGETS の {wrong}"):
        check_lora_targets(model, RunConfig(lora_targets=targets))


TURNS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"


def test_a_template_that_opens_a_thought_or_never_ends_is_refused(tokenizer):
    tokenizer.chat_template = (
        TURNS + "<|endoftext|>{% endfor %}{% if add_generation_prompt %}assistant: <think>{% endif %}"
    )
    with pytest.raises(UserError, match="回答の前に <think> を開きます"):
        check_template(tokenizer)
    tokenizer.chat_template = TURNS + "\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    with pytest.raises(UserError, match="終わり方を学べません"):
        check_template(tokenizer)


def test_an_end_of_turn_that_does_not_stop_the_model_is_refused(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = TURNS + "<|im_end|>\n{% endfor %}"
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[50256, 50257]))
    check_stop_tokens(model, tokenizer)
    model.generation_config.eos_token_id = 50256
    with pytest.raises(UserError, match=r"<\|im_end\|> で生成が止まりません.*50257 を加えてください"):
        check_stop_tokens(model, tokenizer)
