"""The view of a training that runs: one display, a budget of time, and a training that nothing of it can
stop.
"""

import gc
import math
import sys
from xml.etree import ElementTree

import pytest

from dpo_helpers.config import RunConfig
from dpo_helpers.train.live_display import LiveDisplay, format_seconds
from dpo_helpers.train.live_svg import draw_html, find_ticks
from dpo_helpers.train.trainers import build_dpo_trainer


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


def train(shown, clock, steps, seconds_per_step, log=None):
    log = make_log(3) if log is None else log
    shown.begin(0, steps, log)
    for step in range(1, steps + 1):
        clock.now += seconds_per_step
        shown.update(step, log)
    shown.finish()


def test_one_display_is_updated_in_place():
    clock = Clock()
    display = Display(clock)
    shown = LiveDisplay("dpo", 4, "cpu", display, clock)
    log = []
    shown.begin(0, 10, log, beta=0.1)
    for entry in make_log(5):
        log.append(entry)
        clock.now += 5
        shown.update(entry["step"], log)
    shown.finish()
    assert display.opened == 1
    assert len(display.shown) == 12 and len({data["text/html"] for data in display.shown}) == 12
    for data in display.shown:
        ElementTree.fromstring(data["text/html"])


@pytest.mark.parametrize("cost", [0.002, 0.05, 0.2, 0.4, 0.7])
@pytest.mark.parametrize("seconds", [1, 12, 100, 299, 301, 900, 7200])
def test_drawing_stays_within_its_budget(cost, seconds):
    clock = Clock()
    display = Display(clock, cost)
    train(LiveDisplay("dpo", 4, "cpu", display, clock), clock, seconds * 2, 0.5)
    took, spent = clock.now - 1000.0, cost * len(display.times)
    assert spent <= (1.5 if took < 300 else 0.02 * took)
    assert all(
        later - earlier >= 2 for earlier, later in zip(display.times, display.times[1:-1], strict=False)
    )
    assert (
        f"{seconds * 2} / {seconds * 2}" in display.shown[-1]["text/plain"]
    )  # the end is shown, whatever was spent


def test_a_cheap_drawing_comes_every_two_seconds():
    clock = Clock()
    display = Display(clock, 0.002)
    train(LiveDisplay("dpo", 4, "cpu", display, clock), clock, 200, 0.5)
    assert len(display.times) == pytest.approx(100 / 2, abs=12)


def test_five_thousand_updates_leave_no_memory_behind():
    import psutil

    clock = Clock()
    display = Display(clock, keep=False)
    shown = LiveDisplay("dpo", 4, "cpu", display, clock)
    log = make_log(3)
    shown.begin(0, 10_000, log)

    def update(count):
        for _ in range(count):
            clock.now += 3
            shown.update(shown.step + 1, log)
        gc.collect()
        return sys.getallocatedblocks(), psutil.Process().memory_info().rss

    blocks, resident = update(500)
    later_blocks, later_resident = update(5000)
    assert shown.step == 5500 and "5500" in display.shown[0]["text/plain"]
    assert later_blocks - blocks < 1000 and later_resident - resident < 3_000_000


def test_a_resumed_training_shows_its_curve_at_once():
    clock = Clock()
    display = Display(clock)
    LiveDisplay("dpo", 4, "cpu", display, clock).begin(25, 100, make_log(25))
    [data] = display.shown
    assert "ステップ 25 / 100" in data["text/plain"] and "損失 0.450" in data["text/plain"]
    assert data["text/html"].count("L") > 25


def test_the_line_of_text_tells_step_speed_time_left_and_losses(monkeypatch):
    monkeypatch.setattr("dpo_helpers.train.live_display.measure_peak_memory", lambda device: 3_200_000_000)
    clock = Clock()
    shown = LiveDisplay("dpo", 4, "cpu", Display(clock), clock)
    shown.begin(50, 250, make_log(1))
    clock.now += 60  # the warm-up of the first step does not count
    shown.update(51, make_log(1))
    clock.now += 50
    shown.update(76, make_log(1), "評価中")
    assert shown.describe() == (
        "DPO：ステップ 76 / 250　0.50 ステップ/秒（2.00 組/秒）　残り約 5 分 48 秒　メモリー（最大）3.2 GB　"
        "損失 0.690　評価用の損失 0.690　評価中"
    )
    assert [format_seconds(seconds) for seconds in (0.4, 59.6, 3600)] == ["0 秒", "1 分 0 秒", "1 時間 0 分"]


def test_without_a_display_lines_of_text_come_at_most_every_ten_seconds(capsys):
    clock = Clock()
    shown = LiveDisplay("sft", 4, "cpu", clock=clock)
    assert shown.display is None
    log = []
    shown.begin(0, 60, log)
    for step in range(1, 61):
        clock.now += 1
        log += [{"step": step, "loss": 2.0}] if step % 5 == 0 else []
        shown.update(step, log)
    shown.finish()
    lines = capsys.readouterr().out.splitlines()
    steps = [int(line.split("ステップ ")[1].split(" ")[0]) for line in lines]
    assert steps == [0, 10, 20, 30, 40, 50, 60, 60]
    assert (
        all(line.startswith("教師あり学習：") for line in lines) and "終わりました（1 分 0 秒）" in lines[-1]
    )


def test_a_drawing_that_fails_is_told_once_and_text_takes_over(capsys):
    clock = Clock()

    class Broken(Display):
        def update(self, data, raw):
            raise ValueError("想定外")

    shown = LiveDisplay("dpo", 4, "cpu", Broken(clock), clock)
    train(shown, clock, 60, 1.0)
    lines = capsys.readouterr().out.splitlines()
    assert [("ValueError: 想定外" in line, "学習は続けます" in line) for line in lines] == [(True, True)] + [
        (False, False)
    ] * (len(lines) - 1)
    assert "test_live.py の" in lines[0] and "60 / 60" in lines[-1]


def test_where_the_text_fails_too_the_view_ends_in_silence(capsys, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(LiveDisplay, "describe", lambda self: 1 / 0)
    train(LiveDisplay("dpo", 4, "cpu", Display(clock), clock), clock, 60, 1.0)
    [line] = capsys.readouterr().out.splitlines()
    assert "ZeroDivisionError" in line


def test_a_training_that_is_cut_short_says_so_and_a_second_end_does_nothing():
    clock = Clock()
    display = Display(clock)
    shown = LiveDisplay("dpo", 4, "cpu", display, clock)
    shown.finish()  # it never began
    shown.begin(0, 60, [])
    shown.update(5, [])
    shown.finish()
    shown.finish()
    shown.update(6, [])
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
    config = RunConfig(
        model_name=str(tiny_models["gpt2"]),
        learning_rate=1e-3,
        lora_rank=4,
        lora_scale=4.0,
        sft_epochs=0,
        logging_steps=1,
        checkpoint_steps=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
    )
    trainer = build_dpo_trainer(*start_run(config, rows[:32], rows[32:40]))
    trainer.args.save_strategy = "no"
    return trainer


def add_view(trainer, stage, display, **options):
    from dpo_helpers.train.live_view import LiveView

    trainer.add_callback(LiveView(stage, 4, "cpu", display, **options))


@pytest.mark.versions
def test_a_real_training_is_shown_to_its_end_and_a_later_evaluation_is_not(
    tiny_models, rows, start_run, capsys
):
    trainer, display = make_trainer(tiny_models, rows, start_run), Display()
    add_view(trainer, "dpo", display)
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
        add_view(trainer, "dpo", display)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1] and len(losses[0]) == 8
    assert capsys.readouterr().out.count("⚠️") == 1
