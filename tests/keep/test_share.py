import json
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from made import contents
from safetensors.torch import load_file, save_file
from tiny_run import make_config

from dpo_helpers.__main__ import main, train
from dpo_helpers.config import RunConfig
from dpo_helpers.errors import UserError
from dpo_helpers.folders import verify_folder
from dpo_helpers.judge.verdict import LABEL_NAMES
from dpo_helpers.keep.result import make_zip
from dpo_helpers.keep.share import make_model_card, merge_adapter, push_to_hub


@pytest.fixture(scope="module")
def merged(finished_run, tmp_path_factory):
    return merge_adapter(finished_run[0], tmp_path_factory.mktemp("merged") / "model")


@pytest.fixture
def hub_run(finished_run, tmp_path):
    """A finished run as it would be with a base from the Hub, and with a file that is nobody else's
    business.
    """
    folder = tmp_path / "run"
    shutil.copytree(finished_run[0], folder, ignore=shutil.ignore_patterns("base_model"))
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": "microsoft/DialoGPT-small"})
    )
    RunConfig.load(folder / "run_config.json").replace({"model_name": "microsoft/DialoGPT-small"}).save(
        folder / "run_config.json"
    )
    (folder / "secret.txt").write_text("hf_xxx")
    return folder


@pytest.mark.versions
def test_the_merged_model_answers_as_the_adapter_did(finished_run, merged):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dpo_helpers.judge.scores import score_answers
    from dpo_helpers.keep.result import load_run
    from dpo_helpers.model.answer import generate_response

    adapted, tokenizer, config = load_run(finished_run[0])
    one, its_tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    rows = [json.loads(line) for line in (finished_run[0] / "held_out.jsonl").read_text().splitlines()][:8]
    questions = [row["prompt"] for row in rows]
    assert generate_response(one, its_tokenizer, questions) == generate_response(
        adapted, tokenizer, questions
    )
    pairs = [(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
    scores = score_answers(adapted.eval(), tokenizer, pairs, config.max_length)
    assert score_answers(one.eval(), its_tokenizer, pairs, config.max_length) == pytest.approx(
        scores, abs=1e-3
    )
    with adapted.disable_adapter():
        assert scores != pytest.approx(
            score_answers(adapted, tokenizer, pairs, config.max_length), abs=0.1
        )  # it is not the bare base


def test_a_folder_of_the_users_is_not_written_over(finished_run, tmp_path):
    for name in ("mine", "model.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    for name in ("mine", "model"):
        with pytest.raises(UserError, match="空ではないので、上書きしません"):
            merge_adapter(finished_run[0], tmp_path / name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "mine",
        "model.partial",
        "notes.txt",
        "notes.txt",
    ]


def test_a_merged_model_is_kept_where_it_is_this_runs_and_made_again_where_it_is_not(
    finished_run, tmp_path, capsys
):
    run, target = tmp_path / "run", tmp_path / "model"
    shutil.copytree(finished_run[0], run)
    merge_adapter(run, target)
    first, inode = (target / "model.safetensors").read_bytes(), (target / "model.safetensors").stat().st_ino
    merge_adapter(run, target)
    assert (target / "model.safetensors").stat().st_ino == inode and "すでにある" in capsys.readouterr().out
    (target / "config.json").write_text("{")  # a half one
    merge_adapter(run, target)
    assert (
        json.loads((target / "config.json").read_text())
        and (target / "model.safetensors").read_bytes() == first
    )
    weights = load_file(run / "adapter_model.safetensors")
    save_file({name: value * 2 for name, value in weights.items()}, run / "adapter_model.safetensors")
    with pytest.raises(UserError, match="結果が壊れています"):
        merge_adapter(run, target)
    (run / "manifest.json").unlink()
    merge_adapter(run, target)
    assert (target / "model.safetensors").read_bytes() != first


def test_a_merge_that_was_killed_is_made_again(finished_run, tmp_path, monkeypatch):
    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dpo_helpers.keep.share.write_manifest", die)
        with pytest.raises(KeyboardInterrupt):
            merge_adapter(finished_run[0], tmp_path / "model")
    assert not (tmp_path / "model").exists() and (tmp_path / "model.partial" / "merged.json").is_file()
    merge_adapter(finished_run[0], tmp_path / "model")
    assert not (tmp_path / "model.partial").exists() and verify_folder(tmp_path / "model")


@pytest.mark.versions
def test_a_merge_that_changes_the_model_is_refused(finished_run, tmp_path):
    """LoRA on one side of tied embeddings: merged into the one tensor that both are, it changes both."""
    run = tmp_path / "run"
    shutil.copytree(finished_run[0], run)
    (run / "manifest.json").unlink()
    settings = json.loads((run / "adapter_config.json").read_text())
    targets = {"target_modules": ["lm_head"], "fan_in_fan_out": False, "ensure_weight_tying": False}
    (run / "adapter_config.json").write_text(json.dumps(settings | targets))
    shutil.rmtree(run / "reference")
    rank, name = settings["r"], "base_model.model.lm_head"
    size = json.loads((run / "base_model" / "config.json").read_text())
    torch.manual_seed(0)
    lora = {
        f"{name}.lora_A.weight": torch.randn(rank, size["n_embd"]),
        f"{name}.lora_B.weight": torch.randn(size["vocab_size"], rank) * 0.1,
    }
    save_file(lora, run / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"1 トークンで .* nat 違うので使いません"):
        merge_adapter(run, tmp_path / "model")
    assert not (tmp_path / "model").exists() and not (tmp_path / "model.partial").exists()


def test_the_card_says_what_the_files_say(finished_run, hub_run, merged):
    card, held_out = make_model_card(hub_run), finished_run[1]["held_out"]
    assert "base_model: microsoft/DialoGPT-small\nlibrary_name: peft" in card
    for figure in (
        f"{held_out['loss']:.4f}",
        f"{held_out['accuracy']:.1%}",
        f"{held_out['rows']} 行",
        "| `lora_scale` | 2.0 |",
    ):
        assert figure in card
    assert f"自動生成した行です。学習 {150 - held_out['rows']} 行、評価 {held_out['rows']} 行。" in card
    assert (
        f"## 自動の判定：{LABEL_NAMES[finished_run[1]['verdict']['label']]}\n" in card and "## 限界" in card
    )
    of_merged = (merged / "README.md").read_text()
    assert (
        "library_name: transformers" in of_merged
        and "PeftModel" not in of_merged
        and "base_model:" not in of_merged
    )
    assert f"学習 {150 - held_out['rows']} 行" in of_merged


def test_what_is_shared_of_the_users_own_rows_are_counts_alone(hub_run, hub):
    metrics = json.loads((hub_run / "metrics.json").read_text())
    secret = "山田太郎 [link](http://x) 090-1234"
    metrics |= {"rows_generated": False, "by_field": [{"field": secret, "rows": 12, "accuracy": 0.5}]}
    metrics["verdict"]["reasons"].append(f"{secret} の行が苦手です。")
    (hub_run / "metrics.json").write_text(json.dumps(metrics))
    card, fake = make_model_card(hub_run), hub()
    push_to_hub(hub_run, "me/model", dry_run=False)
    sent = fake.sent["files"]
    for text in (card, *(content.decode("utf-8", "replace") for content in sent.values())):
        assert "山田" not in text and "090" not in text and str(hub_run.parent) not in text
    assert (
        "学習した人が用意した行です" in card
        and json.loads(sent["metrics.json"])["held_out"] == metrics["held_out"]
    )


def test_the_card_of_an_older_run_has_no_verdict(hub_run):
    metrics = json.loads((hub_run / "metrics.json").read_text())
    del metrics["verdict"], metrics["held_out"]["accuracy_interval"]
    (hub_run / "metrics.json").write_text(json.dumps(metrics))
    assert "判定" not in (card := make_model_card(hub_run)) and "区間" not in card


def test_no_path_of_the_machine_is_in_the_zip_or_the_merged_model(tiny_models, tmp_path):
    config = make_config(tiny_models, num_samples=30)
    train(config, tmp_path / "run", device="cpu")
    merge_adapter(tmp_path / "run", tmp_path / "merged")
    with zipfile.ZipFile(make_zip(tmp_path / "run")) as packed:
        texts = {name: packed.read(name) for name in packed.namelist()} | contents(tmp_path / "merged")
    places = [str(place).encode() for place in (tmp_path, tiny_models["gpt2"], Path.home())]
    assert [name for name, text in texts.items() if any(place in text for place in places)] == []


def test_a_run_that_was_stopped_has_no_card(hub_run):
    (hub_run / "metrics.json").write_text(json.dumps({"steps": 3, "stopped": {}}))
    with pytest.raises(UserError, match="途中で止まっていて"):
        make_model_card(hub_run)
    with pytest.raises(UserError, match=r"metrics\.json"):
        make_model_card(hub_run.parent)


class FakeHub:
    """Stands for HfApi: notes what is sent, or fails as told."""

    def __init__(self, failure=None):
        self.failure, self.sent = failure, {}

    def __call__(self):
        return self

    def create_repo(self, repo, **options):
        if self.failure:
            raise self.failure
        self.sent |= {"repo": repo, **options}

    def upload_folder(self, folder_path, **options):
        self.sent |= options | {"files": contents(Path(folder_path))}


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub

    def use(failure=None, token="hf_x"):
        fake = FakeHub(failure)
        monkeypatch.setattr(huggingface_hub, "HfApi", fake)
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
        return fake

    return use


def test_the_dry_run_is_the_default_and_sends_nothing(hub_run, hub, capsys):
    fake = hub()
    assert main(["share", str(hub_run), "--repo", "me/model"]) == 0
    shown = capsys.readouterr().out
    assert fake.sent == {} and not (hub_run / "README.md").exists()
    assert (
        "まだ何も送っていません" in shown
        and "adapter_model.safetensors（" in shown
        and make_model_card(hub_run) in shown
    )


@pytest.mark.versions
def test_a_push_sends_weights_and_card_but_no_rows(hub_run, hub):
    fake = hub()
    names = push_to_hub(hub_run, "me/model", dry_run=False)
    assert (
        fake.sent["repo"] == fake.sent["repo_id"] == "me/model"
        and fake.sent["private"]
        and sorted(fake.sent["files"]) == sorted(names)
    )
    assert {
        "README.md",
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "metrics.json",
    } <= set(names)
    assert not {"train.jsonl", "held_out.jsonl", "run_config.json", "run.lock", "secret.txt"} & set(names)
    assert fake.sent["files"]["README.md"].decode() == make_model_card(hub_run)


def answer(status: int):
    from huggingface_hub.errors import HfHubHTTPError

    error = HfHubHTTPError.__new__(HfHubHTTPError)
    error.response = SimpleNamespace(status_code=status)
    return error


@pytest.mark.versions
@pytest.mark.parametrize(
    ("failure", "token", "words"),
    [
        (None, None, "トークンがありません"),
        (lambda: answer(403), "hf_x", "書き込む権限がありません"),
        (lambda: answer(500), "hf_x", "少し待ってから"),
        (lambda: ConnectionError("no route"), "hf_x", "ネットワークを確かめて"),
    ],
)
def test_a_push_that_cannot_work_says_what_to_do(hub_run, hub, failure, token, words):
    hub(failure and failure(), token)
    with pytest.raises(UserError, match=words):
        push_to_hub(hub_run, "me/model", dry_run=False)


def test_a_base_that_only_this_machine_has_is_to_be_merged_first(finished_run, merged, capsys):
    with pytest.raises(UserError, match="merge"):
        push_to_hub(finished_run[0], "me/model")
    assert {"model.safetensors", "config.json"} <= set(push_to_hub(merged, "me/model"))
    assert str(merged) not in capsys.readouterr().out


def test_an_impossible_repository_name_is_told_before_anything_is_sent(hub_run):
    with pytest.raises(UserError, match="ユーザー名/モデル名"):
        push_to_hub(hub_run, "私の モデル")
