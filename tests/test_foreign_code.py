"""Code that is not ours never runs: no repository's, no pickle's; and no weights that only seem to fit."""

import ast
import json
import pickle
import shutil
from pathlib import Path

import pytest
from tiny_run import make_config

from dpo_helpers.errors import UserError
from dpo_helpers.model.load import load_base_model, load_tokenizer

PACKAGE = Path(__file__).parent.parent / "dpo_helpers"
# An adapter's file is opened on a model that is loaded already: no remote code is known there.
HARMLESS = {"PeftModel"}


def find_loading_calls() -> list[tuple[str, ast.Call]]:
    """Return (file and line, call) of everything that loads a configuration, tokenizer or model."""
    calls = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                loads = node.func.attr in ("from_pretrained", "from_config") or node.func.attr == "pipeline"
                if loads and ast.unparse(node.func.value) not in HARMLESS:
                    calls.append((f"{path.name}:{node.lineno}", node))
    return calls


def test_every_call_that_loads_says_that_no_foreign_code_may_run():
    calls = find_loading_calls()
    assert len(calls) >= 2
    for place, call in calls:
        given = {item.arg: item.value for item in call.keywords}
        assert isinstance(given.get("trust_remote_code"), ast.Constant), place
        assert given["trust_remote_code"].value is False, place


def test_torch_load_is_the_safe_one_everywhere():
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name == "torch.load":
                assert any(
                    item.arg == "weights_only" and item.value.value is True for item in node.keywords
                ), path
            assert not name.startswith(("pickle.load", "joblib.load", "dill.")), path


@pytest.fixture
def model(tiny_models, tmp_path):
    shutil.copytree(tiny_models["gpt2"], tmp_path / "model")
    return tmp_path / "model"


CODE = """
from pathlib import Path
Path(__file__).with_name("RAN").touch()
from transformers import GPT2Config as Own, GPT2LMHeadModel as OwnModel
from transformers import PreTrainedTokenizerFast as OwnTokenizer
"""


@pytest.mark.versions
def test_a_repositorys_own_code_does_not_run_even_where_the_user_would_say_yes(model, monkeypatch):
    (model / "own.py").write_text(CODE)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (model / "tokenizer_config.json").write_text(json.dumps(own))
    load_base_model(make_config({"gpt2": model}))  # by the class that its configuration names
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}
    (model / "config.json").write_text(json.dumps(json.loads((model / "config.json").read_text()) | own))
    with pytest.raises(UserError, match="読み込めません"):
        load_base_model(make_config({"gpt2": model}))
    assert not list(model.rglob("RAN"))


@pytest.mark.versions
def test_weights_with_foreign_names_are_refused_and_not_filled_with_random_numbers(model):
    from safetensors.torch import load_file, save_file

    weights = {f"other.{name}": value for name, value in load_file(model / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"重みの名前か形が、設定（config.json）と合いません"):
        load_base_model(make_config({"gpt2": model}))


class Evil:
    def __reduce__(self):
        return (print, ("RAN",))


@pytest.mark.versions
def test_a_pickle_is_never_opened_in_place_of_safetensors(model, capsys):
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match=r"safetensors"):
        load_base_model(make_config({"gpt2": model}))
    with pytest.raises(UserError):
        load_tokenizer(str(model.parent / "nowhere"))
    assert "RAN" not in capsys.readouterr().out
