"""Build a folder with a model of DialoGPT-small's shape and vocabulary and RANDOM weights, for measurements
of speed and memory.

    python tools/build_dialogpt_shape.py FOLDER      # a few seconds, 500 MB, no network

Its answers are worthless; its token counts, shapes and arithmetic are those of the real one.
"""

import lzma
import sys
from pathlib import Path

TOKENIZER = Path(__file__).parent.parent / "tests" / "fixtures" / "gpt2_tokenizer.json.xz"


def build(folder: str) -> None:
    import torch
    from tokenizers import Tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    end = "<|endoftext|>"
    tokenizer = Tokenizer.from_str(lzma.decompress(TOKENIZER.read_bytes()).decode())
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end).save_pretrained(folder)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)


if __name__ == "__main__":
    build(sys.argv[1])
