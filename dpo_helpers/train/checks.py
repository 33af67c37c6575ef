"""Looks before a training whether model, tokenizer, rows and settings fit together; it changes nothing."""

from dpo_helpers.config import RunConfig
from dpo_helpers.data.prompt import SIDES
from dpo_helpers.data.tokens import encode_answers, find_end_of_turn, find_opening
from dpo_helpers.errors import UserError
from dpo_helpers.model.answer import find_stop_tokens


def check_training(model, tokenizer, rows: list[dict], config: RunConfig) -> None:
    """Raise UserError where a library would fail later, or would teach something that is never used.

    `model` is the base model, before an adapter is put on it.
    """
    check_lora_targets(model, config)
    check_token_ids(model, tokenizer, rows)
    check_template(tokenizer)
    check_stop_tokens(model, tokenizer)


def check_lora_targets(model, config: RunConfig) -> None:
    """Refuse an adapter on the output head, which TRL reads past, or on embeddings of its weights."""
    names = {name.strip() for name in config.lora_targets.split(",")}
    paths = {module: path.rsplit(".", 1)[-1] for path, module in model.named_modules()}
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = head is not None and head.weight is embeddings.weight
    if wrong := sorted(names & {paths.get(head), paths[embeddings] if is_tied else None}):
        why = "入力と出力で重みを共有している" if is_tied else "出力の"
        raise UserError(
            f"LORA_TARGETS の {'、'.join(wrong)} は{why}層なので、LoRA を付けられません。"
            "これを除くか、all-linear を選んでください。"
        )


def check_token_ids(model, tokenizer, rows: list[dict]) -> None:
    """Refuse rows with tokens that the model has no embedding for, an IndexError in the midst of training."""
    size = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) <= size:  # no text can give a larger one
        return
    for number, row in enumerate(rows, 1):
        for _, ids in encode_answers(tokenizer, [(row["prompt"], row[side]) for side in SIDES]):
            if max(ids) >= size:
                token = tokenizer.convert_ids_to_tokens(max(ids))
                raise UserError(
                    f"{number} 行目のトークン {token}（番号 {max(ids)}）に、モデルの埋め込み（{size} 個）が"
                    "ありません。モデルと合うトークナイザーを使うか、加えたトークンの数だけ埋め込みを広げて"
                    "（resize_token_embeddings）保存したモデルを MODEL_NAME に書いてください。"
                )


def check_template(tokenizer) -> None:
    """Refuse a chat template whose answers begin otherwise in use than in training, or never end."""
    if opening := find_opening(tokenizer):
        raise UserError(
            f"チャットテンプレートは回答の前に {opening.strip()} を開きますが、学習する回答にはありません。"
            "テンプレートの add_generation_prompt の部分からこれを除いてください。"
        )
    if tokenizer.chat_template and find_end_of_turn(tokenizer) is None:
        raise UserError(
            "チャットテンプレートは回答の終わりに特別なトークンを置かないので、モデルは終わり方を学べません。"
            "終端記号（EOS）を置くテンプレートのモデルを選んでください。"
        )


def check_stop_tokens(model, tokenizer) -> None:
    """Refuse a model that is not stopped at the end of turn that the rows teach it."""
    end = find_end_of_turn(tokenizer)
    if end is not None and end not in find_stop_tokens(model, tokenizer):
        raise UserError(
            f"回答の終わりの {tokenizer.convert_ids_to_tokens(end)} で生成が止まりません。"
            "モデルの generation_config.json の eos_token_id にその番号 "
            f"{end} を加えてください。"
        )
