"""Done when 1: the healthy image of 2026-08-19, with real pip."""

import time

import pytest
from simulate import difference, doctor, load_image, pip_check, set_up, versions

pytestmark = pytest.mark.environments

SACREBLEU = {
    "sacrebleu",
    "portalocker",
    "tabulate",
    "colorama",
    "lxml",
}  # it, and what of its own needs the image lacks


@pytest.mark.parametrize(("python", "pip"), [("3.13", "24.1.2"), ("3.11", "24.1.2"), ("3.12", "newest")])
def test_set_up_adds_what_is_missing_and_moves_torchao_only(make, python, pip):
    environment = make(load_image("image-2026-08-19.json"), python=python, pip=pip)
    before, complaints = versions(environment), pip_check(environment)

    said = set_up(environment)

    changes = difference(before, versions(environment))
    assert {name for name, (old, _) in changes.items() if old} == {"torchao"}
    assert set(changes) - {"torchao"} == {"matplotlib-fontja", "trl", *SACREBLEU}
    assert changes["trl"][0] is None and changes["trl"][1].startswith("0.29.")
    assert changes["matplotlib-fontja"][0] is None
    assert changes["torchao"][0] == "0.10.0"
    assert pip_check(environment) <= complaints
    assert "torchao: 0.10.0 → 0.18.0" in said and "再起動は必要ありません" in said
    assert said.count(" → ") == len(changes) and "予告したとおりに変更しました" in said

    after, start = versions(environment), time.monotonic()
    assert "何も変更しませんでした" in set_up(environment)
    assert time.monotonic() - start < 4
    assert doctor(environment, "--metadata-only")[0] == 0
    code, _, said = doctor(environment, "--metadata-only", "--fix")
    assert code == 0 and "何も変更しませんでした" in said
    assert versions(environment) == after


def test_set_up_installs_an_extra_requirement_as_well(make):
    environment = make(load_image("image-2026-08-19.json"))
    before = versions(environment)
    said = set_up(environment, ("tinydb",))
    assert "tinydb" in said
    assert {name for name, (old, _) in difference(before, versions(environment)).items() if old} == {
        "torchao"
    }


def test_set_up_stops_where_torch_is_missing_instead_of_choosing_one(make):
    image = load_image("image-2026-08-19.json", torch=None)
    environment = make(image)
    before = versions(environment)
    with pytest.raises(AssertionError, match="torch（PyTorch）がない"):
        set_up(environment)
    assert versions(environment) == before
