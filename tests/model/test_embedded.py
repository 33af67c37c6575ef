"""The embedded base: what it reads, how its folder is named, and that a build is whole or not there."""

import shutil
from collections import Counter
from pathlib import Path

import pytest

from dpo_helpers.data import topics
from dpo_helpers.data.prompt import make_prompt
from dpo_helpers.data.topics import Fact
from dpo_helpers.model import embedded
from dpo_helpers.model.embedded import EMBEDDED_RECIPE, find_embedded_folder, make_embedded_model, make_texts

TEXTS = make_texts(readings=3, seed=42)


@pytest.fixture
def tiny_build(tmp_path, monkeypatch):
    """Builds go to a folder of the test, and take a second: 64 texts, read once by a model of width 32."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(embedded, "make_texts", lambda readings, seed: [TEXTS[0][:64]])
    for name, value in {"width": 32, "heads": 2, "layers": 1, "vocabulary": 500}.items():
        monkeypatch.setitem(EMBEDDED_RECIPE, name, value)


def kinds_of(answer: str, fact: Fact) -> set[str]:
    """Return in which ways the answer is a bad one to the fact's question; of the right one, none."""
    concepts = tuple(topics.list_groups())
    return {kind for kind in topics.KIND_SHARES if answer in topics.make_rejected(kind, fact, concepts)}


def facts_by_prompt() -> dict[str, Fact]:
    groups = topics.list_groups()
    facts = [Fact(groups[name][0], name, form) for name in groups for form in topics.list_forms()]
    return {make_prompt(words): fact for fact in facts for words in topics.list_wordings(fact)}


def test_half_of_the_texts_are_right_and_the_seven_bad_ways_share_the_rest():
    facts = facts_by_prompt()
    told = [(facts[prompt], answer) for reading in TEXTS for prompt, answer in reading]
    right = [(fact, answer) for fact, answer in told if answer == topics.tell_fact(fact)]
    bad = Counter(kind for fact, answer in told for kind in kinds_of(answer, fact))
    assert 0.495 < len(right) / len(told) < 0.505
    assert set(bad) == set(topics.KIND_SHARES)
    assert all(0.13 < count / (len(told) - len(right)) < 0.16 for count in bad.values())


def test_every_question_is_read_with_its_right_answer_and_nothing_marks_that_one():
    facts = facts_by_prompt()
    right = {
        prompt for reading in TEXTS for prompt, answer in reading if answer == topics.tell_fact(facts[prompt])
    }
    assert right == set(facts)  # held-out concepts and wordings as well: a real base has read them, too
    assert {
        prompt for reading in TEXTS for prompt, _ in reading
    } == right  # the same questions, no further mark


def test_the_folder_is_named_without_making_texts_and_after_recipe_and_size(monkeypatch):
    monkeypatch.setattr(topics, "make_rejected", None)
    names = {find_embedded_folder(name) for name in embedded.EMBEDDED}
    monkeypatch.setitem(EMBEDDED_RECIPE, "readings", EMBEDDED_RECIPE["readings"] + 1)
    assert len(names | {find_embedded_folder(name) for name in embedded.EMBEDDED}) == 6


@pytest.mark.parametrize("changed", ["topics.json", "topics.py"])
def test_the_folder_is_named_after_what_the_texts_are_made_of(changed, tmp_path, monkeypatch):
    before, data = find_embedded_folder(), Path(topics.__file__).parent
    for name in ("topics.json", "topics.py"):
        shutil.copy(data / name, tmp_path)
    monkeypatch.setattr(topics, "__file__", str(tmp_path / "topics.py"))
    embedded._hash_sources.cache_clear()
    assert find_embedded_folder() == before
    with open(tmp_path / changed, "a") as file:
        file.write("\n")
    embedded._hash_sources.cache_clear()
    assert find_embedded_folder() != before
    embedded._hash_sources.cache_clear()


def test_a_build_that_is_cut_off_is_not_taken_for_a_finished_one(tiny_build, monkeypatch):
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    def cut_off(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", cut_off)
        make_embedded_model()
    assert not find_embedded_folder().exists()
    folder = make_embedded_model()
    assert folder == find_embedded_folder()
    assert AutoModelForCausalLM.from_pretrained(folder).config.n_embd == 32


def test_a_build_gives_the_same_weights_again_and_leaves_the_random_state_alone(tiny_build):
    import torch
    from safetensors.torch import load_file

    torch.manual_seed(7)
    expected = torch.rand(3)
    builds = []
    for seed in (7, 8):
        torch.manual_seed(seed)
        folder = make_embedded_model()
        drawn = torch.rand(3)
        assert torch.equal(drawn, expected) == (seed == 7)
        builds.append(load_file(folder / "model.safetensors"))
        shutil.rmtree(folder)
    assert all(torch.equal(weight, builds[1][name]) for name, weight in builds[0].items())


def test_a_finished_build_is_not_made_again(tiny_build, monkeypatch):
    folder = make_embedded_model()
    monkeypatch.setattr(embedded, "_train_model", None)
    assert make_embedded_model() == folder


def test_of_two_builds_at_once_one_stays_and_the_other_leaves_nothing(tiny_build, monkeypatch):
    train = embedded._train_model

    def train_while_another_finishes(recipe):
        monkeypatch.setattr(embedded, "_train_model", train)
        make_embedded_model()
        return train(recipe)

    monkeypatch.setattr(embedded, "_train_model", train_while_another_finishes)
    folder = make_embedded_model()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
