"""What is said of the machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cogvideo import machine
from cogvideo.machine import cgroup_memory, free_memory, slowness

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


def limited(folder: Path, version: int, limit: str, usage: int, inactive: int = 0) -> None:
    """A control group with a limit."""
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon {usage - inactive}\n{names[2]} {inactive}\n")


@pytest.mark.parametrize("version", [1, 2])
def test_memory_of_a_container_is_what_its_group_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    """Guards against jobs that are killed where a container or a batch system allows less than the machine has."""
    root, groups = tmp_path / "cgroup", tmp_path / "groups"
    groups.write_text({1: "9:name=systemd:/\n4:memory:/batch/job\n0::/\n", 2: "0::/batch/job\n"}[version])
    assert cgroup_memory(root, groups) == []
    assert cgroup_memory(root, tmp_path / "none") == []
    top = root / "memory" if version == 1 else root
    limited(top / "batch", version, str(8 << 30), 7 << 30, 2 << 30)
    limited(top / "batch/job", version, "max" if version == 2 else str(2**63 - 4096), 1 << 30)
    assert min(cgroup_memory(root, groups)) == 3 << 30
    limited(top / "batch/job", version, str(2 << 30), 3 << 30)
    assert min(cgroup_memory(root, groups)) == 0
    monkeypatch.setattr(machine, "cgroup_memory", lambda: [12345])
    assert free_memory(CPU) == 12345
    monkeypatch.setattr(machine, "cgroup_memory", lambda: [2**62])
    assert 0 < free_memory(CPU) < 2**62
