"""Loads a tokenizer and a base model (Hub, folder or the embedded one) and describes the LoRA that is put
on it.
"""

import hashlib
import json
import os
from functools import cache
from pathlib import Path

from dpo_helpers.config import RunConfig
from dpo_helpers.data.generate import generate_preferences, split_rows
from dpo_helpers.errors import UserError
from dpo_helpers.machine import Machine
from dpo_helpers.model.quantization import freeze_quantized, make_quantization

PROBE = "これは日本語の文です。"
UNSAFE_FORMAT = (
    "このモデルは safetensors 形式で置かれていないようです。古い形式（.bin）"
    "はファイルの中のコードを実行できるので、読み込みません。"
    "作者を信頼できるときだけ、次の 2 行で手元のフォルダーに変換し、"
    "MODEL_NAME にそのフォルダー名を書いてください（トークナイザーも同じように保存します）。\n"
    '  AutoModelForCausalLM.from_pretrained("{0}", use_safetensors=False).save_pretrained("converted")\n'
    '  AutoTokenizer.from_pretrained("{0}").save_pretrained("converted")'
)
# The model that is made on the spot, in three sizes: what each changes in EMBEDDED_RECIPE.
EMBEDDED = {
    "embedded-small": {"layers": 1, "width": 64, "heads": 2},
    "embedded": {},
    "embedded-large": {"layers": 3, "width": 192, "heads": 6, "peak_rate": 5e-3},
}
CHOICES = (
    "ローカルのフォルダーを MODEL_NAME に書くか、その場で作る小さなモデル MODEL_NAME "
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
        folder = make_embedded_model(config.seed, config.held_out_fraction, name)
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


def load_tokenizer(name: str, seed: int = 42, held_out_fraction: float = 0.2):
    """Return the tokenizer, with a pad token, of a Hub name, a local folder or "embedded", without its
    model.
    """
    from transformers import AutoTokenizer

    folder = Path(name).expanduser()
    if name in EMBEDDED:
        folder = make_embedded_model(seed, held_out_fraction, name)
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
                f"フォルダー {folder} にモデルがありません（足りないもの：{', '.join(missing)}）。{CHOICES}"
            )
        return str(folder)
    if name.count("/") > 1 or name.startswith((".", "~", "/")) or folder.exists():
        raise UserError(f"モデルのフォルダー {name} が見つかりません。パスを確かめてください。{CHOICES}")

    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
    )

    try:
        hf_hub_download(name, "config.json")
    except GatedRepoError:
        raise UserError(
            f"モデル {name} は、利用の条件に同意した人だけが使えます。次の順に進めてから、"
            "もう一度実行してください。\n"
            f"1. Hugging Face にログインし、https://huggingface.co/{name} のページで条件を読んで同意する\n"
            "2. https://huggingface.co/settings/tokens で Read の権限のトークンを作る\n"
            "3. Colab では、左の鍵の印（シークレット）に HF_TOKEN "
            "の名前で入れて「ノートブックからのアクセス」をオンにする。"
            "ほかでは hf auth login を実行する\n"
            f"すぐに試すなら、申請のいらないモデルを選んでください。{CHOICES}"
        ) from None
    except (RepositoryNotFoundError, ValueError):
        raise UserError(
            f"モデル {name} が Hugging Face Hub に見つかりません。名前のつづりを確かめてください。{CHOICES}"
        ) from None
    except (OSError, HfHubHTTPError) as error:
        # LocalEntryNotFoundError, "nothing cached and no way to ask", is both an EntryNotFoundError and a
        # FileNotFoundError.
        if isinstance(error, EntryNotFoundError) and not isinstance(error, FileNotFoundError):
            raise UserError(f"{name} には config.json がなく、モデルとして読めません。{CHOICES}") from None
        raise UserError(
            f"モデル {name} を取得できません。Hugging Face Hub につながらず、手元にも保存されていません。"
            f"ネットワークを確かめるか、{CHOICES}"
        ) from None
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


# How the embedded model is made: rows, tokenizer, layers, and the training of its weights.
EMBEDDED_RECIPE = {
    "rows": 12_000,
    "vocabulary": 900,
    "layers": 2,
    "width": 128,
    "heads": 4,
    "steps": 1800,
    "batch": 16,
    "peak_rate": 8e-3,
    "renamed": 0.4,
    "unseen": 0.6,
}


def find_embedded_folder(seed: int, held_out_fraction: float, name: str = "embedded") -> Path:
    """Return where make_embedded_model keeps its result, whether that is there or not."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "dpo_helpers" / f"embedded-{_hash_recipe(seed, held_out_fraction, name)}"


@cache  # every checkpoint asks for it
def _hash_recipe(seed: int, held_out_fraction: float, name: str) -> str:
    rows, recipe = _embedded_rows(seed, held_out_fraction), EMBEDDED_RECIPE | EMBEDDED[name]
    return hashlib.sha256(json.dumps([recipe, seed, rows], ensure_ascii=False).encode()).hexdigest()[:12]


@cache
def _embedded_rows(seed: int, held_out_fraction: float) -> list[dict]:
    rows = generate_preferences(EMBEDDED_RECIPE["rows"], seed, held_out_fraction)
    return split_rows(rows, EMBEDDED_RECIPE["unseen"], seed)[0]


def make_embedded_model(seed: int, held_out_fraction: float, name: str = "embedded") -> Path:
    """Train a tiny Japanese GPT-2 (0.6 M parameters, or a smaller or larger one) on generated answers of both
    sides; return its folder.

    It sees the training side of the split alone, so that held-out concepts stay unseen. In part of the texts
    the concept is replaced by random characters, which teaches it to repeat a name that it never saw. The
    result is cached under the user's cache folder, and written aside first, so that an interrupted build is
    never taken for a finished one.
    """
    import random

    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, set_seed

    folder, recipe = find_embedded_folder(seed, held_out_fraction, name), EMBEDDED_RECIPE | EMBEDDED[name]
    rows = _embedded_rows(seed, held_out_fraction)
    if folder.is_dir():
        return folder

    texts = [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")]
    tokenizer = _train_tokenizer(texts, recipe["vocabulary"])
    set_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=512,
            n_embd=recipe["width"],
            n_layer=recipe["layers"],
            n_head=recipe["heads"],
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            loss_type="ForCausalLMLoss",
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe["peak_rate"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe["peak_rate"], total_steps=recipe["steps"]
    )
    draw = random.Random(seed)
    letters = sorted({letter for text in texts for letter in text if letter.isalpha()})
    for _ in range(recipe["steps"]):
        picked = []
        for i in (int(draw.random() * len(texts)) for _ in range(recipe["batch"])):
            name = "".join(
                letters[int(draw.random() * len(letters))] for _ in range(2 + int(draw.random() * 6))
            )
            renamed = draw.random() < recipe["renamed"]
            picked.append(
                (texts[i].replace(rows[i // 2]["concept"], name) if renamed else texts[i])
                + tokenizer.eos_token
            )
        batch = tokenizer(picked, return_tensors="pt", padding=True, padding_side="right")
        # pad and EOS are one token here: only what the attention mask hides is left out of the loss
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    aside = folder.with_name(f"{folder.name}.{os.getpid()}")
    model.eval().save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    if not folder.is_dir():
        aside.rename(folder)
    return folder


def _train_tokenizer(texts: list[str], vocabulary: int):
    """Train a BPE over characters that falls back to bytes: what the texts hold never breaks inside a
    character.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    trained = Tokenizer(models.BPE())
    lines = pre_tokenizers.Split(
        "\n", "isolated"
    )  # no token spans a line's end, so none spans prompt and answer
    trained.pre_tokenizer = lines
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocabulary, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    # The trainer knows no byte tokens, and as its "special tokens" they would vanish when decoding: put them
    # in afterwards.
    names = [end, *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    merges = [tuple(pair) for pair in learned["merges"]]
    bpe = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges, byte_fallback=True))
    bpe.pre_tokenizer = lines
    bpe.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=end, eos_token=end, pad_token=end)
