"""Loads a tokenizer and a base model (Hub, folder or the embedded one) and describes the LoRA put on it."""

from pathlib import Path

from dpo_helpers.config import RunConfig
from dpo_helpers.data.hub import explain_hub_error
from dpo_helpers.data.tokens import settle_template
from dpo_helpers.errors import UserError
from dpo_helpers.machine import Machine
from dpo_helpers.model.embedded import EMBEDDED, make_embedded_model
from dpo_helpers.model.quantization import freeze_quantized, make_quantization

PROBE = "これは日本語の文です。"
UNSAFE_FORMAT = (
    "このモデルは safetensors 形式で置かれていないようです。古い形式（.bin）"
    "はファイルの中のコードを実行できるので、読み込みません。"
    "作者を信頼できるときだけ、次の 2 行で手元のフォルダに変換し、"
    "MODEL_NAME にそのフォルダ名を書いてください（トークナイザーも同じように保存します）。\n"
    '  AutoModelForCausalLM.from_pretrained("{0}", use_safetensors=False).save_pretrained("converted")\n'
    '  AutoTokenizer.from_pretrained("{0}").save_pretrained("converted")'
)
CHOICES = (
    "ローカルのフォルダを MODEL_NAME に書くか、その場で作る小さなモデル MODEL_NAME "
    '= "embedded" を選んでください。'
)


def load_base_model(config: RunConfig, machine: Machine | None = None, folder: Path | None = None):
    """Return (model in float32, tokenizer with a pad token) for a Hub name, a local folder or "embedded".

    `folder` takes the place of the embedded model's own: a run goes on with the very one that it began with.

    With `quantization` "4bit" its linear layers are in 4 bits, and frozen, as `machine` can compute them.
    Only safetensors files are opened and no code from a repository is run. Raises UserError where the name,
    the folder or the network is the reason.
    """
    import torch

    name, quantization = config.model_name, make_quantization(config, machine)
    if folder is None and name in EMBEDDED:
        folder = make_embedded_model(name)
    folder = folder or find_model(name)
    tokenizer = load_tokenizer(str(folder))
    model = load_weights(folder, name, quantization_config=quantization)
    limit = getattr(model.config, "max_position_embeddings", config.max_length)
    if config.max_length > limit:
        raise UserError(
            f"MAX_LENGTH = {config.max_length} は、モデル {name} が扱える長さ（{limit} "
            f"トークン）を超えています。{limit} 以下にしてください。"
        )
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            # as TRL's DPOTrainer does: 4 x 1 and 1 x 4 then give the same losses in the warm-up as well
            module.p = 0.0
    return freeze_quantized(model) if quantization else model, tokenizer


def load_weights(folder, name: str, **options):
    """Return a model in float32 from safetensors files that fit it; `name` is what messages call it.

    transformers would fill what it misses with random numbers, and run a repository's own code if allowed to.
    """
    import torch
    from huggingface_hub.errors import HTTPError
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    loading = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True, **options}
    try:
        model, found = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **loading)
    except (OSError, ValueError, RuntimeError, SafetensorError, HTTPError) as error:
        # the last: transformers asks the Hub to convert a .bin, and that fails
        advice = (
            UNSAFE_FORMAT.format(name)
            if "safetensors" in str(error)
            else f"別のモデルを選んでください。{CHOICES}"
        )
        raise UserError(f"モデル {name} を読み込めません。理由：{error}\n{advice}") from error
    if wrong := sorted(map(str, (*found["missing_keys"], *found["mismatched_keys"]))):
        raise UserError(
            f"モデル {name} の重みの名前か形が、設定（config.json）と合いません"
            f"（{len(wrong)} 個。最初：{wrong[0]}）。"
            f"足りない重みは乱数になるので、読み込みません。別のモデルを選んでください。{CHOICES}"
        )
    return model


def load_tokenizer(name: str):
    """Return the tokenizer, with a pad token, of a Hub name, a local folder or "embedded", without its
    model.
    """
    from transformers import AutoTokenizer

    folder = Path(name).expanduser()
    if name in EMBEDDED:
        folder = make_embedded_model(name)
    elif not folder.is_dir():
        folder = find_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (
        OSError,
        ValueError,
        ImportError,
    ) as error:  # SentencePiece's files need two packages more than the others
        missing = "pip install sentencepiece protobuf を実行してから、もう一度試してください。"
        advice = missing if isinstance(error, ImportError) else f"別のモデルを選んでください。{CHOICES}"
        raise UserError(f"トークナイザー {name} を読み込めません。理由：{error}\n{advice}") from error
    if tokenizer.eos_token is None:
        raise UserError(
            f"モデル {name} のトークナイザーに終端記号（EOS）がありません。"
            f"別のモデルを選んでください。{CHOICES}"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for note in settle_template(tokenizer):
        print(note)
    ids = tokenizer(PROBE)["input_ids"]
    if PROBE not in (read := tokenizer.decode(ids)):
        raise UserError(
            f"モデル {name} のトークナイザーは日本語を表せません（「{PROBE}」が「{read}」になります）。"
            "モデルに合わないトークナイザーが入っているか、英語だけのモデルです。"
            f"別のモデルを選んでください。{CHOICES}"
        )
    return _end_no_text(tokenizer, ids) if ids[-1] == tokenizer.eos_token_id else tokenizer


def _end_no_text(tokenizer, ids: list[int]):
    """Return a tokenizer that does not end every text with EOS (T5's way, and so rinna's): an answer would
    begin after the end.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    start = [tokenizer.bos_token] if ids[0] == tokenizer.bos_token_id else []
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single=[*start, "$A"], special_tokens=[(token, tokenizer.bos_token_id) for token in start]
    )
    # of the general class, because the model's own one would put EOS back when the run's folder is loaded
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=tokenizer.chat_template, **tokenizer.special_tokens_map
    )


def find_model(name: str) -> str:
    """Return `name` if it is a usable folder or a model that the Hub (or its local cache) has; else raise
    UserError.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        missing = [
            what
            for what, there in (
                ("config.json", (folder / "config.json").is_file()),
                ("*.safetensors", any(folder.glob("*.safetensors"))),
            )
            if not there
        ]
        if missing:
            raise UserError(
                f"フォルダ {folder} にモデルがありません（足りないもの：{', '.join(missing)}）。{CHOICES}"
            )
        return str(folder)
    if name.count("/") > 1 or name.startswith((".", "~", "/")) or folder.exists():
        raise UserError(f"モデルのフォルダ {name} が見つかりません。パスを確かめてください。{CHOICES}")

    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(name, "config.json")
    except (OSError, ValueError, RuntimeError) as error:  # the Hub's own errors are OSErrors and ValueErrors
        raise UserError(f"{explain_hub_error(error, f'モデル {name}')}\n{CHOICES}") from None
    return name


def make_lora_config(config: RunConfig, model):
    """Describe the adapter. GPT-2's Conv1D layers keep their weight as (in, out), which PEFT calls
    fan_in_fan_out.
    """
    from peft import LoraConfig
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS
    from transformers.pytorch_utils import Conv1D

    targets = {"all-linear": "all-linear", "default": None}
    names = [name.strip() for name in config.lora_targets.split(",")]
    if config.lora_targets == "default" and model.config.model_type not in DEFAULT_TARGETS:
        raise UserError(
            f"PEFT は {model.config.model_type} 型の既定の層を知りません。"
            "LORA_TARGETS は all-linear を選んでください。"
        )
    if config.lora_targets not in targets:
        present = {path.rsplit(".", 1)[-1] for path, _ in model.named_modules()}
        if absent := [name for name in names if name not in present]:
            raise UserError(
                f"LORA_TARGETS の {', '.join(absent)} という層はこのモデルにありません。"
                "all-linear を選んでください。"
            )
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,  # TRL's DPOTrainer switches every dropout off, so that another value would be a lie
        target_modules=targets.get(config.lora_targets, names),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="CAUSAL_LM",
    )


def count_parameters(model) -> tuple[int, int]:
    """Return (trainable, total) numbers of parameters; a frozen copy of the adapter counts in neither."""
    own = [parameter for name, parameter in model.named_parameters() if ".ref." not in name]
    packed = {"Params4bit": 2}  # bitsandbytes keeps two weights in a byte
    return sum(p.numel() for p in own if p.requires_grad), sum(
        p.numel() * packed.get(type(p).__name__, 1) for p in own
    )


def check_trainable_precision(model) -> None:
    """Raise if a trainable parameter is not float32: fp16 gradients cannot be unscaled, and bf16 ones lose
    small steps.
    """
    import torch

    wrong = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32]
    if wrong:
        raise UserError(
            f"学習する重みのうち {len(wrong)} 個が float32 ではありません（最初：{wrong[0]}）。"
            "このまま学習すると値が壊れます。ランタイムを再起動して、最初のセルから実行してください。"
        )
