"""Keeps a base model's weights in 4 bits where that is asked for (NF4, as in QLoRA); what is trained stays
float32.
"""

from importlib.util import find_spec
from pathlib import Path

from dpo_helpers.config import RunConfig
from dpo_helpers.errors import UserError
from dpo_helpers.machine import Machine

BITSANDBYTES = "bitsandbytes>=0.46.1"  # the oldest that transformers 5 takes


def make_quantization(config: RunConfig, machine: Machine | None):
    """Return transformers' settings for 4-bit weights on this machine, or None where the configuration asks
    for none.

    The products are computed in the precision of the training: float16 on a T4, which has no bfloat16.
    """
    if config.quantization == "none":
        return None
    if machine is None or machine.device != "cuda":
        raise UserError(
            'QUANTIZATION = "4bit" は NVIDIA の GPU（CUDA）でだけ使えます。'
            "Colab では「ランタイム → ランタイムのタイプを変更」で T4 GPU を選ぶか、"
            'QUANTIZATION を "none" にして、もっと小さいモデルを選んでください。'
        )
    if find_spec("bitsandbytes") is None:
        raise UserError(
            "4-bit に必要な bitsandbytes がありません。"
            "ノートブックでは 「実行環境を確かめます」のセルをもう一度実行し、"
            f'ターミナルでは pip install "{BITSANDBYTES}" を実行してください。'
        )
    import torch
    from transformers import BitsAndBytesConfig

    compute = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[machine.precision]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def freeze_quantized(model):
    """Freeze a 4-bit base for LoRA without PEFT's gradient checkpointing, which this project leaves off."""
    from peft import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def restore_adapters(model, warmed_up: Path | None) -> None:
    """Put the adapters of a 4-bit model back to float32: TRL makes them bfloat16, which fp16 training on a T4
    cannot scale.

    What bfloat16 has rounded away of a warmed-up adapter is read again from its folder, for the reference as
    well.
    """
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights

    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    if warmed_up is not None:
        weights = load_peft_weights(str(warmed_up), device="cpu")
        for name in model.peft_config:
            set_peft_model_state_dict(model, weights, adapter_name=name)


def install_quantization(config: RunConfig) -> None:
    """Install bitsandbytes, moving nothing else, where the configuration asks for 4-bit weights."""
    if config.quantization == "4bit":
        from dpo_helpers.setup.packages import install_missing

        install_missing(requirements=(BITSANDBYTES,))
