"""Tiny random models of many architectures go the whole way: load, train, save, reload, the same answers
and log-probs.
"""

import pytest
from tiny_run import train

from dpo_helpers.config import RunConfig
from dpo_helpers.data.generate import generate_preferences, split_rows
from dpo_helpers.data.tokens import encode_prompts
from dpo_helpers.errors import UserError
from dpo_helpers.judge.scores import score_rows
from dpo_helpers.keep.result import load_run, save_model
from dpo_helpers.model.answer import generate_response
from dpo_helpers.model.load import load_base_model, load_tokenizer, make_lora_config

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 256}
GATED = {
    **SHAPE,
    "intermediate_size": 64,
    "num_key_value_heads": 1,
    "head_dim": 16,
}  # the Llama family: gate, up and down
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] "
    "}}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# model type -> (its own settings, layers that all-linear adapts per block, chat template, pad token, epochs
# of warm-up)
ARCHITECTURES = {
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}, 4, False, True, 1),
    "gpt_neox": ({**SHAPE, "intermediate_size": 64}, 4, False, False, 0),
    "llama": (GATED, 7, False, False, 1),
    "mistral": (GATED, 7, False, True, 0),
    "qwen2": (GATED, 7, True, True, 0),
    "qwen3": ({**GATED, "tie_word_embeddings": True}, 7, True, False, 1),
    "gemma": (GATED, 7, True, True, 0),  # its embeddings are tied always
    "gemma3_text": ({**GATED, "layer_types": ["sliding_attention", "full_attention"]}, 7, False, True, 1),
    "phi": ({**SHAPE, "intermediate_size": 64}, 6, False, False, 0),
    "opt": ({**SHAPE, "ffn_dim": 64, "word_embed_proj_dim": 32}, 6, False, True, 0),
}


@pytest.fixture(scope="module")
def rows():
    return generate_preferences(30, seed=42)


@pytest.fixture(scope="module")
def trained(rows):
    """A byte-level BPE, the kind that most of these models have, with <s> and </s> as ids 0 and 1."""
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    texts = [row[name] for row in rows for name in ("prompt", "chosen", "rejected")]
    bpe.train_from_iterator(texts, 500, show_progress=False, special_tokens=["<s>", "</s>"])
    return bpe.to_str()


def make_tokenizer(
    trained: str, template: str | None = None, ends: str | None = "</s>", pad: str | None = "</s>", post=None
):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(trained)
    if post:
        backend.post_processor = post
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=ends, pad_token=pad, chat_template=template
    )


@pytest.fixture(scope="module")
def make_model(tmp_path_factory, trained):
    """A function that writes a random two-layer model of a type, and its tokenizer, into a folder and
    returns it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(kind: str, chat: bool = False, pad: bool = True):
        folder, tokenizer = (
            tmp_path_factory.mktemp(kind),
            make_tokenizer(trained, TEMPLATE if chat else None, pad="</s>" if pad else None),
        )
        ids = {
            "vocab_size": len(tokenizer),
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
            "initializer_range": 0.2,
        }
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **ARCHITECTURES[kind][0], **ids)
        ).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.mark.versions
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_comes_back_as_it_was_trained(kind, make_model, rows, start_run, tmp_path):
    _, layers, chat, pad, sft_epochs = ARCHITECTURES[kind]
    config = RunConfig(
        model_name=str(make_model(kind, chat, pad)),
        max_length=256,
        lora_rank=2,
        learning_rate=1e-2,
        sft_epochs=sft_epochs,
        sft_learning_rate=1e-2,
    )
    train_rows, held_out_rows = rows[:8], split_rows(rows, 0.2, 42)[1][:2]
    run = start_run(config, train_rows, held_out_rows)
    trainer = train(run)
    assert trainer.state.global_step == 2
    adapted = [name for name, _ in trainer.model.named_modules() if name.endswith("lora_A.default")]
    assert len(adapted) == 2 * layers

    model, tokenizer = trainer.model, trainer.processing_class
    save_model(run.folder, model, tokenizer)
    loaded, loaded_tokenizer, _ = load_run(run.folder)
    questions = [row["prompt"] for row in held_out_rows]
    answers = generate_response(model, tokenizer, questions, max_new_tokens=12)
    assert generate_response(loaded, loaded_tokenizer, questions, max_new_tokens=12) == answers
    before, after = (
        score_rows(*pair, held_out_rows, config.max_length)
        for pair in ((model, tokenizer), (loaded, loaded_tokenizer))
    )
    for was, now in zip(before, after, strict=True):
        assert now == pytest.approx(was, abs=1e-4)
        assert abs(was["policy_chosen"] - was["reference_chosen"]) > 0.01  # it did train


@pytest.mark.versions
def test_a_tokenizer_that_ends_every_text_no_longer_does(trained, tmp_path):
    """T5's tokenizer, which rinna's GPT-2 has, and LLaMA's with add_eos_token: a prompt that ends is never
    answered.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer, T5Tokenizer

    both = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    make_tokenizer(trained, TEMPLATE, post=both).save_pretrained(tmp_path / "both")
    tokenizer = load_tokenizer(str(tmp_path / "both"))
    ids = tokenizer("回答")["input_ids"]
    assert ids[0] == 0 and 1 not in ids and tokenizer.chat_template == TEMPLATE

    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -2.0),
        *((letter, -3.0) for letter in "これは日本語の文です。質問回答:AI"),
    ]
    T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(tmp_path / "t5")
    assert AutoTokenizer.from_pretrained(tmp_path / "t5")("AI")["input_ids"][-1] == 1
    tokenizer = load_tokenizer(str(tmp_path / "t5"))
    assert (
        tokenizer("質問: AI")["input_ids"]
        == encode_prompts(tokenizer, ["AI"])[0][: len(tokenizer("質問: AI")["input_ids"])]
    )
    tokenizer.save_pretrained(tmp_path / "run")
    for again in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "run")):
        assert 1 not in again("質問: AI")["input_ids"] and (again.eos_token_id, again.pad_token_id) == (1, 0)


def test_a_tokenizer_without_an_end_is_refused(trained, tmp_path):
    make_tokenizer(trained, ends=None).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="終端記号"):
        load_tokenizer(str(tmp_path))


@pytest.mark.versions
def test_a_tokenizer_that_loses_the_text_is_refused(make_model):
    """Transformers gives a Qwen2 folder Qwen2's own class, which reads a tokenizer of another kind wrongly
    without a word.
    """
    from dpo_helpers.model.embedded import _train_tokenizer

    folder = make_model("qwen2")
    _train_tokenizer(["質問と回答の文です。"] * 3, {"vocabulary": 50}).save_pretrained(folder)
    with pytest.raises(UserError, match="日本語を表せません"):
        load_tokenizer(str(folder))


def test_a_missing_tokenizer_package_is_named(monkeypatch, make_model):
    import transformers

    def refuse(*_):
        raise ImportError("requires the protobuf library")

    folder = make_model("gpt2")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(UserError, match="pip install sentencepiece protobuf"):
        load_tokenizer(str(folder))


def test_a_repository_without_safetensors_says_how_to_convert_it(monkeypatch, make_model):
    import transformers

    def refuse(*_, **__):
        raise OSError("x/y does not appear to have a file named model.safetensors")

    folder = make_model("gpt2")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(UserError, match="use_safetensors=False") as error:
        load_base_model(RunConfig(model_name=str(folder)))
    assert str(folder) in str(error.value).split("safetensors", 1)[1]


@pytest.mark.versions
def test_peft_names_the_default_layers_or_says_that_it_does_not_know(make_model):
    from transformers import AutoModelForCausalLM, Phi3Config

    config = RunConfig(lora_targets="default")
    neox, _ = load_base_model(RunConfig(model_name=str(make_model("gpt_neox"))))
    assert make_lora_config(config, neox).target_modules is None  # PEFT fills in query_key_value
    phi3 = AutoModelForCausalLM.from_config(
        Phi3Config(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=50,
            pad_token_id=0,
        )
    )
    with pytest.raises(UserError, match=r"phi3.*all-linear"):
        make_lora_config(config, phi3)
