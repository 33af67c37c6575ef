"""Done when 7: the pure parts over all 703 packages of the image."""

import json
import time

import pytest
from simulate import FIXTURES, load_image

from dpo_helpers.setup.conflicts import (
    Package,
    add_undeclared,
    find_closure,
    find_conflicts,
    find_guards,
    find_untouchable,
    make_ladder,
    split_components,
)

pytestmark = pytest.mark.environments


def test_conflicts_classes_and_ladder_over_the_complete_list_take_under_two_seconds():
    overlay = json.loads((FIXTURES / "after-uv-pip-install-trl.json").read_text())
    image = load_image("image-2026-08-19-complete.json.gz") | overlay
    assert len(image) > 700
    packages = {name: Package(name, item["version"], tuple(item["requires"])) for name, item in image.items()}

    start = time.perf_counter()
    packages = add_undeclared(packages)
    conflicts = find_conflicts(packages)
    components = split_components([conflict for conflict in conflicts if conflict.kind == "ours"])
    ladders = [make_ladder(component, packages) for component in components]
    guards = [find_guards(ladder[0], packages) for ladder in ladders]
    seconds = time.perf_counter() - start

    assert seconds < 2
    assert {(c.package, c.required) for c in conflicts if c.kind == "ours"} == {
        ("diffusers", "huggingface-hub"),
        ("gradio", "huggingface-hub"),
        ("gradio-client", "huggingface-hub"),
        ("dpo_helpers", "matplotlib-fontja"),
        ("dpo_helpers", "sacrebleu"),
        ("peft", "torchao"),
    }
    assert ("ipython", "jedi") in {(c.package, c.required) for c in conflicts if c.kind == "noise"}
    assert sorted(len(component) for component in components) == [1, 1, 1, 3]
    for ladder, names in zip(ladders, guards, strict=True):
        assert not any(find_untouchable(packages) & set(step.freed) for step in ladder)
        assert not set(ladder[-1].uninstall) & find_closure(packages)
        assert not {name.split("==")[0] for name in names} & set(ladder[0].freed)
