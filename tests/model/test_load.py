"""Names, folders and tokens of a model: what is wrong with them is told; the adapter on a model."""

import pytest

from dpo_helpers.config import RunConfig
from dpo_helpers.errors import UserError
from dpo_helpers.model.load import (
    check_trainable_precision,
    count_parameters,
    find_model,
    load_base_model,
    make_lora_config,
)


def test_no_network_says_how_to_go_on_without_one():
    with pytest.raises(UserError, match="手元にも保存されていません") as error:
        find_model("microsoft/DialoGPT-small")
    assert "embedded" in str(error.value) and "ローカルのフォルダ" in str(error.value)


def test_a_name_that_the_hub_does_not_know_is_told_apart_from_no_network(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    def refuse(*_):
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(UserError, match=r"(?s)見つかりません。名前のつづり.*MODEL_NAME"):
        find_model("microsoft/DialoGTP-small")


def test_a_gated_model_says_where_to_ask_for_it(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def refuse(*_):
        raise GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(UserError, match="条件に同意") as error:
        find_model("google/gemma-3-270m")
    words = ("google/gemma-3-270m", "https://huggingface.co/settings/tokens", "シークレット", "HF_TOKEN")
    assert all(word in str(error.value) for word in words)


def test_an_impossible_name_is_a_wrong_name():
    with pytest.raises(UserError, match="つづり"):
        find_model("名前 と空白")


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "a/b/c", "~/absent"])
def test_a_folder_that_does_not_exist_is_called_a_folder(name):
    with pytest.raises(UserError, match=r"モデルのフォルダ .* が見つかりません"):
        find_model(name)


def test_a_folder_without_a_model_names_what_is_missing(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"足りないもの：\*\.safetensors"):
        find_model(str(tmp_path))


def test_a_broken_model_folder_says_so(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="読み込めません"):
        load_base_model(RunConfig(model_name=str(tmp_path)))


@pytest.mark.versions
@pytest.mark.parametrize("layout", ["gpt2", "llama"])
def test_the_adapter_sits_on_every_layer_of_both_layouts(tiny_models, layout, recwarn):
    from peft import get_peft_model

    model, _ = load_base_model(RunConfig(model_name=str(tiny_models[layout])))
    lora = make_lora_config(RunConfig(lora_rank=4, lora_scale=8.0), model)
    adapted = get_peft_model(model, lora)
    layers = {name.split(".lora_A")[0] for name, p in adapted.named_parameters() if "lora_A" in name}
    assert len(layers) == {"gpt2": 2 * 4, "llama": 2 * 7}[layout] and not any(
        "lm_head" in name for name in layers
    )
    assert adapted.peft_config["default"].lora_alpha == 32 and lora.fan_in_fan_out == (layout == "gpt2")
    assert not [str(warning.message) for warning in recwarn if "fan_in_fan_out" in str(warning.message)]
    trainable, total = count_parameters(adapted)
    assert trainable == sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n)
    assert total == sum(p.numel() for p in adapted.parameters())


def test_a_layer_that_does_not_exist_is_refused(tiny_models):
    model, _ = load_base_model(RunConfig(model_name=str(tiny_models["gpt2"])))
    assert make_lora_config(RunConfig(lora_targets="c_attn, c_proj"), model).target_modules == {
        "c_attn",
        "c_proj",
    }
    with pytest.raises(UserError, match="q_proj"):
        make_lora_config(RunConfig(lora_targets="c_attn,q_proj"), model)


def test_trainable_parameters_in_half_precision_are_refused(tiny_models):
    import torch

    model, _ = load_base_model(RunConfig(model_name=str(tiny_models["gpt2"])))
    check_trainable_precision(model)
    model.transformer.wte.weight.data = model.transformer.wte.weight.data.to(torch.float16)
    with pytest.raises(UserError, match=r"1 個が float32 ではありません"):
        check_trainable_precision(model)


def test_the_embedded_model_is_made_once(embedded_folder, monkeypatch):
    import transformers

    from dpo_helpers.model.embedded import make_embedded_model

    monkeypatch.setattr(transformers.GPT2LMHeadModel, "forward", None)  # a second build would fail
    assert make_embedded_model() == embedded_folder


def test_the_embedded_tokenizer_gives_back_every_text(embedded_folder, rows):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_folder)
    for text in ["龍𠮷😀 ~é\n", *(row["prompt"] + row["rejected"] for row in rows[:200])]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
