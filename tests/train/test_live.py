"""The view of a training that runs: one display, seldom redrawn, and a training that it cannot stop."""

import gc
import math
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from tiny_run import build, make_config

from dpo_helpers.train.live import LiveView, draw_html, find_ticks


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Display:
    """Behaves as IPython.display.display; every drawing takes `cost` seconds of the clock."""

    def __init__(self, clock=None, cost=0.0, keep=True):
        self.clock, self.cost, self.keep = clock or Clock(), cost, keep
        self.opened, self.times, self.shown = 0, [], []

    def __call__(self, data, raw, display_id):
        assert raw and display_id is True
        self.opened += 1
        self.update(data, raw=True)
        return self

    def update(self, data, raw):
        if not self.keep:
            self.times.clear()
            self.shown.clear()
        self.times.append(self.clock.now)
        self.shown.append(data)
        self.clock.now += self.cost


def make_log(steps):
    entries = [
        {
            "step": step,
            "loss": 0.7 - 0.01 * step,
            "rewards/accuracies": 0.8,
            "rewards/margins": 0.1 * step,
            "rewards/chosen": -0.1 * step,
            "rewards/rejected": -0.2 * step,
        }
        for step in range(1, steps + 1)
    ]
    return [
        line
        for entry in entries
        for line in (
            entry,
            {f"eval_{k}": v for k, v in entry.items() if k != "step"} | {"step": entry["step"]},
        )
    ]


class Watched:
    """A view and the trainer's state that it is told of; `step` lets seconds pass and then takes a step."""

    def __init__(self, stage="dpo", display=None, clock=None, log=None, steps=60):
        self.clock = clock or Clock()
        self.view = LiveView(stage, 4, "cpu", display, self.clock)
        log = make_log(3) if log is None else log
        self.state = SimpleNamespace(global_step=0, max_steps=steps, log_history=log)

    def begin(self, step=0):
        self.state.global_step = step
        self.view.on_train_begin(SimpleNamespace(beta=0.1), self.state, None)
        return self

    def step(self, seconds, count=1):
        self.clock.now += seconds
        self.state.global_step += count
        self.view.on_step_end(None, self.state, None)

    def run(self, seconds_per_step):
        self.begin()
        while self.state.global_step < self.state.max_steps:
            self.step(seconds_per_step)
        self.view.on_train_end(None, self.state, None)
        return self


def test_one_display_is_updated_in_place():
    display = Display()
    watched = Watched(display=display, clock=display.clock, log=[], steps=10).begin()
    for entry in make_log(5):
        watched.state.log_history.append(entry)
        watched.step(5, count=int("loss" in entry))
    watched.view.finish()
    assert display.opened == 1
    assert len(display.shown) == 12 and len({data["text/html"] for data in display.shown}) == 12
    for data in display.shown:
        ElementTree.fromstring(data["text/html"])


def test_two_drawings_are_at_least_two_seconds_apart_and_the_end_is_always_shown():
    display = Display(cost=0.2)
    Watched(display=display, clock=display.clock, steps=200).run(0.5)
    gaps = [later - earlier for earlier, later in zip(display.times, display.times[1:-1], strict=False)]
    assert min(gaps) >= 2 and len(display.times) == pytest.approx(100 / 2, abs=12)
    assert "200 / 200" in display.shown[-1]["text/plain"]


def test_five_thousand_updates_leave_no_memory_behind():
    import psutil

    display = Display(keep=False)
    watched = Watched(display=display, clock=display.clock, steps=10_000).begin()

    def update(count):
        for _ in range(count):
            watched.step(3)
        gc.collect()
        return sys.getallocatedblocks(), psutil.Process().memory_info().rss

    blocks, resident = update(500)
    later_blocks, later_resident = update(5000)
    assert watched.state.global_step == 5500 and "5500" in display.shown[0]["text/plain"]
    assert later_blocks - blocks < 1000 and later_resident - resident < 3_000_000


def test_a_resumed_training_shows_its_curve_at_once():
    display = Display()
    Watched(display=display, clock=display.clock, log=make_log(25), steps=100).begin(25)
    [data] = display.shown
    assert "ステップ 25 / 100" in data["text/plain"] and "損失 0.450" in data["text/plain"]
    assert data["text/html"].count("L") > 25


def test_the_line_of_text_tells_step_speed_time_left_and_losses(monkeypatch):
    monkeypatch.setattr("dpo_helpers.train.live.measure_peak_memory", lambda device: 3_200_000_000)
    display = Display()
    watched = Watched(display=display, clock=display.clock, log=make_log(1), steps=250).begin(50)
    watched.step(60)  # the warm-up of the first step does not count
    watched.step(50, count=25)
    watched.view.on_prediction_step(None, watched.state, None)
    assert watched.view.describe() == (
        "DPO：ステップ 76 / 250　0.50 ステップ/秒（2.00 ペア/秒）　残り約 5 分 48 秒　メモリ（最大）3.2 GB　"
        "損失 0.690　評価用の損失 0.690　評価中"
    )


def test_without_a_display_lines_of_text_come_at_most_every_ten_seconds(capsys):
    watched = Watched("sft", log=[]).begin()
    assert watched.view.display is None
    for step in range(1, 61):
        if step % 5 == 0:
            watched.state.log_history.append({"step": step, "loss": 2.0})
        watched.step(1)
    watched.view.finish()
    lines = capsys.readouterr().out.splitlines()
    steps = [int(line.split("ステップ ")[1].split(" ")[0]) for line in lines]
    assert steps == [0, 10, 20, 30, 40, 50, 60, 60]
    assert all(line.startswith("教師あり学習：") for line in lines)
    assert "終わりました（1 分 0 秒）" in lines[-1]


def test_a_drawing_that_fails_is_told_once_and_text_takes_over(capsys):
    class Broken(Display):
        def update(self, data, raw):
            raise ValueError("想定外")

    Watched(display=Broken()).run(1.0)
    lines = capsys.readouterr().out.splitlines()
    warned = [("ValueError: 想定外" in line, "学習は続けます" in line) for line in lines]
    assert warned == [(True, True)] + [(False, False)] * (len(lines) - 1)
    assert len(lines) > 1 and "60 / 60" in lines[-1]


def test_where_the_text_fails_too_the_view_ends_in_silence(capsys, monkeypatch):
    monkeypatch.setattr(LiveView, "describe", lambda self: 1 / 0)
    Watched(display=Display()).run(1.0)
    [line] = capsys.readouterr().out.splitlines()
    assert "ZeroDivisionError" in line


def test_a_training_that_is_cut_short_says_so_and_a_second_end_does_nothing():
    display = Display()
    watched = Watched(display=display, clock=display.clock, log=[])
    watched.view.finish()  # it never began
    watched.begin()
    watched.step(0, count=5)
    watched.view.finish()
    watched.view.finish()
    watched.step(9)
    assert len(display.shown) == 2 and "途中で止まりました" in display.shown[-1]["text/plain"]


def dots(html, color):
    """The points of each curve of a colour: (x, y), y downwards."""
    paths = [
        path
        for path in ElementTree.fromstring(html).iter("path")
        if path.get("stroke") == color and path.get("stroke-linecap")
    ]
    return [
        [tuple(map(float, point.split())) for point in path.get("d").replace("h0", "").split("M")[1:]]
        for path in paths
    ]


def test_a_higher_value_stands_higher_and_a_later_step_to_the_right():
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 1.5}]
    [[first, second, third]] = dots(draw_html("", "sft", log, 3, 4), "#000000")
    assert first[0] < second[0] < third[0] and first[1] < third[1] < second[1]


def test_nan_is_a_gap_and_a_long_log_is_thinned_out():
    log = [
        {"step": step, "loss": math.nan if step == 2 else math.inf if step == 3 else 1.0}
        for step in range(1, 6)
    ]
    html = draw_html("", "sft", log, 5, 5)
    assert "nan" not in html and "inf" not in html
    assert [len(points) for points in dots(html, "#000000")] == [3]
    log = [{"step": step, "loss": 1.0} for step in range(1, 5001)]
    [points] = dots(draw_html("", "sft", log, 5000, 5000), "#000000")
    assert 250 <= len(points) <= 300 and points[-1][0] == 364.0  # the newest stands at the right edge


def test_ticks_are_round_numbers():
    assert find_ticks(0, 200, smallest=1) == ["0", "50", "100", "150", "200"]
    assert find_ticks(0, 1, smallest=1) == ["0", "1"]
    assert find_ticks(0.18, 0.72) == ["0.2", "0.4", "0.6"]
    assert find_ticks(-25.3, 1.1) == ["-20", "-10", "0"]


def make_trainer(tiny_models, rows, start_run):
    config = make_config(tiny_models, sft_epochs=0, logging_steps=1, checkpoint_steps=4)
    trainer = build(start_run(config, rows[:32], rows[32:40]))
    trainer.args.save_strategy = "no"
    return trainer


@pytest.mark.versions
def test_a_real_training_is_shown_to_its_end_and_a_later_evaluation_is_not(
    tiny_models, rows, start_run, capsys
):
    trainer, display = make_trainer(tiny_models, rows, start_run), Display()
    trainer.add_callback(LiveView("dpo", 4, "cpu", display))
    trainer.train()
    shown = len(display.shown)
    trainer.evaluate()
    assert len(display.shown) == shown >= 2
    assert "ステップ 0 / 8" in display.shown[0]["text/plain"]
    assert (
        "ステップ 8 / 8" in display.shown[-1]["text/plain"]
        and "評価用の損失" in display.shown[-1]["text/plain"]
    )
    assert len(dots(display.shown[-1]["text/html"], "#009E73")[0]) == 3  # held-out loss at 0, 4 and 8
    assert "{" not in capsys.readouterr().out  # the trainer's own lines are gone


@pytest.mark.versions
def test_a_real_training_goes_on_to_the_same_weights_where_the_view_is_broken(
    tiny_models, rows, start_run, capsys, tmp_path
):
    class Broken(Display):
        def __call__(self, data, raw, display_id):
            raise OSError("切断")

    losses = []
    for display in (Display(), Broken()):
        trainer = make_trainer(tiny_models, rows, start_run)
        trainer.add_callback(LiveView("dpo", 4, "cpu", display))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1] and len(losses[0]) == 8
    assert capsys.readouterr().out.count("⚠️") == 1
