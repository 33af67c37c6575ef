from dpo_helpers.config import RunConfig
from dpo_helpers.model_menu import MENU, describe_menu


def test_every_model_of_the_menu_is_a_name_that_the_configuration_takes():
    names = [entry.name for entry in MENU]
    assert len(set(names)) == len(names) and RunConfig().model_name == names[0]
    assert all(name.count("/") == 1 and RunConfig(model_name=name).model_name == name for name in names)


def test_the_table_says_what_a_model_needs_and_what_was_not_measured():
    first, gated = describe_menu()[0], next(row for row in describe_menu() if "gemma" in row["MODEL_NAME"])
    assert (first["重み（float32）"], first["1 文字あたりのトークン"]) == ("0.5 GB", "1.48")  # 117 M × 4 bytes
    assert gated["ライセンス"].endswith("（申請が必要）") and gated["1 文字あたりのトークン"] == "測っていません"


def test_the_measured_tokens_are_those_of_the_tokenizers(gpt2_tokenizer, smollm2_tokenizer, rows):
    texts = [row[name] for row in rows for name in ("prompt", "chosen", "rejected")]
    for tokenizer, name in ((gpt2_tokenizer, "DialoGPT"), (smollm2_tokenizer, "SmolLM2")):
        measured = sum(map(len, tokenizer(texts)["input_ids"])) / sum(map(len, texts))
        assert {entry.tokens_per_character for entry in MENU if name in entry.name} == {round(measured, 2)}
