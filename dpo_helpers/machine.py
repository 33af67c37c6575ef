"""Says what this machine is (Colab or not, GPU, memory) and which precision it should train in; it changes
nothing.
"""

import gc
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass

from dpo_helpers.config import RunConfig
from dpo_helpers.errors import UserError

# Tokens of one forward pass of the fast trainer. On a CPU, longer ones lose more in attention, which visits
# the
# masked pairs beside its own too, than they win in the layers; on a GPU, short ones leave it waiting for
# kernels.
PACK_TOKENS = {"cpu": 512, "cuda": 4096}


@dataclass(frozen=True)
class Machine:
    """What the run needs to know of the hardware. Memory in bytes; capability as CUDA's (major, minor),
    else None.
    """

    device: str  # "cuda" or "cpu"
    name: str
    capability: tuple[int, int] | None
    device_memory: int | None
    main_memory: int
    in_colab: bool

    @property
    def precision(self) -> str:
        return choose_precision(self.device, self.capability)


def in_colab() -> bool:
    """True in a Colab kernel, which has google.colab imported before the first cell runs."""
    return "google.colab" in sys.modules


def choose_precision(device: str, capability: tuple[int, int] | None) -> str:
    """Return "bf16", "fp16" or "fp32" (float32 weights in every case; the first two by autocast).

    By compute capability: torch.cuda.is_bf16_supported() also says True where bf16 is only emulated (a T4).
    Below 7.0 there are no tensor cores, so fp16 would cost range and win nothing.
    """
    if device != "cuda" or capability < (7, 0):
        return "fp32"
    return "bf16" if capability >= (8, 0) else "fp16"


def choose_micro_batch(config: RunConfig, device: str) -> int:
    """Return how many pairs to compute at once: as asked for, or what fills a pack where the fast trainer
    runs.

    It divides the effective batch, which stays as it is; so do the losses.
    """
    if not config.trains_fast:
        return config.per_device_train_batch_size
    effective = config.effective_batch_size
    limit = max(config.per_device_train_batch_size, PACK_TOKENS[device] // (2 * config.max_length))
    return max(size for size in range(1, effective + 1) if effective % size == 0 and size <= limit)


def find_machine(device: str = "auto") -> Machine:
    """Look at the hardware; `device` is "auto", "cuda" or "cpu". Raises UserError if the one asked for is
    absent.
    """
    import psutil
    import torch  # here, so that importing this module works in a kernel whose torch is broken

    if device not in ("auto", "cuda", "cpu"):
        raise UserError(f"デバイス {device!r} は使えません。auto, cuda, cpu のどれかを選んでください。")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "GPU（cuda）が見つかりません。Colab では「ランタイム → ランタイムのタイプを変更」"
            "で T4 GPU を選ぶか、"
            "device を auto にしてください。"
        )
    chosen = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    memory = psutil.virtual_memory().total
    if chosen != "cuda":
        return Machine(
            chosen, f"{chosen}（{torch.get_num_threads()} スレッド）", None, None, memory, in_colab()
        )
    if (
        count := torch.cuda.device_count()
    ) > 1 and "LOCAL_RANK" not in os.environ:  # the Trainer would multiply the batch by them
        raise UserError(
            f"GPU が {count} 枚あります。1 枚だけ使うには環境変数 CUDA_VISIBLE_DEVICES=0 "
            "を付けて Python（カーネル）を起動し直してください。"
            f"全部使うには accelerate launch --multi_gpu --num_processes {count} -m "
            "dpo_helpers train … で学習してください。"
        )
    gpu = torch.cuda.get_device_properties(0)
    return Machine("cuda", gpu.name, (gpu.major, gpu.minor), gpu.total_memory, memory, in_colab())


def describe_machine(machine: Machine) -> str:
    """Tell a beginner in Japanese what the run will use, and why."""
    reasons = {
        "bf16": "Compute Capability 8.0 以上の GPU なので bf16 の自動混合精度を使います。",
        "fp16": "Compute Capability 7.x の GPU（T4、V100 など）なので fp16 の自動混合精度を使います。"
        "重みは float32 のままです。",
        "fp32": "GPU がないので float32 で計算します。",
    }
    reason = reasons[machine.precision]
    if machine.device == "cuda" and machine.precision == "fp32":
        reason = "Compute Capability 7.0 未満の GPU には fp16 の専用回路がないため、float32 で計算します。"
    lines = [f"実行環境：{'Google Colab' if machine.in_colab else 'Colab 以外'}", f"デバイス：{machine.name}"]
    if machine.capability:
        lines.append(f"Compute Capability：{machine.capability[0]}.{machine.capability[1]}")
        lines.append(f"GPU メモリ：{machine.device_memory / 1e9:.1f} GB")
    lines += [f"メインメモリ：{machine.main_memory / 1e9:.1f} GB", f"精度：{machine.precision}（{reason}）"]
    if machine.in_colab and machine.device != "cuda":
        lines.append(
            "⚠️ GPU がありません。「ランタイム → ランタイムのタイプを変更」で T4 GPU "
            "を選ぶと、ずっと速くなります。"
        )
    return "\n".join(lines)


def measure_peak_memory(device: str) -> int:
    """Return the largest memory use so far in bytes: the GPU's where there is one, else this process's
    own.
    """
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts kilobytes


def clear_memory() -> str:
    """Free what Python and the GPU cache no longer need, and say how much GPU memory is in use."""
    import torch

    gc.collect()
    if not torch.cuda.is_available():
        return "不要なオブジェクトを解放しました（GPU はありません）。"
    torch.cuda.empty_cache()
    return f"GPU のキャッシュを解放しました。使用中：{torch.cuda.memory_allocated() / 1e9:.2f} GB"


def halve_on_out_of_memory(attempt, batch_size: int, what: str):
    """Return attempt(batch_size), tried again with half the batch each time memory runs out, and say so."""
    import torch

    while True:
        try:
            return attempt(batch_size)
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise UserError(
                    f"{what}のメモリが足りません。「ランタイム → ランタイムを再起動」で、"
                    "使っていないモデルを消してから実行してください。"
                ) from None
        batch_size //= 2
        print(f"メモリが足りないので、{what}で一度に計算する数を {batch_size} に減らして続けます。")
        clear_memory()


def format_seconds(seconds: float) -> str:
    """Return a duration in Japanese, as exact as a reader needs it."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} 時間 {minutes % 60} 分"
    return f"{minutes} 分 {rest} 秒" if minutes else f"{rest} 秒"


class Stopwatch:
    """Adds up the wall-clock seconds of each named phase; a phase that runs again starts over, not on top.

    `carried` are the seconds of each phase that an interrupted process spent before: they count on top.
    """

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.carried: dict[str, float] = {}
        self._started: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str):
        self._started[phase] = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.so_far(phase)

    def so_far(self, phase: str) -> float:
        """Return the seconds of a phase that is running."""
        return round(self.carried.get(phase, 0.0) + time.perf_counter() - self._started[phase], 3)
