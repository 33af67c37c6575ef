"""Makes the embedded model: a tiny Japanese GPT-2, trained on the spot, without a network and a GPU."""

import hashlib
import json
import os
from functools import cache
from pathlib import Path

from dpo_helpers.data.generate import generate_preferences, split_rows

# The model that is made on the spot, in three sizes: what each changes in EMBEDDED_RECIPE.
EMBEDDED = {
    "embedded-small": {"layers": 1, "width": 64, "heads": 2},
    "embedded": {},
    "embedded-large": {"layers": 3, "width": 192, "heads": 6, "peak_rate": 5e-3},
}
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
