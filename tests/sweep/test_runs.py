"""The experiment runner: plans, the file of results, intervals; and that no run sees the one before (at
both ends of the range).
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo_helpers.config import RunConfig
from dpo_helpers.errors import TrainingStopped, UserError
from dpo_helpers.sweep.plan import load_grid, make_plan, run_plan
from dpo_helpers.sweep.results import Results
from dpo_helpers.sweep.runs import REFUSAL, Variation, Workshop, flip_labels, make_easy, make_rows
from dpo_helpers.sweep.tables import (
    T_975,
    Claim,
    check_claim,
    collect_answers,
    compare_by_seed,
    describe_claims,
    estimate,
    make_recommended_config,
    recommend,
    summarize_outcomes,
)

ROOT = Path(__file__).parent.parent.parent
SMALL = {
    "num_samples": 60,
    "training_rows": 16,
    "sft_epochs": 0,
    "learning_rate": 1e-2,
    "lora_rank": 4,
    "lora_scale": 4.0,
}
PAIRS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}


class Machine:
    name = device = "cpu"


class FakeWorkshop:
    """Measures in no time: the held-out loss is the learning rate plus the seed. `breaks` maps the n-th
    run to an error.
    """

    machine = Machine

    def __init__(self, breaks=None):
        self.breaks, self.measured = breaks or {}, []

    def measure(self, config, variation):
        self.measured.append((config.learning_rate, config.seed))
        if error := self.breaks.get(len(self.measured)):
            raise error
        return {"held_out": {"loss": config.learning_rate + config.seed}, "seconds": {"training": 0.0}}


RATES = {"learning_rate": [0.1, 0.2, 0.3]}


def test_a_grid_is_every_combination_with_every_seed():
    plan = make_plan({"beta": [0.1, 0.5], "label_noise": [0.0, 0.4]}, {"learning_rate": 1e-3}, [1, 2])
    assert [(e.config.beta, e.variation.label_noise, e.config.seed) for e in plan] == [
        (0.1, 0.0, 1),
        (0.1, 0.0, 2),
        (0.1, 0.4, 1),
        (0.1, 0.4, 2),
        (0.5, 0.0, 1),
        (0.5, 0.0, 2),
        (0.5, 0.4, 1),
        (0.5, 0.4, 2),
    ]
    assert all(e.config.learning_rate == 1e-3 for e in plan)
    assert plan[2].setting == (("beta", 0.1), ("label_noise", 0.4))
    assert [e.config.beta for e in make_plan([{"beta": 2}, {}])] == [2.0, 0.1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"betta": [0.1]}, "知らない項目があります：betta"),
        ({"beta": [0.1, 0.0]}, "beta = 0.0"),
        ({"beta": 0.1}, "[ ] に並べて"),
        ({"label_noise": [0.9]}, "label_noise = 0.9"),
        ({"data": ["easy"]}, "generated, longer, refusal"),
        ({"training_rows": [-1]}, "training_rows = -1"),
        ({"data_file": ["absent.csv"]}, "ファイルが見つかりません"),
        ({"seed": [1]}, "seeds に並べて"),
        ({"beta": []}, "グリッドが空です"),
        ({}, "グリッドが空です"),
        ([], "グリッドが空です"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_runs(settings, words):
    with pytest.raises(UserError, match=words.replace("[", r"\[").replace("]", r"\]")):
        make_plan(settings)


def test_a_grid_file_says_what_is_wrong_with_it(tmp_path):
    with pytest.raises(UserError, match="見つかりません"):
        load_grid(tmp_path / "absent.json")
    for text, words in (
        ("{", "JSON の書き方"),
        ("[]", "の形で書いて"),
        ('{"grid": {}}', "の形で書いて"),
        ("{}", "グリッドが空"),
    ):
        (tmp_path / "grid.json").write_text(text)
        with pytest.raises(UserError, match=words):
            load_grid(tmp_path / "grid.json")
    (tmp_path / "grid.json").write_text('{"settings": {"beta": [0.1]}}')
    assert [e.config.seed for e in load_grid(tmp_path / "grid.json")] == [42, 43, 44]


def test_runs_are_the_same_run_only_when_all_that_counts_is_the_same(tmp_path):
    own, same = tmp_path / "a.csv", tmp_path / "b.csv"
    own.write_text("x"), same.write_text("x")
    base = {"learning_rate": 1e-3}
    settings = [
        base,
        {"learning_rate": "1e-3"},
        {**base, "beta": 0.2},
        {**base, "label_noise": 0.1},
        {**base, "num_samples": 60},
        {**base, "model_name": "embedded"},
        {**base, "model_name": "embedded-small"},
        {**base, "data_file": str(own)},
        {**base, "data_file": str(same)},
    ]
    names = [e.identity for e in make_plan(settings)]
    assert names[0] == names[1] and names[7] == names[8] and len(set(names)) == 7


def strip_times(records):
    volatile = ("seconds", "finished")
    return [{name: value for name, value in record.items() if name not in volatile} for record in records]


def test_stopped_and_run_again_it_ends_with_the_same_table(tmp_path, capsys):
    plan = make_plan(RATES, seeds=[1, 2])
    whole = run_plan(plan, Results(tmp_path / "whole.jsonl"), FakeWorkshop())
    with pytest.raises(TrainingStopped, match="6 個のうち 3 個"):
        run_plan(plan, Results(tmp_path / "r.jsonl"), FakeWorkshop({4: KeyboardInterrupt()}))
    second = FakeWorkshop()
    again = run_plan(plan, Results(tmp_path / "r.jsonl"), second)
    assert len(second.measured) == 3 and "残りの 3 個" in capsys.readouterr().out
    assert summarize_outcomes(again) == summarize_outcomes(whole)
    assert strip_times(record for _, record in again) == strip_times(record for _, record in whole)
    third = FakeWorkshop()
    run_plan(plan, Results(tmp_path / "r.jsonl"), third)
    assert third.measured == [] and len((tmp_path / "r.jsonl").read_text().splitlines()) == 6


def test_each_base_is_loaded_once(tmp_path):
    workshop = FakeWorkshop()  # the embedded model is another one for every seed
    outcomes = run_plan(
        make_plan(RATES, {"model_name": "embedded"}, [1, 2]), Results(tmp_path / "r.jsonl"), workshop
    )
    seeds = [seed for _, seed in workshop.measured]
    assert seeds in ([1, 1, 1, 2, 2, 2], [2, 2, 2, 1, 1, 1])
    assert [experiment.config.seed for experiment, _ in outcomes] == [
        1,
        2,
    ] * 3  # the table keeps the plan's order


def test_a_failed_and_a_collapsed_run_are_results_and_not_the_end(tmp_path):
    from dpo_helpers.train.callbacks import BrokenNumbers

    plan = make_plan(RATES)
    breaks = {1: BrokenNumbers(7), 2: RuntimeError("no memory")}
    outcomes = run_plan(plan, Results(tmp_path / "r.jsonl"), FakeWorkshop(breaks))
    assert [record["status"] for _, record in outcomes] == ["nan", "failed", "ok"]
    assert "ステップ 7" in outcomes[0][1]["reason"] and outcomes[1][1]["reason"] == "RuntimeError: no memory"
    assert [line["評価の損失"] for line in summarize_outcomes(outcomes)] == ["－", "－", "42.300"]
    again = FakeWorkshop()
    run_plan(plan, Results(tmp_path / "r.jsonl"), again)
    assert again.measured == []
    outcomes = run_plan(plan, Results(tmp_path / "r.jsonl"), again, retry_failed=True)
    assert again.measured == [(0.2, 42)] and [record["status"] for _, record in outcomes] == [
        "nan",
        "ok",
        "ok",
    ]


def finish(path, count=3):
    run_plan(make_plan(RATES)[:count], Results(path), FakeWorkshop())
    return path.read_text()


def test_a_half_written_last_line_is_kept_aside_and_its_run_repeated(tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    text = finish(path)
    path.write_text(text[:-40])
    workshop = FakeWorkshop()
    run_plan(make_plan(RATES), Results(path), workshop)
    assert workshop.measured == [(0.3, 42)] and "書きかけでした" in capsys.readouterr().out
    lines = path.read_text().splitlines()
    assert lines[:2] == text.splitlines()[:2] and json.loads(lines[2])["config"]["learning_rate"] == 0.3
    assert (tmp_path / "r.jsonl.half-written").read_text() == text.splitlines()[2][:-39] + "\n"


def test_a_whole_last_line_without_its_end_is_a_result(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(finish(path, 2)[:-1])
    workshop = FakeWorkshop()
    run_plan(make_plan(RATES), Results(path), workshop)
    assert workshop.measured == [(0.3, 42)] and len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("line", "words"),
    [('{"schema": 2}', "別のバージョン"), ("garbage", "2 行目"), ('{"a": 1}', "2 行目"), ("7", "2 行目")],
)
def test_a_file_of_another_version_or_with_garbage_is_refused_untouched(tmp_path, line, words):
    path = tmp_path / "r.jsonl"
    first, *rest = finish(path).splitlines()
    path.write_text("\n".join([first, line, *rest]) + "\n")
    before = path.read_bytes()
    with pytest.raises(UserError, match=words):
        Results(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["r.jsonl"]


def test_a_knob_that_is_newer_than_a_result_counts_with_its_default(tmp_path):
    path = tmp_path / "r.jsonl"
    records = [json.loads(line) for line in finish(path).splitlines()]
    for record in records:
        del record["config"]["report_to"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    workshop = FakeWorkshop()
    run_plan(make_plan(RATES), Results(path), workshop)
    assert workshop.measured == []


def test_the_mirror_gets_every_result_and_gives_them_to_a_fresh_machine(tmp_path, capsys):
    mirror = tmp_path / "drive"
    run_plan(make_plan(RATES)[:2], Results(tmp_path / "a" / "r.jsonl", mirror), FakeWorkshop())
    assert (mirror / "r.jsonl").read_bytes() == (tmp_path / "a" / "r.jsonl").read_bytes()
    run_plan(make_plan(RATES)[2:], Results(tmp_path / "b" / "r.jsonl"), FakeWorkshop())
    workshop = FakeWorkshop()
    run_plan(
        make_plan(RATES), Results(tmp_path / "b" / "r.jsonl", mirror), workshop
    )  # both have what the other lacks
    assert workshop.measured == [] and "2 個の結果を引き継ぎました" in capsys.readouterr().out
    assert len((mirror / "r.jsonl").read_text().splitlines()) == 3


def test_a_result_on_the_mirror_replaces_a_failure_here(tmp_path):
    run_plan(
        make_plan(RATES)[:1], Results(tmp_path / "here" / "r.jsonl"), FakeWorkshop({1: RuntimeError("x")})
    )
    run_plan(make_plan(RATES)[:1], Results(tmp_path / "drive" / "r.jsonl"), FakeWorkshop())
    (record,) = Results(tmp_path / "here" / "r.jsonl", tmp_path / "drive").records.values()
    assert record["status"] == "ok" and len((tmp_path / "here" / "r.jsonl").read_text().splitlines()) == 2


def test_a_mirror_that_fails_or_cannot_be_read_stops_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    outcomes = run_plan(make_plan(RATES), Results(tmp_path / "r.jsonl", tmp_path / "file"), FakeWorkshop())
    assert [record["status"] for _, record in outcomes] == [
        "ok"
    ] * 3 and "写せませんでした" in capsys.readouterr().out
    (tmp_path / "drive").mkdir()
    (tmp_path / "drive" / "r.jsonl").write_text("garbage\n")
    run_plan(make_plan(RATES), Results(tmp_path / "r.jsonl", tmp_path / "drive"), FakeWorkshop())
    assert (
        tmp_path / "drive" / "r.jsonl"
    ).read_text() == "garbage\n" and "写しは作らずに" in capsys.readouterr().out
    (tmp_path / "drive" / "r.jsonl").unlink()
    monkeypatch.setattr("dpo_helpers.sweep.results.MIRROR_SECONDS", 0.05)
    monkeypatch.setattr("dpo_helpers.sweep.results.copy_file", lambda source, target: time.sleep(2))
    start = time.monotonic()
    run_plan(make_plan({"beta": [0.2]}), Results(tmp_path / "r.jsonl", tmp_path / "drive"), FakeWorkshop())
    assert time.monotonic() - start < 1 and "応答しません" in capsys.readouterr().out


def test_the_interval_worked_by_hand():
    """Three differences 1, 2, 3: mean 2, s = 1, t(2) = 4.303, half width 4.303 / sqrt(3) = 2.484."""
    difference = compare_by_seed({42: 1.0, 43: 2.0, 44: 4.0, 45: 9.0}, {44: 7.0, 43: 4.0, 42: 2.0})
    assert (
        difference.mean == 2
        and difference.half_width == pytest.approx(2.4843, abs=1e-4)
        and difference.count == 3
    )
    assert difference.direction == "unclear" and str(difference) == "2.000 ± 2.484"
    assert (
        estimate([1.0, 1.1, 1.2]).direction == "higher" and estimate([-1.0, -1.1, -1.2]).direction == "lower"
    )
    assert estimate([1.0, 3.0]) == (2.0, None, 2) and estimate([1.0, 3.0]).direction == "unclear"
    assert compare_by_seed({1: 1.0}, {2: 1.0}) is None


def test_the_quantiles_are_students():
    from scipy.stats import t

    assert [round(t.ppf(0.975, degrees), 3) for degrees in range(1, 31)] == list(T_975)


def make_outcomes(values: dict, metric="loss"):
    """Outcomes of one knob: {beta: [a metric for each of the seeds 1, 2, 3]}."""
    return [
        (experiment, {"status": "ok", "reason": "", "metrics": {"held_out": {metric: value}}})
        for beta, of_seeds in values.items()
        for seed, value in enumerate(of_seeds, start=1)
        for experiment in make_plan([{"beta": beta}], seeds=[seed])
    ]


def test_a_claim_holds_only_with_an_interval_that_excludes_zero():
    claim = Claim(1, {"beta": 0.1}, {"beta": 0.5}, "held_out.loss", "lower", "下がる")
    for second, verdict in (
        ([0.5, 0.61, 0.7], "yes"),
        ([0.7, 0.81, 0.9], "no"),
        ([0.5, 0.8, 0.7], "unclear"),
        ([0.5, 0.6], "unclear"),
        ([], "absent"),
    ):
        outcomes = make_outcomes({0.1: [0.6, 0.7, 0.8], 0.5: second})
        assert check_claim(claim, outcomes)[0] == verdict
    assert (
        describe_claims([claim], make_outcomes({0.1: [0.6], 0.5: [0.5]}))[0]["この結果では"]
        == "種が 1 個なので区間は出せない"
    )


def test_the_recommendation_leaves_out_what_broke():
    def outcome(beta, loss, repetition, status="ok"):
        metrics = (
            {"held_out": {"default_beta_loss": loss}, "answers": {"repetition": repetition}}
            if status == "ok"
            else {}
        )
        return make_plan([{"beta": beta}])[0], {"status": status, "reason": "", "metrics": metrics}

    outcomes = [
        outcome(0.1, 0.6, 0.1),
        outcome(0.2, 0.5, 0.15),
        outcome(0.3, 0.1, 0.9),
        outcome(0.4, 0.0, 0.0, "nan"),
    ]
    setting, reason = recommend(outcomes)
    assert setting == {"beta": 0.2} and "4 通り" in reason and "2 通りは除きました" in reason
    assert recommend(outcomes[2:])[0] == {}
    config = make_recommended_config({"learning_rate": 1e-3, "training_rows": 5, "beta": 9}, {"beta": 0.2})
    assert config == RunConfig(learning_rate=1e-3, beta=0.2)


def test_answers_stand_side_by_side():
    outcomes = make_outcomes({0.1: [1.0], 0.5: [1.0]})
    outcomes[1][1]["metrics"]["shown"] = [{"question": "問い", "answer": "答え"}]
    assert collect_answers(outcomes) == [{"質問": "問い", "beta=0.1": "－", "beta=0.5": "答え"}]


def test_easy_rows_and_flipped_labels(rows):
    longer = make_easy(rows, "longer")
    assert 0.4 < len(longer) / len(rows) < 0.6 and all(
        len(row["chosen"]) > len(row["rejected"]) for row in longer
    )
    refused = make_easy(rows[:5], "refusal")
    assert {row["rejected"] for row in refused} == {REFUSAL} and [r["chosen"] for r in refused] == [
        r["chosen"] for r in rows[:5]
    ]
    flipped = flip_labels(rows[:20], 0.3, seed=1)
    changed = [i for i in range(20) if flipped[i] != rows[i]]
    assert len(changed) == 6 and all(flipped[i]["chosen"] == rows[i]["rejected"] for i in changed)
    assert flip_labels(rows[:20], 0.3, seed=1) == flipped and flip_labels(rows[:20], 0.0, seed=1) == rows[:20]


def test_only_training_rows_change(gpt2_tokenizer):
    config = RunConfig(num_samples=100)
    training, held_out, easy = make_rows(config, Variation(), gpt2_tokenizer)
    assert (len(training), easy) == (79, [])
    noisy, same, _ = make_rows(config, Variation(label_noise=0.5, training_rows=20), gpt2_tokenizer)
    assert (
        len(noisy) == 20
        and sum(a != b for a, b in zip(noisy, training, strict=False)) == 10
        and same == held_out
    )
    refusing, honest, own = make_rows(config, Variation(data="refusal"), gpt2_tokenizer)
    assert honest == held_out and {row["rejected"] for row in [*refusing, *own]} == {REFUSAL}
    assert not {row["concept"] for row in refusing} & {row["concept"] for row in honest}
    with pytest.raises(UserError, match="行しかありません"):
        make_rows(config, Variation(training_rows=81), gpt2_tokenizer)


def numbers(metrics):
    return {name: value for name, value in metrics.items() if name not in ("seconds", "memory_gb")}


@pytest.fixture
def workshop():
    from dpo_helpers.machine import find_machine

    return lambda answers=4: Workshop(find_machine("cpu"), answers)


SETTINGS = [
    {},
    {"beta": 0.5},
    {"sft_epochs": 1, "sft_learning_rate": 1e-2},
    {"loss_type": "sigmoid+sft"},
    {"lora_rank": 2, "loss_type": "robust"},
    {"data": "refusal"},
    {"sft_epochs": 1, "sft_learning_rate": 1e-2, "learning_rate": 1e-3},
    {"label_noise": 0.4, "loss_type": "exo_pair"},
    {},
]


@pytest.mark.versions
def test_a_run_in_a_sweep_gives_the_same_numbers_as_alone(tiny_models, workshop):
    plan = make_plan(SETTINGS, {**SMALL, **PAIRS, "model_name": str(tiny_models["gpt2"])})
    shared = workshop()
    in_sweep = [numbers(shared.measure(e.config, e.variation)) for e in plan]
    assert len(shared._shared) == 4  # honest rows, refusals, flipped rows, and the warm-up
    assert in_sweep[0] == in_sweep[-1] and in_sweep[0] != in_sweep[1]
    for experiment, metrics in list(zip(plan, in_sweep, strict=True))[1:-1]:
        assert numbers(workshop().measure(experiment.config, experiment.variation)) == metrics


@pytest.mark.versions
@pytest.mark.parametrize("sft_epochs", [0, 1])
def test_the_runner_and_the_main_path_give_the_same_figures(
    tiny_models, workshop, start_run, gpt2_tokenizer, sft_epochs
):
    from dpo_helpers.judge.scores import score_rows, summarize_scores
    from dpo_helpers.train.trainers import build_dpo_trainer, train_dpo, train_sft

    (experiment,) = make_plan(
        [{}],
        {
            **SMALL,
            **PAIRS,
            "model_name": str(tiny_models["gpt2"]),
            "sft_epochs": sft_epochs,
            "sft_learning_rate": 1e-2,
        },
    )
    metrics = workshop(0).measure(experiment.config, experiment.variation)
    run = start_run(
        experiment.config, *make_rows(experiment.config, experiment.variation, gpt2_tokenizer)[:2]
    )
    warmed_up = train_sft(run)
    trainer = train_dpo(run, build_dpo_trainer(run, warmed_up), warmed_up)
    scores = score_rows(
        trainer.model, trainer.processing_class, run.held_out_rows, experiment.config.max_length
    )
    theirs = summarize_scores(scores, experiment.config.beta)
    assert {name: metrics["held_out"][name] for name in theirs} == pytest.approx(theirs, abs=1e-3)
    assert metrics["first_loss"] == pytest.approx(0.693147, abs=1e-5) and metrics["held_out"][
        "loss"
    ] != pytest.approx(0.6931, abs=1e-3)


@pytest.mark.versions
def test_the_sum_of_two_losses_is_trls(tiny_models, workshop):
    """The first loss, before any update: ln 2, and ln 2 plus the mean negative log-likelihood of the
    chosen tokens (6.4 to 8 here).
    """
    common = {**SMALL, **PAIRS, "model_name": str(tiny_models["gpt2"])}
    first = {}
    for experiment in make_plan({"loss_type": ["sigmoid", "sigmoid+sft", "robust"]}, common):
        first[experiment.config.loss_type] = workshop(0).measure(experiment.config, experiment.variation)[
            "first_loss"
        ]
    assert first["sigmoid"] == pytest.approx(0.693147, abs=1e-5) == first["robust"]
    assert 5 < first["sigmoid+sft"] - first["sigmoid"] < 10


@pytest.mark.versions
def test_broken_numbers_and_wrong_layers_are_recorded(tiny_models, workshop, tmp_path):
    settings = [
        {"learning_rate": 1.0, "lora_scale": 1024.0, "max_grad_norm": 1000.0},
        {"lora_targets": "absent"},
        {},
    ]
    plan = make_plan(settings, {**SMALL, **PAIRS, "model_name": str(tiny_models["gpt2"])})
    outcomes = run_plan(plan, Results(tmp_path / "r.jsonl"), workshop())
    assert [record["status"] for _, record in outcomes][1:] == [
        "failed",
        "ok",
    ] and "absent という層" in outcomes[1][1]["reason"]
    assert outcomes[2][1]["metrics"]["steps"] == 4


@pytest.mark.versions
def test_memory_stays_flat(tiny_models, workshop):
    plan = make_plan(
        {"learning_rate": [1e-3 * i for i in range(1, 13)]},
        {**SMALL, **PAIRS, "model_name": str(tiny_models["gpt2"])},
    )
    shared = workshop()
    used = [shared.measure(e.config, e.variation)["memory_gb"] for e in plan]
    assert used[-1] - used[3] < 0.01


@pytest.mark.versions
def test_killed_in_the_middle_it_ends_with_the_same_results(tiny_models, tmp_path):
    grid = {
        "settings": {"beta": [0.1, 0.2, 0.3, 0.4]},
        "common": {**SMALL, **PAIRS, "model_name": str(tiny_models["gpt2"])},
        "seeds": [42],
    }
    (tmp_path / "grid.json").write_text(json.dumps(grid))

    def start(name):
        words = [
            sys.executable,
            "-m",
            "dpo_helpers",
            "experiment",
            "--grid",
            tmp_path / "grid.json",
            "--results",
            tmp_path / name,
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [*words, "--device", "cpu"],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    killed = start("r.jsonl")
    while not ((tmp_path / "r.jsonl").exists() and (tmp_path / "r.jsonl").read_text().count("\n") >= 2):
        assert killed.poll() is None, killed.stdout.read()
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    before = (tmp_path / "r.jsonl").read_text()
    assert before.count("\n") < 4
    for name in ("r.jsonl", "whole.jsonl"):
        done = start(name)
        assert "評価の損失" in done.communicate()[0] and done.returncode == 0
    again, whole = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("r.jsonl", "whole.jsonl")
    )
    assert (tmp_path / "r.jsonl").read_text().startswith(before[: before.rfind("\n") + 1])
    for records in (again, whole):
        for record in records:
            record["metrics"] = numbers(record["metrics"])
    assert strip_times(again) == strip_times(whole)
