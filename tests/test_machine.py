"""What is said of the machine."""

from __future__ import annotations

import pytest
import torch

from cogvideo.machine import slowness

CPU = torch.device("cpu")


def test_emulated_types_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision takes seventy times as long on many laptops: whoever asks for it to be faster must hear of it."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    for dtype in (torch.bfloat16, torch.float16):
        told = slowness(dtype, CPU)
        assert told is not None
        assert told.startswith(f"{dtype}".removeprefix("torch.") + " is emulated on this processor")
        assert slowness(dtype, torch.device("cuda")) is None
    assert slowness(torch.float32, CPU) is None
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert slowness(torch.bfloat16, CPU) is None
