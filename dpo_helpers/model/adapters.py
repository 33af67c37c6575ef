"""Reads LoRA adapters and optimizer states from their files, and compares adapters bit by bit."""

import hashlib
from io import BytesIO
from pathlib import Path

from dpo_helpers.errors import UserError

WEIGHTS = "adapter_model.safetensors"


def load_adapters(model, checkpoint: Path) -> None:
    """Put every adapter's weights from its file into the model.

    Trainer.train(resume_from_checkpoint=...) does so too, but transformers 5.15 leaves the trained one out
    where the checkpoint holds `ref` beside it.
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


def are_states_sound(read: dict[str, bytes], states: list[str], step: int) -> bool:
    """Tell whether a checkpoint's files, as bytes, hold an adapter and what its optimizer goes on from.

    Torch's safe loader opens them, which runs no code. Nonsense may also raise whatever a library raises.
    """
    import torch
    from safetensors.torch import load
    from transformers.trainer_pt_utils import safe_globals

    def load_safely(name):
        with safe_globals():
            return torch.load(BytesIO(read[name]), map_location="cpu", weights_only=True)

    weights, optimizer = load(read[WEIGHTS]), load_safely("optimizer.pt")
    moments = sorted(state["exp_avg"].shape for state in optimizer["state"].values())
    parts = [{"scale"} if name == "scaler.pt" else {"python", "numpy", "cpu"} for name in states]
    return (
        all("lora_" in name and value.isfinite().all() for name, value in weights.items())
        # under fp16 the first steps may all have been skipped, and then there are no moments yet
        and (not moments or moments == sorted(value.shape for value in weights.values()))
        and 0 <= load_safely("scheduler.pt")["last_epoch"] <= step
        and all(part <= set(load_safely(name)) for part, name in zip(parts, states, strict=True))
    )


def load_adapted(model, folder: Path):
    """Return a PeftModel: the base with a saved run's adapters, `reference/` under the name `ref`."""
    from peft import PeftModel

    try:
        model = PeftModel.from_pretrained(model, folder, use_safetensors=True)
        if (folder / "reference" / WEIGHTS).is_file():
            model.load_adapter(folder / "reference", adapter_name="ref", use_safetensors=True)
        fits = not find_different_adapters(model, folder)
    except Exception as error:  # whatever PEFT and safetensors make of a damaged or foreign adapter
        raise UserError(
            f"{folder} のアダプターを読めません（{error}）。結果を保存し直してください。"
        ) from error
    if not fits:
        raise UserError(
            f"{folder} のアダプターの重みは、ベースモデルと名前が合いません。別のモデルのものです。"
        )
    return model
