"""packages.py without pip; real pip runs in tests/environments."""

import signal
import subprocess
import sys
import threading

import pytest

from dpo_helpers.errors import UserError
from dpo_helpers.setup import packages as setup
from dpo_helpers.setup.packages import (
    Conflict,
    Package,
    choose_movable,
    find_closure,
    find_conflicts,
    find_stale,
    has_its_files,
    make_constraints,
    make_plan,
    parse_requirements,
    read_package,
    write_image,
)

WANTED = ("datasets", "torch")


def installed(*lines: str) -> dict[str, Package]:
    """ "name version: requirement | requirement" → a package set, as short as a test's table."""
    made = {}
    for line in lines:
        head, _, tail = line.partition(":")
        name, version = head.split()
        asked = parse_requirements(part.strip() for part in tail.split("|") if part.strip())
        made[name] = Package(name, version, asked)
    return made


SEED = installed(
    "datasets 3.6.0: fsspec[http]<=2025.3.0,>=2023.1.0 | numpy",
    "torch 2.7.1: fsspec",
    "fsspec 2025.3.0: aiohttp ; extra == 'http'",
    "numpy 2.0.2",
    "gcsfs 2025.3.2: fsspec==2025.3.2",
    "fastai 2.7.19: torch<2.7,>=1.10 | fastcore<1.8 | fastdownload | numpy",
    "fastdownload 0.0.7: fastcore",
    "fastcore 1.7.29",
    "ipython 7.34.0: jedi>=0.16",
    "pyspark 3.5.1: py4j==0.10.9.9",
    "py4j 0.10.9.7",
)


def install_on_disk(folder, version: str, source: str = "", name: str = "made"):
    """What pip leaves on disk for a package with one module; returns its folder of metadata."""
    (folder / f"{name}.py").write_text(source)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "INSTALLER").write_text("pip\n")
    (info / "RECORD").write_text(f'{name}.py,,\n{info.name}/METADATA,,\n"{info.name}/RECORD",,\n')
    return info


def test_conflicts_are_ours_if_they_touch_what_we_use():
    assert [(c.package, c.requirement, c.found, c.ours) for c in find_conflicts(SEED, WANTED)] == [
        ("fastai", "torch<2.7,>=1.10", "2.7.1", True),
        ("gcsfs", "fsspec==2025.3.2", "2025.3.0", True),
        ("ipython", "jedi>=0.16", None, False),
        ("pyspark", "py4j==0.10.9.9", "0.10.9.7", False),
    ]


def test_what_the_project_lacks_is_its_own_complaint():
    assert find_conflicts({}, ("trl>=0.29.1,<2",)) == [
        Conflict("dpo_helpers", "trl<2,>=0.29.1", "trl", None, True)
    ]


def test_an_old_torchao_counts_and_a_missing_one_does_not():
    assert [c.requirement for c in find_conflicts(installed("torchao 0.10.0"), ())] == ["torchao>=0.16"]
    assert find_conflicts(installed("torchao 0.16.0"), ()) == []
    assert find_conflicts({}, ()) == []


def test_the_closure_holds_what_is_asked_for_installed_or_not():
    assert find_closure(SEED, WANTED) == {"datasets", "torch", "fsspec", "numpy"}
    assert find_closure({}, ("trl",)) == {"trl"}


def test_a_marker_for_another_machine_and_an_extra_do_not_count():
    lines = ("gone ; sys_platform == 'os2'", "other ; extra == 'x'", "this is no requirement", "Kept_Name>=1")
    assert [str(r) for r in parse_requirements(lines)] == ["kept-name>=1"]


def test_versions_are_judged_as_pip_check_does():
    packages = installed("a 1: b>=2 | c>=1 | d>=1", "b 2.1rc1", "c 1.1build1", "d 2.11.0+cu128")
    assert find_conflicts(packages, ("a",)) == []


def test_first_both_sides_may_move_then_what_they_ask_for_but_never_torch():
    conflict = [c for c in find_conflicts(SEED, WANTED) if c.package == "fastai"]
    first, second = choose_movable(conflict, SEED, WANTED)
    assert first == {"fastai": ">=2.7"}
    assert second == {"fastai": ">=2.7", "fastcore": ">=1.7", "fastdownload": ">=0.0", "fsspec": ">=2025.3"}


def test_what_is_complained_about_may_go_back_and_takes_with_it_what_pins_it():
    packages = SEED | installed("fsspec 2025.9.0", "gcsfs 2025.9.0: fsspec==2025.9.0")
    conflicts = [c for c in find_conflicts(packages, WANTED) if c.required == "fsspec"]
    first, second = choose_movable(conflicts, packages, WANTED)
    assert first == {"fsspec": "", "datasets": ">=3.6"}
    assert second == {"fsspec": "", "datasets": ">=3.6", "gcsfs": ""}


def test_numpy_moves_only_when_it_is_complained_about():
    packages = installed("torch 2.11", "numpy 1.26.4", "jax 0.5: numpy>=2", "tensorflow 2.18: numpy>=2")
    for conflicts in (find_conflicts(packages, ("torch", "numpy")),):
        assert choose_movable(conflicts, packages, ("torch", "numpy"))[0]["numpy"] == ""
    assert "numpy" not in choose_movable(find_conflicts(SEED, WANTED), SEED, WANTED)[1]


def test_google_colab_does_not_move_but_what_it_pins_comes_back():
    packages = installed("google-colab 1.0: pandas==2.2.3", "pandas 2.2.2")
    conflicts = find_conflicts(packages, ("pandas",))
    assert choose_movable(conflicts, packages, ("pandas",)) == [{"pandas": ""}, {"pandas": ""}]


def test_constraints_hold_everything_but_what_may_move_and_ask_nothing_that_was_in_vain():
    packages = installed(
        "torch 2.11.0+cu128: fsspec>=1",
        "gcsfs 2025.3.2: fsspec==2025.3.2",
        "datasets 4.0.0: fsspec<=2025.3.0",
        "fsspec 2026.2",
        "debian 1.1build1",
    )
    lines = make_constraints({"gcsfs": ">=2025.3", "fsspec": ""}, packages)
    assert lines == ["gcsfs>=2025.3", "torch==2.11.0+cu128", "fsspec>=1", "datasets==4.0.0"]


def test_pip_is_shown_the_image_without_the_demands_that_it_does_not_meet(tmp_path):
    packages = installed("peft 0.20: torch>=2 | numpy>=9 | absent", "torch 2.11", "numpy 2.1")
    write_image(tmp_path, packages)
    lines = (tmp_path / "peft-0.20.dist-info" / "METADATA").read_text().splitlines()
    assert lines == ["Metadata-Version: 2.1", "Name: peft", "Version: 0.20", "Requires-Dist: torch>=2"]


def test_a_plan_that_breaks_something_else_is_not_taken(monkeypatch):
    packages = SEED | installed("stranger 1: gcsfs==2025.3.2")
    found = installed("gcsfs 2025.3.0: fsspec==2025.3.0")
    monkeypatch.setattr(setup, "ask_pip", lambda targets, movable, packages: found)
    conflict = [c for c in find_conflicts(packages, WANTED) if c.package == "gcsfs"]
    after, words = make_plan(conflict, packages, WANTED)
    assert after == packages and "新しい食い違い" in words
    assert make_plan(conflict, SEED, WANTED) == (SEED | found, "")


def test_a_hopeless_conflict_does_not_keep_a_curable_one_broken(monkeypatch):
    """fastai and gcsfs have no solution together, nor has fastai alone."""
    found = installed("gcsfs 2025.3.0: fsspec==2025.3.0")
    answers = {frozenset(["gcsfs"]): found, frozenset(["fsspec", "gcsfs"]): found}
    monkeypatch.setattr(
        setup, "ask_pip", lambda targets, movable, packages: answers.get(frozenset(targets), "no way")
    )
    conflicts = [c for c in find_conflicts(SEED, WANTED) if c.ours]
    assert make_plan(conflicts, SEED, WANTED) == (SEED | found, "torch: no way")


def test_what_has_no_record_is_set_aside_even_where_an_interrupted_pip_left_the_same(tmp_path, monkeypatch):
    site = tmp_path / "site-packages"
    site.mkdir()
    monkeypatch.setattr(sys, "path", [str(site)])
    install_on_disk(site, "1.0").rename(site / "~ade-1.0.dist-info")
    (install_on_disk(site, "1.0") / "RECORD").unlink()
    before, seen = setup.find_packages(), []

    def run_pip(*arguments):
        seen.append((arguments, sorted(path.name for path in site.glob("*.dist-info"))))
        install_on_disk(site, "1.0")

    monkeypatch.setattr(setup, "run_pip", run_pip)
    setup.carry_out(before, before, ["made"])
    assert seen == [(("install", "--no-deps", "made==1.0"), ["~ade-1.0.dist-info"])]
    assert [path.name for path in site.glob("*.dist-info")] == ["made-1.0.dist-info"]


def test_moves_are_told_with_both_versions():
    before, after = installed("trl 0.12", "tqdm 4", "gone 1"), installed("trl 1.0", "tqdm 4", "rich 14")
    assert setup.list_moves(before, after, ["tqdm"]) == {
        "gone": "  gone: 1 → なし",
        "rich": "  rich: なし → 14",
        "tqdm": "  tqdm: 4 → 4（入れ直し）",
        "trl": "  trl: 0.12 → 1.0",
    }


def test_pip_is_told_of_everybody_who_uses_what_may_move(monkeypatch):
    packages = SEED | installed("fsspec 2025.9.0", "gcsfs 2025.9.0: fsspec==2025.9.0")
    asked = []
    monkeypatch.setattr(setup, "ask_pip", lambda targets, movable, packages: asked.append(targets) or "no")
    conflict = [c for c in find_conflicts(packages, WANTED) if c.package == "datasets"]
    assert make_plan(conflict, packages, WANTED) == (packages, "no")
    assert asked == [{"datasets"}, {"datasets", "gcsfs"}]


@pytest.mark.parametrize("damage", ["RECORD", "METADATA", "made.py"])
def test_a_package_whose_files_are_gone_is_not_whole(tmp_path, damage):
    info = install_on_disk(tmp_path, "1.0")
    assert has_its_files(read_package(info))
    (tmp_path / damage if damage == "made.py" else info / damage).unlink()
    package = read_package(info)
    assert (package.name, package.version) == ("made", "1.0")
    assert not has_its_files(package)


def test_debians_packages_have_no_record_and_are_whole(tmp_path):
    info = install_on_disk(tmp_path, "1.0")
    (info / "RECORD").unlink()
    (info / "INSTALLER").write_text("debian\n")
    assert has_its_files(read_package(info))


def test_what_an_interrupted_pip_set_aside_is_never_taken_for_the_package(tmp_path, monkeypatch):
    site = tmp_path / "site-packages"
    site.mkdir()
    monkeypatch.setattr(sys, "path", [str(site)])
    old = install_on_disk(site, "2.0")
    old.rename(site / "~ade-2.0.dist-info")
    assert setup.find_packages()["made"].whole is False
    assert setup.find_incomplete(setup.find_packages(), ("other",)) == ["made"]
    install_on_disk(site, "1.0")
    assert (setup.find_packages()["made"].version, setup.find_packages()["made"].whole) == ("1.0", True)
    assert setup.find_incomplete(setup.find_packages(), ("other",)) == []
    assert [path.name for path in setup.find_leftovers()] == ["~ade-2.0.dist-info"]


@pytest.mark.parametrize(
    ("loaded", "now", "stale"),
    [("1.0", "2.0", ["made"]), ("2025.06.15", "2025.6.15", []), ("2.0+cpu", "2.0", []), (None, "2.0", [])],
)
def test_a_loaded_library_of_another_version_asks_for_a_restart(monkeypatch, loaded, now, stale):
    module = type(sys)("made")
    if loaded:
        module.__version__ = loaded
    monkeypatch.setitem(sys.modules, "made", module)
    packages = installed(f"made {now}", "trl 1: made")
    assert find_stale(packages, packages) == stale


def test_what_pip_moved_asks_for_a_restart_only_if_it_was_loaded(monkeypatch):
    before, now = installed("made 1.0"), installed("made 2.0")
    assert find_stale(before, now) == []
    monkeypatch.setitem(sys.modules, "made", type(sys)("made"))
    assert find_stale(before, now) == ["made"]
    assert find_stale({}, now) == []


def test_a_system_python_is_refused_and_colabs_is_ours_to_use(monkeypatch, tmp_path):
    torch = read_package(install_on_disk(tmp_path, "2.11", name="torch"))
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    with pytest.raises(UserError, match="仮想環境ではない"):
        setup.check_may_install({"torch": torch})
    setup.check_may_install({"torch": torch, **installed("google-colab 1.0")})


def test_a_missing_torch_is_not_chosen_for_the_user():
    with pytest.raises(UserError, match="torch（PyTorch）がない"):
        setup.check_may_install({})


def test_where_nothing_is_missing_set_up_does_not_call_pip(monkeypatch, capsys):
    monkeypatch.setattr(setup, "find_conflicts", lambda packages, wanted: [])
    monkeypatch.setattr(setup, "find_incomplete", lambda packages, wanted: [])
    monkeypatch.setattr(setup, "run_pip", lambda *arguments, **options: pytest.fail("pip was called"))
    monkeypatch.setattr(setup, "find_stale", lambda before, now: [])
    assert setup.install_missing() is False
    assert "何も変更しませんでした" in capsys.readouterr().out


def test_when_there_is_no_plan_pips_own_words_are_shown(monkeypatch, tmp_path):
    torch = read_package(install_on_disk(tmp_path, "2.11", name="torch"))
    monkeypatch.setattr(setup, "find_packages", lambda: {"torch": torch})
    monkeypatch.setattr(setup, "run_pip", lambda *arguments, **options: "ERROR: ResolutionImpossible")
    with pytest.raises(
        UserError, match=r"何も変更しませんでした.*ランタイムのバージョン.*\n.*ResolutionImpossible"
    ):
        setup.install_missing()


def test_a_pip_py_in_the_working_folder_is_not_run(monkeypatch, tmp_path):
    (tmp_path / "pip.py").write_text("raise SystemExit('the working folder was run')")
    monkeypatch.chdir(tmp_path)
    assert setup.run_pip("--version") is None
    assert "no such option" in setup.run_pip("install", "--no-such-thing")


@pytest.mark.parametrize(("arguments", "ends"), [(("install", "--dry-run"), True), (("install",), False)])
def test_an_interruption_ends_a_pip_that_only_looks_and_waits_for_one_that_moves(
    monkeypatch, tmp_path, arguments, ends
):
    done = tmp_path / "done"
    source = f"import time; time.sleep(3); open({str(done)!r}, 'w')"

    def start(command, **options):
        return subprocess.Popen([sys.executable, "-c", source], **options)

    monkeypatch.setattr(setup, "Popen", start)
    threading.Timer(1, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        setup.run_pip(*arguments)
    assert done.exists() is not ends


def test_an_interrupted_set_up_ends_in_a_sentence(monkeypatch, tmp_path):
    torch = read_package(install_on_disk(tmp_path, "2.11", name="torch"))

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(setup, "find_packages", lambda: {"torch": torch})
    monkeypatch.setattr(setup, "run_pip", interrupt)
    with pytest.raises(UserError, match=r"止めました。もう一度実行すると.*\n  なし"):
        setup.install_missing()


def test_a_half_removed_packaging_does_not_keep_the_set_up_from_its_work(tmp_path):
    (tmp_path / "packaging").mkdir()
    (tmp_path / "packaging" / "__init__.py").write_text("")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from dpo_helpers.setup import packages"
    code += "; print(packages.version)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip/_vendor/packaging/version.py" in done.stdout, done.stderr
