"""4-bit as far as it goes without a GPU: the settings, the refusals, and what is done to the model before
and after TRL.
"""

import importlib.metadata

import pytest

from dpo_helpers.config import RunConfig
from dpo_helpers.errors import UserError
from dpo_helpers.machine import Machine
from dpo_helpers.model import quantization
from dpo_helpers.model.load import load_base_model, make_lora_config

FOUR_BIT = RunConfig(quantization="4bit")


def make_machine(device="cuda", capability=(7, 5)):
    return Machine(device, "T4", capability, 16 * 10**9, 13 * 10**9, True)


@pytest.fixture
def installed(monkeypatch):
    """bitsandbytes as far as its name and version go."""
    find = importlib.metadata.version
    monkeypatch.setattr(quantization, "find_spec", lambda name: name)
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.50.2" if name == "bitsandbytes" else find(name)
    )


@pytest.mark.versions
@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), "float16"), ((8, 0), "bfloat16"), ((6, 1), "float32")]
)
def test_the_products_are_computed_in_the_precision_of_the_training(installed, capability, dtype):
    settings = quantization.make_quantization(FOUR_BIT, make_machine(capability=capability))
    assert (settings.load_in_4bit, settings.bnb_4bit_quant_type, settings.bnb_4bit_use_double_quant) == (
        True,
        "nf4",
        True,
    )
    assert str(settings.bnb_4bit_compute_dtype) == f"torch.{dtype}"


def test_without_4bit_nothing_is_asked_of_the_machine():
    assert quantization.make_quantization(RunConfig(), None) is None


@pytest.mark.parametrize("machine", [None, make_machine("cpu", None)])
def test_4bit_without_cuda_is_refused_before_anything_is_downloaded(machine):
    with pytest.raises(UserError, match="NVIDIA の GPU"):
        load_base_model(FOUR_BIT, machine)


def test_a_missing_bitsandbytes_is_named_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "bitsandbytes>=0\.46\.1"'):
        quantization.make_quantization(FOUR_BIT, make_machine())


@pytest.mark.versions
def test_the_base_is_frozen_and_checkpointing_stays_off(tiny_models):
    model = quantization.freeze_quantized(load_base_model(RunConfig(model_name=str(tiny_models["llama"])))[0])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@pytest.mark.versions
def test_adapters_come_back_to_float32_and_to_every_bit_of_the_warm_up(tiny_models, tmp_path):
    import torch
    from peft import PeftModel, get_peft_model, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    config = RunConfig(model_name=str(tiny_models["llama"]), lora_rank=2)

    def base():
        return load_base_model(config)[0]

    first = get_peft_model(base(), make_lora_config(config, base()))
    torch.manual_seed(0)
    for name, parameter in first.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    first.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    model.load_adapter(tmp_path, adapter_name="ref")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)  # as TRL leaves a 4-bit model's
    quantization.restore_adapters(model, tmp_path)
    expected = load_peft_weights(str(tmp_path), device="cpu")
    for adapter in ("default", "ref"):
        held = get_peft_model_state_dict(model, adapter_name=adapter)
        assert set(held) == set(expected) and all(torch.equal(held[key], expected[key]) for key in expected)
    quantization.restore_adapters(model, None)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
