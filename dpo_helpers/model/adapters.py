"""Reads LoRA adapters from their files into a model, and compares both bit by bit; it opens safetensors alone."""

import hashlib
from pathlib import Path

WEIGHTS = "adapter_model.safetensors"


def load_adapters(model, checkpoint: Path) -> None:
    """Put every adapter's weights from its file into the model.

    Trainer.train(resume_from_checkpoint=...) does so too, but transformers 5.15 leaves the trained one out where
    the checkpoint holds `ref` beside it.
    """
    from peft import set_peft_model_state_dict

    for name, weights in _read_adapters(model, checkpoint).items():
        set_peft_model_state_dict(model, weights, adapter_name=name)


def find_different_adapters(model, folder: Path) -> list[str]:
    """Name the adapters whose weights in memory differ from their file in any bit."""
    import torch
    from peft import get_peft_model_state_dict

    different = []
    for name, weights in _read_adapters(model, folder).items():
        held = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        if set(held) != set(weights) or not all(torch.equal(held[k].cpu(), weights[k]) for k in weights):
            different.append(name)
    return different


def _read_adapters(model, folder: Path) -> dict[str, dict]:
    """Return the weights of each of the model's adapters; `ref` stands as `reference` in a result."""
    from safetensors.torch import load_file

    places = {name: folder if name == "default" else folder / name for name in model.peft_config}
    found = {name: p if p.is_dir() else folder / "reference" for name, p in places.items()}
    return {name: load_file(place / WEIGHTS) for name, place in found.items()}


def hash_base(model) -> str:
    """Return a hash of the weights under the adapters: of each the start, so that 7B are read quickly."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            start = parameter.detach().flatten()[:1024].float().cpu().numpy()
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            digest.update(f"{name}{tuple(parameter.shape)}".encode() + start.tobytes())
    return digest.hexdigest()
