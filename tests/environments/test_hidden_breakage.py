"""Done when 2, and 5 once more: breakage that no metadata shows, with libraries that really run.

The metadata are the image's; peft, torchao and trl are really installed by pip; the other libraries are
imported from `.venv-colab`, which holds them at the image's versions. One environment goes through the tests
in their order.
"""

import os

import pytest
from simulate import (
    ROOT,
    difference,
    doctor,
    find_site,
    link_modules,
    load_image,
    make_wheel,
    run,
    set_up,
    versions,
)

pytestmark = pytest.mark.environments
ONE_STEP_OF_LORA = """
import peft, torch, transformers
model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=9, n_layer=1, n_embd=8, n_head=1))
model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
tokens = torch.tensor([[1, 2, 3, 4]])
model(input_ids=tokens, labels=tokens).loss.backward()
optimizer.step()
print(max(p.abs().max().item() for name, p in model.named_parameters() if "lora_B" in name) > 0)
"""


@pytest.fixture(scope="module")
def colab(make):
    """The image before set-up on Colab's Python, peft 0.20.0 and torchao 0.10.0 real."""
    source = find_site(str(ROOT / ".venv-colab" / "bin" / "python"))
    assert (source / "transformers").is_dir(), (
        "make test-environments needs .venv-colab (make .venv-colab/.installed)"
    )
    python = make(load_image("image-2026-08-19.json", peft=None, torchao=None), python="3.13")
    process = run(python, "-m", "pip", "install", "--no-deps", "peft==0.20.0", "torchao==0.10.0")
    assert process.returncode == 0, process.stderr
    link_modules(
        python, source, find_site(python).parent / "modules", {"peft", "torchao", "trl", "matplotlib_fontja"}
    )
    return python


def test_lora_does_not_start_and_the_doctor_names_torchao_before_set_up(colab):
    process = run(colab, "-c", ONE_STEP_OF_LORA)
    assert "incompatible version of torchao" in process.stderr
    code, report, said = doctor(colab)
    assert code == 1
    assert ("torchao", "0.10.0") in {(c["required"], c["found"]) for c in report["conflicts"]}
    assert "torchao: 0.10.0 → 0.18.0" in said
    assert "No module named 'trl'" in report["trial"]["error"]  # before set-up it is not there


def test_the_trial_alone_finds_what_no_rule_of_ours_knows(colab):
    process = run(colab, "-m", "pip", "install", "--no-deps", "trl==0.29.1")
    assert process.returncode == 0, process.stderr
    code = (
        "from dpo_helpers.setup import doctor, packages; packages.IF_INSTALLED = 'torchao'; "
        "found = doctor.diagnose(); print(found.trial['error'])"
    )
    assert "incompatible version of torchao. Found version 0.10.0" in run(colab, "-c", code).stdout
    run(colab, "-m", "pip", "uninstall", "--yes", "trl")


def test_after_quick_fix_a_lora_really_trains_one_step(colab):
    before = versions(colab)
    announced = doctor(colab)[1]["plan"]
    code, report, said = doctor(colab, "--fix")
    assert code == 0, said
    assert report["trial"] == {"error": "", "cuda": ""}
    changes = difference(before, versions(colab))
    assert {name: new for name, (_, new) in changes.items()} == announced
    assert {name for name, (old, _) in changes.items() if old} == {"torchao"}
    assert {"torchao", "trl", "matplotlib-fontja", "sacrebleu"} <= set(changes)
    assert run(colab, "-c", ONE_STEP_OF_LORA).stdout.strip() == "True"
    assert "何も変更しませんでした" in set_up(colab)


def test_a_repair_after_which_training_fails_is_rolled_back_exactly(colab, tmp_path):
    """The made gcsfs suits fsspec, but from then on `import trl` fails: only the trial can tell."""
    old = run(colab, "-m", "pip", "uninstall", "--yes", "gcsfs")
    assert old.returncode == 0, old.stderr
    make_wheel(tmp_path, "gcsfs", "2025.3.2", ["fsspec==2025.3.2"], {"gcsfs.py": ""})
    poison = {"gcsfs.py": "", "poison.pth": "import sys; sys.modules['trl'] = None\n"}
    make_wheel(tmp_path, "gcsfs", "2025.3.0", ["fsspec==2025.3.0"], poison)
    index = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    run(colab, "-m", "pip", "install", "--no-deps", "gcsfs==2025.3.2", environment=index)
    before = versions(colab)
    assert before["gcsfs"] == "2025.3.2"

    process = run(colab, "-m", "dpo_helpers", "doctor", "--fix", environment=index)
    assert process.returncode == 1 and "修復の前より悪くなったので、元に戻しました" in process.stderr
    assert "gcsfs: 2025.3.0 → 2025.3.2" in process.stdout
    assert versions(colab) == before
    assert not (find_site(colab) / "poison.pth").exists()
