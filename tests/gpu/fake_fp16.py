"""The mixed precision of a T4 on the CPU: fp16 autocast and a real GradScaler, through accelerate's own code.

It shows what is scaled, skipped, saved and restored; it says nothing of kernels, speed or memory.
"""

import torch
from accelerate import Accelerator

from dpo_helpers import machine


class FakeFp16:
    """Makes this machine train in a precision: choose("fp16") as a T4, choose("fp32") as the CPU it is."""

    def __init__(self, monkeypatch, init_scale: float = 65536.0):
        self.monkeypatch, self.init_scale = monkeypatch, init_scale
        prepare = Accelerator.__init__

        def prepare_with_scaler(accelerator, *arguments, **options):
            prepare(accelerator, *arguments, **options)
            if accelerator.state.mixed_precision == "fp16":  # which accelerate grants to GPUs alone
                accelerator.native_amp = True
                accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=self.init_scale)

        monkeypatch.setattr(Accelerator, "__init__", prepare_with_scaler)

    def choose(self, precision: str) -> None:
        self.monkeypatch.setattr(machine, "choose_precision", lambda device, capability: precision)
