import time

import pytest

from dpo_helpers.errors import UserError
from dpo_helpers.machine import (
    Machine,
    Stopwatch,
    choose_precision,
    describe_machine,
    find_machine,
    format_seconds,
    halve_on_out_of_memory,
    measure_peak_memory,
)


@pytest.mark.parametrize(
    ("device", "capability", "expected"),
    [
        ("cuda", (9, 0), "bf16"),  # H100
        ("cuda", (8, 0), "bf16"),  # A100
        ("cuda", (7, 5), "fp16"),  # T4
        ("cuda", (7, 0), "fp16"),  # V100
        ("cuda", (6, 1), "fp32"),  # P40
        ("cpu", None, "fp32"),
    ],
)
def test_precision_goes_by_compute_capability(device, capability, expected):
    assert choose_precision(device, capability) == expected


def test_a_gpu_asked_for_and_absent_says_how_to_get_one():
    with pytest.raises(UserError, match="ランタイムのタイプを変更"):
        find_machine("cuda")


def test_an_unknown_device_lists_the_known_ones():
    with pytest.raises(UserError, match="auto, cuda, cpu"):
        find_machine("mps")


def test_several_gpus_in_one_process_are_refused_because_they_would_multiply_the_batch(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"(?s)GPU が 2 枚.*CUDA_VISIBLE_DEVICES=0.*--num_processes 2"):
        find_machine()


def test_this_machine_is_described():
    text = describe_machine(find_machine("cpu"))
    assert "Colab 以外" in text and "fp32" in text and "GPU がない" in text


def test_colab_without_a_gpu_is_told_to_change_the_runtime():
    assert "⚠️ GPU がありません" in describe_machine(
        Machine("cpu", "cpu", None, None, 13 * 10**9, in_colab=True)
    )


def test_an_old_gpu_is_told_why_it_computes_in_float32():
    text = describe_machine(Machine("cuda", "Tesla P40", (6, 1), 24 * 10**9, 13 * 10**9, in_colab=False))
    assert "fp32" in text and "7.0 未満" in text


def test_a_phase_run_twice_counts_once():
    clock = Stopwatch()
    for seconds in (0.2, 0.01):
        with clock("data"):
            time.sleep(seconds)
    assert 0.01 <= clock.seconds["data"] < 0.2


def test_a_duration_is_as_exact_as_a_reader_needs_it():
    assert [format_seconds(seconds) for seconds in (0.4, 59.6, 3600)] == ["0 秒", "1 分 0 秒", "1 時間 0 分"]


def test_peak_memory_is_in_bytes():
    assert 20e6 < measure_peak_memory("cpu") < 24e9


def test_memory_that_runs_out_halves_the_batch_until_one_is_too_much(capsys):
    import torch

    tried = []

    def attempt(size):
        tried.append(size)
        if size > fits:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return f"done with {size}"

    fits = 2
    assert halve_on_out_of_memory(attempt, 9, "評価") == "done with 2" and tried == [9, 4, 2]
    assert "評価で一度に計算する数を 2 に減らして続けます" in capsys.readouterr().out
    fits = 0
    with pytest.raises(UserError, match=r"評価のメモリが足りません.*ランタイムを再起動"):
        halve_on_out_of_memory(attempt, 2, "評価")
