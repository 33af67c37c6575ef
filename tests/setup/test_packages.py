"""conflicts.py and the parts of packages.py that need no pip; real pip runs in tests/environments."""

import sys

import pytest

from dpo_helpers.errors import UserError
from dpo_helpers.setup import packages as pip
from dpo_helpers.setup.conflicts import (
    Conflict,
    Package,
    Step,
    add_undeclared,
    explain_change,
    find_closure,
    find_conflicts,
    find_guards,
    find_new_conflicts,
    find_untouchable,
    list_changes,
    make_constraints,
    make_ladder,
    split_components,
)

WANTED = ("datasets", "torch")


def installed(*lines: str) -> dict[str, Package]:
    """ "name version: requirement; requirement" → a package set, as short as a test's table."""
    made = {}
    for line in lines:
        head, _, tail = line.partition(":")
        name, version = head.split()
        made[name] = Package(name, version, tuple(part.strip() for part in tail.split("|") if part.strip()))
    return made


SEED = installed(
    "datasets 3.6.0: fsspec[http]<=2025.3.0,>=2023.1.0 | numpy",
    "torch 2.7.1: fsspec",
    "fsspec 2025.3.0: aiohttp ; extra == 'http'",
    "aiohttp 3.11",
    "numpy 2.0.2",
    "gcsfs 2025.3.2: fsspec==2025.3.2",
    "fastai 2.7.19: torch<2.7,>=1.10 | fastcore<1.8 | fastdownload",
    "fastdownload 0.0.7: fastcore",
    "fastcore 1.7.29",
    "ipython 7.34.0: jedi>=0.16",
    "pyspark 3.5.1: py4j==0.10.9.9",
    "py4j 0.10.9.7",
)


def test_conflicts_are_classed_by_whether_they_touch_what_we_use():
    assert [(c.package, c.requirement, c.found, c.kind) for c in find_conflicts(SEED, WANTED)] == [
        ("fastai", "torch<2.7,>=1.10", "2.7.1", "ours"),
        ("gcsfs", "fsspec==2025.3.2", "2025.3.0", "ours"),
        ("pyspark", "py4j==0.10.9.9", "0.10.9.7", "not ours"),
        ("ipython", "jedi>=0.16", None, "noise"),
    ]


def test_what_the_project_lacks_is_its_own_complaint():
    assert find_conflicts({}, ("trl>=0.29.1,<2",)) == [
        Conflict("dpo_helpers", "trl<2,>=0.29.1", "trl", None, "ours")
    ]


def test_the_closure_follows_the_extras_that_are_asked_for():
    assert find_closure(SEED, WANTED) == {"datasets", "torch", "fsspec", "aiohttp", "numpy"}
    assert "aiohttp" not in find_closure(SEED, ("torch",))


def test_two_lines_for_one_package_both_count():
    packages = installed("datasets 4.0: numpy>=1.2 | numpy>=2.3 ; python_version >= '3'", "numpy 2.1")
    assert [c.requirement for c in find_conflicts(packages, ("datasets",))] == ["numpy>=2.3"]


def test_a_marker_for_another_machine_does_not_count():
    packages = installed("datasets 4.0: gone ; sys_platform == 'os2' | other ; python_version < '3'")
    assert find_conflicts(packages, ("datasets",)) == []


def test_versions_are_judged_as_pip_check_does():
    packages = installed(
        "a 1: b>=2 | c>=1 | d>=1 | this is no requirement", "b 2.1rc1", "c 1.1build1", "d 2.11.0+cu128"
    )
    assert find_conflicts(packages, ("a",)) == []


@pytest.mark.parametrize(
    ("peft", "torchao", "found"),
    [
        ("0.20.0", "0.10.0", ["torchao>=0.16"]),
        ("0.20.0", "0.16.0", []),
        ("0.18.1", "0.10.0", []),
        ("0.20.0", None, []),
    ],
)
def test_an_old_torchao_counts_only_beside_a_peft_that_minds_it(peft, torchao, found):
    packages = installed(f"peft {peft}", *([f"torchao {torchao}"] if torchao else []))
    assert [c.requirement for c in find_conflicts(add_undeclared(packages), ("peft",))] == found


def test_what_google_colab_pins_is_untouchable():
    packages = installed(
        "google-colab 1.0: requests==2.32.4 | ipython==7.34.0 | astor>=0.8", "nvidia-nccl-cu12 2.2", "tqdm 4"
    )
    names = find_untouchable(packages)
    assert {"torch", "numpy", "pandas", "google-colab", "requests", "ipython", "nvidia-nccl-cu12"} <= names
    assert not {"tqdm", "astor"} & names


def test_conflicts_that_share_a_package_are_solved_together():
    a, b, c, d = (Conflict(x, y, y, "1", "ours") for x, y in (("p", "q"), ("r", "s"), ("t", "q"), ("r", "t")))
    assert sorted(len(group) for group in split_components([a, b, c])) == [1, 2]
    assert [len(group) for group in split_components([a, b, c, d])] == [4]


def test_a_stranger_moves_to_suit_us_then_with_what_only_it_uses_and_goes_last():
    conflict = find_conflicts(SEED, WANTED)[0]
    first, second, third, last = make_ladder([conflict], SEED, WANTED)
    assert (first.targets, first.freed) == (("fastai",), {"fastai": ">=2.7"})
    assert second.freed == {"fastai": ">=2.7", "fastcore": ">=1.7", "fastdownload": ">=0.0"}
    assert set(third.freed) == {*second.freed, "datasets"}  # never torch
    assert last == Step((), {}, ("fastai",))


def test_what_our_own_library_asks_for_moves_not_the_library():
    packages = SEED | installed("fsspec 2026.2")
    own = [c for c in find_conflicts(packages, WANTED) if c.required == "fsspec"]
    first = make_ladder(own, packages, WANTED)[0]
    assert first.targets == ("fsspec<=2025.3.0,>=2023.1.0", "gcsfs")
    assert first.freed == {"fsspec": "", "gcsfs": ">=2025.3"}


def test_between_two_untouchables_there_is_no_step():
    packages = installed("google-colab 1.0: pandas==2.2.3", "pandas 2.2.2")
    assert make_ladder(find_conflicts(packages, ("pandas",)), packages, ("pandas",)) == []


def test_guards_are_held_users_that_lead_to_no_conflict_of_their_own():
    packages = installed(
        "fsspec 1", "good 1: fsspec", "bad 1: fsspec | absent", "over 1: fsspec | bad", "other 1"
    )
    assert find_guards(Step(("fsspec",), {"fsspec": ""}), packages) == ["good==1"]


def test_constraints_hold_everything_but_what_is_freed():
    packages = installed("torch 2.11.0+cu128", "gcsfs 2025.3.2", "fsspec 2026.2", "debian 1.1build1")
    step = Step(("gcsfs",), {"gcsfs": ">=2025.3", "fsspec": ""})
    assert make_constraints(step, packages) == ["torch==2.11.0+cu128", "gcsfs>=2025.3"]


def test_a_complaint_that_only_changed_its_version_is_not_new():
    old, same, new = (
        Conflict("a", "b<2", "b", "3", "ours"),
        Conflict("a", "b<2", "b", "4", "ours"),
        Conflict("a", "c", "c", None, "ours"),
    )
    assert find_new_conflicts([old], [same, new]) == [new]


def test_changes_and_their_reasons():
    before, after = (
        installed("torchao 0.10.0", "peft 0.20"),
        installed("torchao 0.18.0", "peft 0.20: torchao>=0.16", "trl 1.0", "rich 14"),
    )
    assert list_changes(before, after) == {
        "rich": (None, "14"),
        "torchao": ("0.10.0", "0.18.0"),
        "trl": (None, "1.0"),
    }
    assert explain_change("trl", None, after, ("trl<2",)) == "このノートが使うため（<2）"
    assert explain_change("torchao", "0.10.0", after, ()) == "peft 0.20 が使うため（>=0.16）"
    assert explain_change("rich", None, after, ()) == "ほかと版を合わせるため"


def test_the_columns_of_a_table_stay_straight_with_japanese():
    assert pip.format_table(("名前", "版"), ("trl", "なし"), ("パッケージ", "1")).splitlines() == [
        "名前       | 版",
        "-----------------",
        "trl        | なし",
        "パッケージ | 1",
    ]


def test_a_system_python_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    with pytest.raises(UserError, match="仮想環境ではない"):
        pip.check_may_install(installed("torch 2.11"))
    pip.check_may_install(
        installed("torch 2.11", "google-colab 1.0")
    )  # Colab's own Python is one, and ours to use


def test_a_missing_torch_is_not_chosen_for_the_user():
    with pytest.raises(UserError, match="torch（PyTorch）がありません"):
        pip.check_may_install({})


def test_where_nothing_is_missing_set_up_does_not_call_pip(monkeypatch, capsys):
    ready = installed(
        *(
            "torch 2.11",
            "transformers 5.15",
            "peft 0.20",
            "datasets 4.0",
            "accelerate 1.14",
            "trl 0.29.1",
            "matplotlib-fontja 1.1",
            "sacrebleu 2.6",
        )
    )
    monkeypatch.setattr(pip, "snapshot_packages", lambda: ready)
    monkeypatch.setattr(pip, "run_pip", lambda *arguments, label: pytest.fail("pip was called"))
    monkeypatch.setattr(pip, "find_stale_modules", lambda: [])
    assert pip.install_missing() is False
    assert "何も変更しませんでした" in capsys.readouterr().out


def test_when_no_try_succeeds_pips_own_words_are_shown(monkeypatch):
    monkeypatch.setattr(pip, "snapshot_packages", lambda: installed("torch 2.11", "transformers 5.15"))
    monkeypatch.setattr(pip, "run_pip", lambda *arguments, label: "ERROR: ResolutionImpossible")
    with pytest.raises(UserError, match=r"環境は元のままです.*\n.*ResolutionImpossible"):
        pip.install_missing()


def test_a_step_that_cures_but_breaks_something_else_is_taken_back(monkeypatch):
    state = {**SEED, "stranger": Package("stranger", "1", ("gcsfs==2025.3.2",))}
    before, commands = dict(state), []

    def run_pip(*arguments, label):
        commands.append(arguments)
        version = {"gcsfs==2025.3.2": "2025.3.2"}.get(arguments[-1], "2025.3.0")
        state["gcsfs"] = Package("gcsfs", version, (f"fsspec=={version}",))
        if arguments[0] == "uninstall":
            del state["gcsfs"]

    monkeypatch.setattr(pip, "snapshot_packages", lambda: dict(state))
    monkeypatch.setattr(pip, "run_pip", run_pip)
    conflict = next(c for c in find_conflicts(state, WANTED) if c.package == "gcsfs")
    assert "新しい衝突" in pip.cure([conflict], WANTED, "")
    assert state == before
    assert commands[1] == ("install", "--no-deps", "gcsfs==2025.3.2")
