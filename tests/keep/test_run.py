"""Whose folder it is, where a run goes on, and what a start that is refused leaves as it was."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from made import CONFIG, ROWS, SIDES, contents, fill_checkpoint, make_checkpoint, make_result

from dpo_helpers.config import RunConfig
from dpo_helpers.errors import UserError
from dpo_helpers.files import write_json
from dpo_helpers.keep.run import open_run
from dpo_helpers.machine import find_machine


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A function that opens a run on the CPU, the working folder beside it; all are closed after the test."""
    opened = []
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def start(folder="run", config=CONFIG, **options):
        opened.append(open_run(config, folder, find_machine("cpu"), **options))
        return opened[-1]

    yield start
    for run in opened:
        run.close()


def tree(root):
    """Return every path below a folder with its content, to see that nothing changed."""
    return {
        str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in sorted(root.rglob("*"))
    }


# Only what is ours is written over


@pytest.mark.parametrize("name", ["", " ", ".", "..", "/", "x" * 400, "a\0b", "\ud800", "../work"])
def test_a_name_that_is_no_folder_of_its_own_is_refused(start, tmp_path, name):
    before = tree(tmp_path)
    with pytest.raises(UserError, match="使えません"):
        start(name)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("place", ["folder", "mirror"])
def test_a_folder_of_the_users_is_left_as_it_is(start, tmp_path, place):
    (tmp_path / "mine").mkdir()
    for name in ("train.jsonl", "README.md"):
        (tmp_path / "mine" / name).write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"この学習のものではないファイルがあります（README.md など）"):
        start(tmp_path / "mine") if place == "folder" else start(mirror=tmp_path / "mine")
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("folder", "mirror"), [("run", "run/copy"), ("a/run", "a"), ("run", "run.checkpoints/m"), ("r", "r")]
)
def test_a_mirror_inside_the_run_or_around_it_is_refused(start, tmp_path, folder, mirror):
    before = tree(tmp_path)
    with pytest.raises(UserError, match="互いの外に"):
        start(tmp_path / folder, mirror=tmp_path / mirror)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("place", ["run", "drive", "run.checkpoints"])
def test_a_link_that_leads_outside_is_refused(start, tmp_path, place):
    start(tmp_path / "run", mirror=tmp_path / "drive").close()
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "metrics.json").write_text("secret")
    link = (
        tmp_path
        / place
        / ("dpo-000002" if "check" in place else "slot-0" if place == "drive" else "reference")
    )
    link.symlink_to(tmp_path / "secret", target_is_directory=True)
    with pytest.raises(UserError, match="外のファイルへのリンク"):
        start(tmp_path / "run", mirror=tmp_path / "drive")
    assert contents(tmp_path / "secret") == {"metrics.json": b"secret"}


def test_a_folder_reached_by_a_link_is_the_folder_itself(start, tmp_path):
    start(tmp_path / "run").close()
    (tmp_path / "link").symlink_to(tmp_path / "run", target_is_directory=True)
    (tmp_path / "link.checkpoints").symlink_to(tmp_path / "run.checkpoints", target_is_directory=True)
    make_checkpoint(tmp_path / "run.checkpoints" / "dpo-000002")
    assert start(tmp_path / "link").newest().step == 2


@pytest.mark.parametrize("place", ["here", "mirror"])
def test_what_the_version_before_left_is_explained_and_not_touched(start, tmp_path, place):
    old = tmp_path / "old"
    (old / "checkpoints" / "dpo-000025").mkdir(parents=True)
    for name in (
        "run_config.json",
        "run.lock",
        "adapter_model.safetensors",
        "checkpoints/dpo-000025/manifest.json",
    ):
        (old / name).write_text("{}")
    before = tree(tmp_path)
    with pytest.raises(UserError, match="前のバージョンのノートブック"):
        start(old) if place == "here" else start(mirror=old)
    assert tree(tmp_path) == before
    fresh = start(old, resume="never")
    assert fresh.folder == tmp_path / "old.2" and contents(old) == {
        name.removeprefix("old/"): content for name, content in before.items() if content is not None
    }


# Fresh starts are recorded


@pytest.mark.parametrize("name", ["v3", "run", "run[1]", "実行 [lr=8e-4]"])
def test_numbers_at_the_end_of_a_name_are_just_a_name(start, tmp_path, name):
    other = CONFIG.replace({"beta": 0.3})
    for ending in (".2", ".20251125", ".x"):
        start(tmp_path / f"{name}{ending}", other).close()
    assert start(tmp_path / name).folder == tmp_path / name
    start(tmp_path / name).close()
    fresh = start(tmp_path / name, resume="最初から")
    assert fresh.folder == tmp_path / f"{name}.3"  # .2 is taken by a run of that name
    fresh.close()
    assert start(tmp_path / name).folder == tmp_path / f"{name}.3"
    assert start(tmp_path / f"{name}.2", other).folder == tmp_path / f"{name}.2"


def test_a_fresh_start_leaves_the_old_run_as_it_is_here_and_on_the_mirror(start, tmp_path):
    start(tmp_path / "run", mirror=tmp_path / "drive").close()
    before = tree(tmp_path)
    fresh = start(tmp_path / "run", mirror=tmp_path / "drive", resume="never")
    assert (fresh.folder, fresh.mirror.folder) == (tmp_path / "run.2", tmp_path / "drive.2")
    fresh.close()
    assert {name: value for name, value in tree(tmp_path).items() if name in before} == before
    shutil.rmtree(tmp_path / "run.2")  # a new machine knows it by the mirror's record
    assert start(tmp_path / "run", mirror=tmp_path / "drive").folder == tmp_path / "run.2"


# A start that is refused changes nothing


@pytest.mark.parametrize("place", ["run", "elsewhere"], ids=["on this machine", "with the mirror alone"])
def test_other_settings_are_refused_by_name(start, tmp_path, place):
    run = start(tmp_path / "run", mirror=tmp_path / "drive")
    run.mirror.submit(make_checkpoint(run.checkpoints / "dpo-000002"))
    run.close()
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"別の設定の結果.*beta: 0\.1 → 0\.3") as refused:
        start(tmp_path / place, CONFIG.replace({"beta": 0.3}), mirror=tmp_path / "drive")
    assert "RESUME" in str(refused.value) and tree(tmp_path) == before


def test_settings_that_were_cut_off_are_written_again(start, tmp_path):
    run = start(tmp_path / "run", mirror=tmp_path / "drive")
    make_checkpoint(run.checkpoints / "dpo-000002")
    run.close()
    for place in ("run", "drive"):
        (tmp_path / place / "run.json").write_text('{"format": 2, "fir')
    with pytest.raises(UserError, match=r"beta: 0\.1 → 0\.3"):  # the checkpoint's own settings decide
        start(tmp_path / "run", CONFIG.replace({"beta": 0.3}), mirror=tmp_path / "drive")
    assert start(tmp_path / "run", mirror=tmp_path / "drive").newest().step == 2
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"] == CONFIG.as_dict()


@pytest.mark.parametrize("text", ["[" * 20_000, '{"settings": []}', "\0", "[1]"])
def test_garbage_in_the_record_of_a_folder_with_settings_is_ours_and_made_again(start, tmp_path, text):
    start(tmp_path / "run").close()
    (tmp_path / "run" / "run.json").write_text(text)
    assert start(tmp_path / "run").newest() is None
    assert json.loads((tmp_path / "run" / "run.json").read_text())["number"] == 1


HOLD = """
import sys, time
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from dpo_helpers.config import RunConfig
from dpo_helpers.keep.run import open_run
from dpo_helpers.machine import find_machine
run = open_run(RunConfig(model_name="someone/model", sft_epochs=0), sys.argv[1], find_machine("cpu"))
print("open", flush=True)
time.sleep(60)
"""


def test_two_processes_on_one_folder_are_one_too_many_and_a_killed_one_lets_go(start, tmp_path):
    root = str(Path(__file__).parents[2])
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run"), root], stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"open\n"
    before = tree(tmp_path)
    with pytest.raises(UserError, match="別のノートブックかターミナルが使っています"):
        start(tmp_path / "run", CONFIG.replace({"beta": 0.3}).replace({"beta": 0.1}))
    assert tree(tmp_path) == before
    holder.kill()
    holder.wait()
    assert start(tmp_path / "run").folder == tmp_path / "run"


def test_a_cell_run_again_takes_over_from_itself(start, tmp_path):
    first = start(tmp_path / "run", mirror=tmp_path / "drive")
    again = start(tmp_path / "run", mirror=tmp_path / "drive")
    assert again.lock.is_locked and not first.lock.is_locked
    first.mirror.submit(make_checkpoint(first.checkpoints / "dpo-000002"))
    assert first.mirror.finish(5) is False and first.mirror.taken


# Where a run goes on


def test_the_newest_good_one_of_both_places_is_taken(start, tmp_path):
    run = start(tmp_path / "run", mirror=tmp_path / "drive")
    for step in (2, 4):
        run.mirror.submit(make_checkpoint(run.checkpoints / f"dpo-{step:06d}", step=step))
        assert run.mirror.finish(5)
    run.close()
    shutil.rmtree(run.checkpoints / "dpo-000004")
    assert start(tmp_path / "run").newest().step == 2
    assert start(tmp_path / "run", mirror=tmp_path / "drive").newest().step == 4
    assert start(tmp_path / "new machine", mirror=tmp_path / "drive").newest().step == 4


def test_a_million_steps_sort_rightly(start, tmp_path):
    run = start(tmp_path / "run")
    for step in (999_999, 1_000_000, 12):
        make_checkpoint(run.checkpoints / f"dpo-{step:06d}", step=step, max_steps=2_000_000)
    assert start(tmp_path / "run").newest().step == 1_000_000


def rewrite(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def edit(name, **values):
    return rewrite(name, lambda content: json.dumps(json.loads(content) | values).encode())


def save(name, value):
    def harm(folder):
        import torch

        torch.save(value, folder / name)

    return harm


SENSELESS = {
    "empty weights": rewrite("adapter_model.safetensors", lambda content: b""),
    "weights of another kind": rewrite(
        "adapter_model.safetensors", lambda c: c.replace(b"lora_A", b"hada_A")
    ),
    "a checkpoint of another step": edit("trainer_state.json", global_step=7),
    "a log of numbers": edit("trainer_state.json", log_history=[1, 2]),
    "no log": edit("trainer_state.json", log_history=[]),
    "an unknown setting": edit("progress.json", config={"learning": 1}),
    "a batch of none": edit("progress.json", micro_batch=0),
    "seconds of text": edit("progress.json", seconds={"training": "long"}),
    "nested progress": rewrite("progress.json", lambda content: b"[" * 10_000),
    "no optimizer": lambda folder: (folder / "optimizer.pt").unlink(),
    "an optimizer of another shape": save(
        "optimizer.pt", {"state": {}, "param_groups": 3} | {"state": {0: {}}}
    ),
    "an optimizer that runs code": save("optimizer.pt", {"state": print}),
    "a schedule that is ahead": save("scheduler.pt", {"last_epoch": 99}),
    "random states of nobody": save("rng_state.pth", [1, 2, 3]),
    "a scaler without scale": save("scaler.pt", {"growth": 1}),
}


@pytest.mark.parametrize("name", SENSELESS)
def test_a_checkpoint_that_is_whole_and_senseless_gives_way_to_the_one_before(start, tmp_path, capsys, name):
    from dpo_helpers.folders import write_manifest

    run = start(tmp_path / "run")
    make_checkpoint(run.checkpoints / "dpo-000002", step=2)
    SENSELESS[name](fill_checkpoint(run.checkpoints / "dpo-000004", step=4))
    write_manifest(run.checkpoints / "dpo-000004", stage="dpo", step=4)
    assert start(tmp_path / "run").newest().step == 2
    assert "dpo-000004 は書きかけか壊れているので" in capsys.readouterr().out


def test_an_optimizer_that_no_manifest_lists_is_not_loaded(start, tmp_path):
    run = start(tmp_path / "run")
    make_checkpoint(run.checkpoints / "dpo-000002", step=2)
    newer = make_checkpoint(run.checkpoints / "dpo-000004", step=4)
    manifest = json.loads((newer / "manifest.json").read_text())
    del manifest["files"]["optimizer.pt"]
    write_json(newer / "manifest.json", manifest)
    assert start(tmp_path / "run").newest().step == 2


# Rows and base


def test_other_rows_are_refused_with_their_counts_even_where_only_the_result_is_left(start, tmp_path):
    run = start(tmp_path / "run", mirror=tmp_path / "drive")
    run.check_rows(*SIDES)
    make_result(run.folder, **run.progress.identity)
    assert run.deliver()
    run.close()
    shutil.rmtree(run.checkpoints)
    before = contents(run.folder)
    for folder in ("run", "new machine"):
        again = start(tmp_path / folder, mirror=tmp_path / "drive")
        with pytest.raises(UserError, match=r"学習データ（6 行、2 行 → 5 行、2 行）.*学習の設定は同じです"):
            again.check_rows(ROWS[:5], ROWS[6:])
        again.check_rows(*SIDES)
        assert again.read_finished()["steps"] == 8
        again.close()
    assert {**contents(run.folder), "run.json": b""} == {**before, "run.json": b""}


def test_training_with_other_settings_than_the_run_was_opened_with_is_named(start, tmp_path):
    import torch

    run = start(tmp_path / "run")
    with pytest.raises(UserError, match="num_samples: 1000 → 300"):
        run.check_ready(CONFIG.replace({"num_samples": 300}), torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="データを分けるセルを実行"):
        run.check_ready(CONFIG, torch.nn.Linear(2, 2))
    run.check_rows(*SIDES)
    run.check_ready(CONFIG, torch.nn.Linear(2, 2))
    assert set(run.progress.identity) == {"rows", "counts", "base"}


def test_saving_what_is_not_this_runs_is_refused(start, tmp_path):
    from types import SimpleNamespace as Some

    run = start(tmp_path / "run")
    with pytest.raises(UserError, match="データを分けるセル"):
        run.check_result(None, *SIDES)
    run.check_rows(*SIDES)
    with pytest.raises(UserError, match="今の行は、この学習の行ではありません"):
        run.check_result(None, [], [])
    state, args = Some(global_step=3, max_steps=8), Some(output_dir=str(run.checkpoints / "writing-dpo"))
    with pytest.raises(UserError, match="まだ終わっていません"):
        run.check_result(Some(state=state, args=args), *SIDES)
    args.output_dir = str(tmp_path / "other.checkpoints" / "writing-dpo")
    with pytest.raises(UserError, match="この学習のものではありません"):
        run.check_result(Some(state=state, args=args), *SIDES)


def test_a_base_from_a_mirror_is_used_by_this_run_alone(start, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = RunConfig(model_name="embedded", num_samples=30)
    run = start(tmp_path / "run", config, mirror=tmp_path / "drive")
    made = fill_checkpoint(run.checkpoints / "dpo-000002", config=config)
    (made / "base_model").mkdir()
    (made / "base_model" / "model.safetensors").write_bytes(b"foreign")
    from dpo_helpers.folders import write_manifest

    write_manifest(made, stage="dpo", step=2)
    run.mirror.submit(made)
    run.close()
    again = start(tmp_path / "new", config, mirror=tmp_path / "drive")
    assert contents(again.base) == {"model.safetensors": b"foreign"} and again.base == again.find_base()
    assert not (tmp_path / "cache").exists() and os.listdir(tmp_path / "work") == []
