"""Six breakages on Colab's image, and what no repair may do; try_breakages.py tries all on four images."""

import time

import breakages
import pytest
from simulate import difference, doctor, find_site, load_image, pip_check, run, set_up, versions
from try_breakages import check_repair

pytestmark = pytest.mark.environments
IMAGE = breakages.IMAGE


@pytest.fixture(scope="module")
def base(make):
    """The image after set-up."""
    python = make(load_image(IMAGE), python="3.13")
    set_up(python)
    return python


@pytest.fixture
def colab(base, tmp_path):
    return breakages.copy_environment(base, tmp_path / "copy")


def test_a_healthy_image_is_left_alone(colab):
    seen = check_repair(colab)
    assert (seen["codes"], seen["found"], seen["moved"], seen["quiet"]) == ([0, 0, 0], [], {}, True)


@pytest.mark.parametrize(
    ("breakage", "moved"),
    [
        (breakages.install_an_old_trl, {"trl": "0.29.1"}),
        (breakages.move_fsspec_ahead, {"fsspec": "2025.3.0"}),
        (breakages.move_fsspec_ahead_with_gcsfs, {"fsspec": "2025.3.0", "gcsfs": "2025.3.0"}),
        (breakages.leave_tilde_folders, {}),
        (breakages.uninstall_half_and_the_metadata, {}),
        (breakages.damage_packaging, {}),
    ],
)
def test_what_is_announced_is_what_moves_and_a_second_repair_finds_nothing(colab, breakage, moved):
    breakage(colab)
    seen = check_repair(colab)
    assert seen["found"] and seen["untouched by looking"] and seen["codes"] == [1, 0, 0] and seen["quiet"]
    assert seen["as announced"] and seen["moved"] == moved
    assert seen["new complaints"] == []


def test_an_interrupted_pip_is_recognised_and_its_remains_are_cleaned_up(colab):
    version = versions(colab)["tqdm"]
    breakages.stop_pip_between(colab)
    assert "tqdm" not in versions(colab)
    code, report, said = doctor(colab, "--metadata-only")
    assert (code, report["incomplete"]) == (1, ["fsspec", "tqdm"])
    assert "途中で止まった pip の残り: ~qdm" in said and "tqdm: " in said
    assert "tqdm" in set_up(colab)
    assert versions(colab)["tqdm"] == version
    assert run(colab, "-c", "import tqdm; print(tqdm.__version__)").stdout.strip() == version
    assert list(find_site(colab).glob("~*")) == []
    assert doctor(colab, "--metadata-only")[0] == 0


def test_a_replaced_torch_is_refused_with_the_way_to_a_fresh_runtime(colab):
    breakages.replace_torch(colab)
    before = versions(colab)
    code, report, said = doctor(colab, "--metadata-only", "--fix")
    assert code == 1 and report["torch_replaced"]
    assert "ランタイムを接続解除して削除" in said and "何も変更しませんでした" in said
    assert versions(colab) == before


@pytest.mark.parametrize("seconds", [2, 4, 6, 8])
def test_a_repair_that_is_stopped_at_any_second_leaves_a_state_that_the_next_one_repairs(colab, seconds):
    breakages.move_fsspec_ahead(colab)
    broken = versions(colab)
    repaired = {"fsspec": ("2025.9.0", "2025.3.0")}
    code, said = breakages.fix_and_stop_after(colab, seconds)
    assert difference(broken, versions(colab)) in ({}, repaired), said
    assert code == 0 or "Traceback" not in said
    assert doctor(colab, "--metadata-only", "--fix")[0] == 0
    assert difference(broken, versions(colab)) == repaired


def test_a_silent_index_ends_in_a_sentence_and_changes_nothing(make):
    python = make(load_image(IMAGE), python="3.13")
    before, start = versions(python), time.monotonic()
    address, server = breakages.serve_silence()
    with server, pytest.raises(AssertionError, match="配布元から返事がない"):
        set_up(
            python,
            environment={"PIP_INDEX_URL": address, "PIP_CONFIG_FILE": "/dev/null", "PIP_FIND_LINKS": ""},
        )
    assert time.monotonic() - start < 60
    assert versions(python) == before


def test_without_a_network_set_up_stops_soon(make):
    python, start = make(load_image(IMAGE), python="3.13"), time.monotonic()
    offline = {
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_FIND_LINKS": "",
    }
    with pytest.raises(AssertionError, match="配布元から返事がない"):
        set_up(python, environment=offline)
    assert time.monotonic() - start < 15


def test_the_requirements_move_nothing_that_is_there_under_the_images_constraints(make, tmp_path):
    python = make(load_image(breakages.COMPLETE), python="3.13")
    before, complaints = versions(python), pip_check(python)
    (tmp_path / "installed.txt").write_text("".join(f"{n}=={v}\n" for n, v in before.items()))
    requirements = str(breakages.ROOT / "requirements.txt")
    breakages.pip(python, "install", "-c", str(tmp_path / "installed.txt"), "-r", requirements)
    changes = difference(before, versions(python))
    assert {name for name, (old, _) in changes.items() if old} == set()
    assert {"trl", "matplotlib-fontja", "sacrebleu"} <= set(changes)
    assert pip_check(python) <= complaints


def test_the_pure_parts_take_little_time_on_all_703_packages(make):
    python = make(load_image(breakages.COMPLETE), python="3.13")
    code = (
        "import time; from dpo_helpers.setup import packages as p; start = time.perf_counter()\n"
        "found = p.find_packages(); conflicts = p.find_conflicts(found)\n"
        "rungs = p.choose_movable([c for c in conflicts if c.ours], found, p.REQUIREMENTS)\n"
        "p.make_constraints(rungs[1], found); print(len(found), time.perf_counter() - start)"
    )
    number, seconds = run(python, "-c", code).stdout.split()
    assert int(number) > 700 and float(seconds) < 4
