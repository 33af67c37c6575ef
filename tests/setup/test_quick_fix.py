"""quick_fix.py and runtime.py without pip; whole repairs run in tests/environments."""

import argparse
import json
import sys

import pytest

from dpo_helpers.setup import quick_fix as doctor
from dpo_helpers.setup.conflicts import Conflict, Package
from dpo_helpers.setup.quick_fix import Diagnosis
from dpo_helpers.setup.runtime import find_stale_modules, run_trial

FAILED = {"passed": ["import torch"], "failed": "LoRA", "error": "ImportError: no", "cuda": None}
PASSED = {"passed": ["import torch", "LoRA", "DPO"], "failed": None, "error": "", "cuda": None}
OURS = Conflict("datasets", "fsspec<=2025.3.0", "fsspec", "2026.2", "ours")
FOREIGN = Conflict("pyspark", "py4j==1", "py4j", "2", "not ours")
KIN = Conflict("torchvision", "torch==2.11.0", "torch", "2.6.0+cu118", "ours")


@pytest.mark.parametrize(
    ("diagnosis", "code"),
    [
        (Diagnosis([], [], None, []), 0),
        (Diagnosis([FOREIGN], [], PASSED, []), 0),
        (Diagnosis([], [], PASSED, ["numpy"]), 2),
        (Diagnosis([OURS], [], PASSED, []), 1),
        (Diagnosis([], ["tqdm"], PASSED, []), 1),
        (Diagnosis([], [], FAILED, []), 1),
        (Diagnosis([OURS], [], None, ["numpy"]), 1),
    ],
)
def test_the_exit_code_is_0_healthy_1_broken_2_restart(diagnosis, code):
    assert diagnosis.exit_code == code


@pytest.mark.parametrize(
    "diagnosis", [Diagnosis([FOREIGN], [], PASSED, []), Diagnosis([KIN, OURS], [], FAILED, [])]
)
def test_nothing_is_touched_when_nothing_is_broken_or_torch_was_replaced(diagnosis, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "cure", lambda *arguments: pytest.fail("something was changed"))
    assert doctor.repair_environment(diagnosis) is diagnosis
    assert "何も変更しませんでした" in capsys.readouterr().out


def test_a_replaced_torch_shows_by_its_kin_only():
    stranger = Conflict("fastai", "torch<2.7", "torch", "2.7.1", "ours")
    assert Diagnosis([KIN], [], None, []).torch_replaced
    assert not Diagnosis([stranger], [], None, []).torch_replaced


def test_a_librarys_own_words_become_a_conflict():
    error = (
        "ImportError: Found an incompatible version of torchao. Found version 0.10.0, "
        "but only versions above 0.16.0 are supported"
    )
    found = doctor.read_complaint({"error": error}, {"torchao": Package("torchao", "0.10.0")})
    assert found == [Conflict("dpo_helpers", "torchao>=0.16.0", "torchao", "0.10.0", "ours")]
    assert doctor.read_complaint({"error": error}, {}) == []
    assert (
        doctor.read_complaint(
            {"error": "RuntimeError: CUDA error"}, {"torchao": Package("torchao", "0.10.0")}
        )
        == []
    )


def test_a_trial_that_comes_less_far_or_loses_the_gpu_is_worse():
    assert doctor.is_worse(PASSED, FAILED)
    assert doctor.is_worse({**PASSED, "cuda": "Tesla T4"}, PASSED)
    assert not doctor.is_worse(FAILED, PASSED)
    assert not doctor.is_worse(None, None)


def test_each_row_says_what_it_means_for_the_reader():
    names = {
        "datasets": ("fsspec<=2025.3.0",),
        "fsspec": (),
        "gcsfs": ("fsspec==1",),
        "fastai": (),
        "pyspark": ("py4j==1",),
    }
    packages = {name: Package(name, "2", requires) for name, requires in names.items()}
    rows = [
        doctor.explain(conflict, packages)
        for conflict in (
            OURS,
            Conflict("gcsfs", "fsspec==1", "fsspec", "2", "ours"),
            Conflict("dpo_helpers", "trl<2", "trl", None, "ours"),
            Conflict("dpo_helpers", "torch", "torch", None, "ours"),
            FOREIGN,
        )
    ]
    assert rows == [
        (
            "fsspec 2026.2",
            "datasets 2: fsspec<=2025.3.0",
            "学習が動かないおそれがあります",
            "fsspec を合う版にします",
        ),
        ("fsspec 2", "gcsfs 2: fsspec==1", "学習は動きます。gcsfs だけが困ります", "gcsfs を合う版にします"),
        ("trl （なし）", "このノート: trl<2", "学習が動かないおそれがあります", "trl を入れます"),
        ("torch （なし）", "このノート: torch", "学習が動かないおそれがあります", "直せません"),
        ("py4j 2", "pyspark 2: py4j==1", "このノートには関係しません", "何もしません"),
    ]


def test_json_goes_to_standard_output_and_the_rest_to_standard_error(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "diagnose", lambda metadata_only: Diagnosis([FOREIGN], [], None, []))
    monkeypatch.setattr(doctor, "snapshot_packages", lambda: {"pyspark": Package("pyspark", "3.5.1")})
    parser = argparse.ArgumentParser()
    doctor.add_doctor_arguments(parser)
    assert doctor.run_doctor(parser.parse_args(["--json", "--metadata-only"])) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["conflicts"][0]["package"] == "pyspark"
    assert "診断: 健康です" in printed.err


def install_on_disk(folder, version: str, source: str) -> None:
    """What pip leaves on disk for a package `made` with one module."""
    for old in folder.glob("made-*.dist-info"):
        old.rename(folder / f"old-{old.name[5:8]}.gone")
    (folder / "made.py").write_text(source)
    info = folder / f"made-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: made\nVersion: {version}\n")
    (info / "RECORD").write_text(f"made.py,,\n{info.name}/METADATA,,\n{info.name}/RECORD,,\n")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("made", None)


@pytest.mark.parametrize(
    ("loaded", "on_disk", "stale"),
    [("1.0", "2.0", ["made"]), ("2025.06.15", "2025.6.15", []), ("2.0+cpu", "2.0", [])],
)
def test_a_module_is_stale_when_its_version_differs_from_the_disk(folder, loaded, on_disk, stale):
    install_on_disk(folder, "1.0", f"__version__ = '{loaded}'")
    __import__("made")
    install_on_disk(folder, on_disk, "")
    assert find_stale_modules() == stale


def test_what_pip_moved_is_stale_only_if_it_was_imported(folder):
    install_on_disk(folder, "1.0", "")
    assert find_stale_modules({"made": ("0.9", "1.0")}) == []
    __import__("made")
    assert find_stale_modules({"made": ("0.9", "1.0")}) == ["made"]
    assert find_stale_modules({"made": (None, "1.0")}) == []


def test_a_package_without_its_files_is_incomplete(folder):
    install_on_disk(folder, "1.0", "")
    assert doctor.find_incomplete({"made"}) == []
    (folder / "made.py").unlink()
    assert doctor.find_incomplete({"made"}) == ["made"]


@pytest.mark.versions
def test_the_trial_trains_one_step_with_the_installed_libraries():
    report = run_trial()
    assert (report["failed"], report["error"]) == (None, "")
    assert report["passed"] == [
        *(f"import {name}" for name in ("torch", "datasets", "transformers", "peft", "trl")),
        "CUDA",
        "LoRA",
        "DPO",
    ]
