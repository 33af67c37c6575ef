"""doctor.py without pip; whole repairs run in tests/environments."""

import json
import sys

import pytest

from dpo_helpers.errors import UserError
from dpo_helpers.setup import doctor
from dpo_helpers.setup.doctor import Diagnosis, find_hiding, quick_fix, run_doctor, run_trial
from dpo_helpers.setup.packages import Conflict, Package

FAILED = {"error": "ImportError: no", "cuda": ""}
PASSED = {"error": "", "cuda": ""}
OURS = Conflict("datasets", "fsspec<=2025.3.0", "fsspec", "2026.2", True)
STRANGER = Conflict("gcsfs", "fsspec==1", "fsspec", "2", True)
KIN = Conflict("torchvision", "torch==2.11.0", "torch", "2.6.0+cu118", True)
PACKAGES = {
    "trl": Package("trl", "1"),
    "fsspec": Package("fsspec", "2026.2"),
    "tqdm": Package("tqdm", "4.67.3"),
}

CURED = PACKAGES | {"fsspec": Package("fsspec", "2025.3.0")}


def diagnosis(conflicts=(), incomplete=(), leftovers=(), hiding=(), trial=None, stale=()) -> Diagnosis:
    return Diagnosis(list(conflicts), list(incomplete), list(leftovers), list(hiding), trial, list(stale), {})


@pytest.mark.parametrize(
    ("found", "code"),
    [
        (diagnosis(), 0),
        (diagnosis(trial=PASSED, stale=["numpy"]), 2),
        (diagnosis([OURS], trial=PASSED), 1),
        (diagnosis(incomplete=["tqdm"]), 1),
        (diagnosis(leftovers=["~qdm"]), 1),
        (diagnosis(hiding=["torch.py"], trial=PASSED), 1),
        (diagnosis(trial=FAILED), 1),
        (diagnosis([OURS], stale=["numpy"]), 1),
    ],
)
def test_the_exit_code_is_0_healthy_1_broken_2_restart(found, code):
    assert found.exit_code == code


def test_a_replaced_torch_shows_by_its_kin_and_by_missing_files_only():
    stranger = Conflict("fastai", "torch<2.7", "torch", "2.7.1", True)
    assert diagnosis([KIN]).torch_replaced and diagnosis(incomplete=["torch"]).torch_replaced
    assert not diagnosis([stranger], incomplete=["tqdm"]).torch_replaced


@pytest.mark.parametrize("found", [diagnosis(trial=PASSED), diagnosis([KIN, OURS], trial=FAILED)])
def test_nothing_is_touched_when_nothing_is_broken_or_torch_was_replaced(found, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "diagnose", lambda metadata_only: found)
    monkeypatch.setattr(doctor.pip, "run_pip", lambda *arguments, **options: pytest.fail("pip was called"))
    assert quick_fix(repair=True) == found
    assert "QUICK_FIX は何も変更しませんでした" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (diagnosis([OURS]), "datasets は fsspec<=2025.3.0 を求めますが、fsspec は 2026.2（学習が動かない"),
        (
            diagnosis([Conflict("dpo_helpers", "trl<2", "trl", None, True)]),
            "このノート は trl<2 を求めますが、trl は ありません（学習が動かないおそれがあります）",
        ),
        (diagnosis([STRANGER]), "学習は動きます。gcsfs だけが困ります"),
        (diagnosis(incomplete=["tqdm"]), "tqdm のファイルが欠けています"),
        (diagnosis(leftovers=["~qdm"]), "途中で止まった pip の残り: ~qdm（学習には影響しません）"),
        (diagnosis(hiding=["torch.py"]), "作業フォルダの torch.py が、同じ名前のライブラリを隠しています"),
        (diagnosis(trial=FAILED), "原因が、パッケージの情報からは分かりません。\nColab では"),
        (diagnosis(trial=PASSED), "診断: 健康です"),
        (diagnosis([KIN]), "torch が入れ替わっているか"),
    ],
)
def test_each_finding_says_what_it_means_for_the_reader(found, sentence, monkeypatch, capsys):
    monkeypatch.setattr(doctor.pip, "find_packages", lambda: PACKAGES)
    doctor.print_diagnosis(found)
    assert sentence in capsys.readouterr().out


def test_the_table_is_announced_with_versions_and_nothing_moves_without_being_asked(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "diagnose", lambda metadata_only: diagnosis([OURS], incomplete=["tqdm"]))
    monkeypatch.setattr(doctor.pip, "find_packages", lambda: PACKAGES)
    monkeypatch.setattr(doctor.pip, "carry_out", lambda *arguments: pytest.fail("something was changed"))
    monkeypatch.setattr(doctor.pip, "make_plan", lambda conflicts, packages: (CURED, ""))
    assert quick_fix().plan == {"fsspec": "2025.3.0", "tqdm": "4.67.3"}
    said = capsys.readouterr().out
    assert "  fsspec: 2026.2 → 2025.3.0\n  tqdm: 4.67.3 → 4.67.3（入れ直し）\nQUICK_FIX = True で" in said


@pytest.mark.parametrize("trial", [FAILED, {"error": "", "cuda": ""}])
def test_a_repair_after_which_less_works_is_put_back(trial, monkeypatch):
    state = dict(PACKAGES)
    monkeypatch.setattr(doctor.pip, "find_packages", lambda: dict(state))
    monkeypatch.setattr(doctor.pip, "check_may_install", lambda packages: None)
    monkeypatch.setattr(doctor.pip, "carry_out", lambda before, after, again: state.update(after))
    monkeypatch.setattr(doctor, "diagnose", lambda metadata_only: diagnosis(trial=trial))
    found = diagnosis([OURS], trial={"error": "", "cuda": "Tesla T4"})
    with pytest.raises(UserError, match="悪くなったので、元に戻しました"):
        doctor.repair_environment(found, PACKAGES, CURED, False)
    assert state == PACKAGES


def test_a_repair_that_is_interrupted_is_put_back(monkeypatch):
    state = dict(PACKAGES)

    def interrupt(metadata_only):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor.pip, "find_packages", lambda: dict(state))
    monkeypatch.setattr(doctor.pip, "check_may_install", lambda packages: None)
    monkeypatch.setattr(doctor.pip, "carry_out", lambda before, after, again: state.update(after))
    monkeypatch.setattr(doctor, "diagnose", interrupt)
    with pytest.raises(UserError, match="修復を止めました"):
        doctor.repair_environment(diagnosis([OURS]), PACKAGES, CURED, False)
    assert state == PACKAGES


def test_files_of_the_working_folder_that_hide_a_library_are_named(tmp_path, monkeypatch):
    for name in ("torch.py", "random.py", "pip.py", "notes.py"):
        (tmp_path / name).touch()
    for name in ("datasets", "peft"):
        (tmp_path / name).mkdir()
    (tmp_path / "datasets" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    names = {"torch", "datasets", "peft", "huggingface-hub"}
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    assert find_hiding(names) == ["datasets", "pip.py", "random.py", "torch.py"]
    monkeypatch.setattr(sys, "path", ["/elsewhere"])
    assert find_hiding(names) == []


def test_json_goes_to_standard_output_and_the_rest_to_standard_error(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "diagnose", lambda metadata_only: diagnosis(trial=PASSED))
    assert run_doctor(as_json=True) == 0
    printed = capsys.readouterr()
    facts = json.loads(printed.out)
    assert (facts["exit_code"], facts["torch_replaced"], facts["conflicts"]) == (0, False, [])
    assert "診断: 健康です" in printed.err


def test_what_the_doctor_may_not_do_is_a_sentence_and_exit_code_1(monkeypatch, capsys):
    def refuse(*arguments, **options):
        raise UserError("仮想環境ではない")

    monkeypatch.setattr(doctor, "quick_fix", refuse)
    assert run_doctor(fix=True) == 1
    assert capsys.readouterr().err == "⚠️ 仮想環境ではない\n"


@pytest.mark.versions
def test_the_trial_trains_one_step_with_the_installed_libraries():
    assert run_trial() == PASSED
    assert "秒で終わりませんでした" in run_trial(timeout=0.1)["error"]
