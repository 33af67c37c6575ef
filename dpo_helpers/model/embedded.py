"""Makes the embedded base model on the spot: a tiny Japanese GPT-2 that needs no network and no GPU.

It stands for a really pretrained model: it has read about every concept, well and badly, in equal shares. A
text is a question with one answer, and nothing in it says which answer is the better one.
"""

import hashlib
import json
import os
import random
import shutil
from functools import cache
from pathlib import Path

from dpo_helpers.data import topics
from dpo_helpers.data.prompt import make_prompt
from dpo_helpers.data.topics import Fact

# How the model is made. In one reading every fact is told twice: once rightly, once in one of the bad ways.
EMBEDDED_RECIPE = {
    "readings": 32,
    "vocabulary": 3000,
    "layers": 1,  # one wide layer keeps more facts than two narrow ones that take as long
    "width": 192,
    "heads": 6,
    "batch": 16,
    "matrix_rate": 0.015,  # Muon's, of the layers' matrices
    "other_rate": 0.01,  # AdamW's, of embeddings, biases and norms
    "warm_up": 0.05,
    "seed": 42,
}
# The model in three sizes: what each changes in EMBEDDED_RECIPE.
EMBEDDED = {"embedded-small": {"width": 64, "heads": 2}, "embedded": {}, "embedded-large": {"layers": 2}}
END = "<|endoftext|>"
IGNORED = -100  # the label of a token that no loss is taken of


def find_embedded_folder(name: str = "embedded") -> Path:
    """Return where make_embedded_model keeps its result, whether that is there or not."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    recipe = json.dumps(EMBEDDED_RECIPE | EMBEDDED[name])
    mark = hashlib.sha256((recipe + _hash_sources()).encode()).hexdigest()[:12]
    return home / "dpo_helpers" / f"{name}-{mark}"


@cache  # every checkpoint asks for it
def _hash_sources() -> str:
    """Return a digest of all that texts and weights come from: the topics, their making, the training."""
    room, data = Path(__file__).parent, Path(topics.__file__).parent
    sources = (data / "topics.json", data / "topics.py", room / "embedded.py", room / "muon.py")
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def make_embedded_model(name: str = "embedded") -> Path:
    """Return the folder of the trained model; where it is not there yet, it is made, which takes minutes.

    The result is the same for every run, and is kept in the user's cache folder. It is written aside first,
    so that an interrupted build is never taken for a finished one.
    """
    folder = find_embedded_folder(name)
    if folder.is_dir():
        return folder
    model, tokenizer = _train_model(EMBEDDED_RECIPE | EMBEDDED[name])
    aside = folder.with_name(f"{folder.name}.{os.getpid()}")
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    try:
        aside.rename(folder)
    except OSError:
        shutil.rmtree(aside)
        if not folder.is_dir():  # else another process was quicker with the same model
            raise
    return folder


def make_texts(readings: int, seed: int) -> list[list[tuple[str, str]]]:
    """Return the (prompt, answer) pairs of each reading: of every fact the right answer and a bad one.

    The bad ways take turns, so that each has an equal share, and so do the three wordings of a question.
    """
    draw, groups = random.Random(seed), topics.list_groups()
    facts = [Fact(field, name, form) for name, (field, _) in groups.items() for form in topics.list_forms()]
    bad = [[topics.make_rejected(kind, fact, tuple(groups)) for kind in topics.KIND_SHARES] for fact in facts]
    texts = []
    for reading in range(readings):
        texts.append([])
        for number, fact in enumerate(facts):
            prompts = [make_prompt(question) for question in topics.list_wordings(fact)]
            ways = bad[number][(reading + number) % len(bad[number])]
            texts[-1].append((prompts[reading % len(prompts)], topics.tell_fact(fact)))
            texts[-1].append((draw.choice(prompts), draw.choice(ways)))
    return texts


def _train_model(recipe: dict):
    """Return (model, tokenizer) of a recipe, and leave the caller's random state alone."""
    import torch
    from tqdm.auto import tqdm
    from transformers import GPT2Config, GPT2LMHeadModel

    texts = make_texts(recipe["readings"], recipe["seed"])
    # seven readings hold every wording of every question, and every bad way with every fact
    tokenizer = _train_tokenizer([prompt + answer for part in texts[:7] for prompt, answer in part], recipe)
    batches = _make_batches(texts, tokenizer, recipe)
    shape = {"n_layer": recipe["layers"], "n_embd": recipe["width"], "n_head": recipe["heads"]}
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=512, loss_type="ForCausalLMLoss", **shape, **ends, **dropout
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe["seed"])
        model = GPT2LMHeadModel(config)
    step = _make_stepper(model, recipe, len(batches))
    for ids, labels in tqdm(batches, desc="練習用のモデルを作っています"):
        # no token sees a later one, so that the padding behind a text needs no mask
        hidden = model.transformer(ids[:, :-1], use_cache=False).last_hidden_state
        read = labels[:, 1:] != IGNORED
        logits = model.lm_head(hidden[read])  # (answer tokens, vocabulary): the head is half of the work
        torch.nn.functional.cross_entropy(logits, labels[:, 1:][read]).backward()
        step()
    return model.eval(), tokenizer


def _make_batches(texts: list[list[tuple[str, str]]], tokenizer, recipe: dict) -> list:
    """Return (ids, labels) of all batches, reading after reading; texts of like length lie together.

    The loss is that of the answers alone: which question comes next is not to be learned.
    """
    import torch

    draw, batches = random.Random(recipe["seed"]), []
    for reading in texts:
        prompts, answers = (tokenizer(list(side))["input_ids"] for side in zip(*reading, strict=True))
        encoded = [(start, [*answer, 0]) for start, answer in zip(prompts, answers, strict=True)]
        draw.shuffle(encoded)
        encoded.sort(key=lambda text: len(text[0] + text[1]))
        parts = [encoded[i : i + recipe["batch"]] for i in range(0, len(encoded), recipe["batch"])]
        draw.shuffle(parts)
        for part in parts:
            rows = [
                (torch.tensor(start + answer), torch.tensor([IGNORED] * len(start) + answer))
                for start, answer in part
            ]
            ids, labels = zip(*rows, strict=True)
            pad = torch.nn.utils.rnn.pad_sequence
            batches.append((pad(ids, batch_first=True), pad(labels, batch_first=True, padding_value=IGNORED)))
    return batches


def _make_stepper(model, recipe: dict, steps: int):
    """Return a function that moves the weights by their gradients; its rates rise, then fall to zero."""
    import torch

    from dpo_helpers.model.muon import Muon

    matrices = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers = [
        Muon(matrices, lr=recipe["matrix_rate"]),
        torch.optim.AdamW(others, lr=recipe["other_rate"], betas=(0.9, 0.95), fused=True),
    ]
    rise = recipe["warm_up"] * steps
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(each, lambda done: min(1, (done + 1) / rise) * (1 - done / steps))
        for each in optimizers
    ]

    def step():
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in [*optimizers, *schedules]:
            each.step()
        model.zero_grad()

    return step


def _train_tokenizer(texts: list[str], recipe: dict):
    """Train a BPE over characters that falls back to bytes: no text ever breaks inside a character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    # no token spans a line's end, so none spans prompt and answer
    lines = trained.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    trainer = trainers.BpeTrainer(vocab_size=recipe["vocabulary"], show_progress=False)
    trained.train_from_iterator(texts, trainer)
    learned = json.loads(trained.to_str())["model"]
    # The trainer knows no byte tokens, and as its "special tokens" they would vanish when decoding
    names = [END, *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    merges = [tuple(pair) for pair in learned["merges"]]
    bpe = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges, byte_fallback=True))
    bpe.pre_tokenizer = lines
    bpe.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END)
