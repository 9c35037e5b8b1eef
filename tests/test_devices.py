"""Device selection and setup, free memory, and warnings about slow types."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cogvideo import devices
from cogvideo.devices import CUDNN_ATTENTION, cgroup_memory, free_memory, slowness, usable

CPU = torch.device("cpu")
CUDA = torch.device("cuda:0")


@pytest.fixture(autouse=True)
def choices() -> Iterator[None]:
    """Restore PyTorch's own choice of kernels before and after each test."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a machine with one GPU, as far as `usable` can see."""
    monkeypatch.setattr(torch, "ones", lambda *shape, device: SimpleNamespace(device=CUDA, item=lambda: 1.0))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("value", "enabled"), [(None, False), ("0", False), ("1", True)])
def test_cudnn_attention_is_off_on_cuda(monkeypatch: pytest.MonkeyPatch, value: str | None, enabled: bool) -> None:
    """Guards against wrong gradients with masks on Hopper, unless the environment enables cuDNN."""
    monkeypatch.delenv(CUDNN_ATTENTION, raising=False)
    if value is not None:
        monkeypatch.setenv(CUDNN_ATTENTION, value)
    assert usable("cuda") == CUDA
    assert torch.backends.cuda.cudnn_sdp_enabled() is enabled


def test_a_cpu_leaves_the_choice_of_kernels_alone() -> None:
    """Prevents a CPU run from changing kernel settings for other code in the process."""
    assert usable("cpu").type == "cpu"
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize(("device", "message"), [("cuad", "cannot use the device 'cuad'"), ("cpu:1", "no device")])
def test_devices_that_are_not_there(device: str, message: str) -> None:
    """Guards against a PyTorch traceback, and against ignoring the number in `cpu:1`."""
    with pytest.raises(ValueError, match=message):
        usable(device)


def test_emulated_types_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the warning that half precision, often chosen for speed, takes seventy times as long on many laptops."""
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
    """Write the files of a control group with a memory limit."""
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
    """Guards against jobs that are killed when a container or batch system allows less memory than the machine has."""
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
    monkeypatch.setattr(devices, "cgroup_memory", lambda: [12345])
    assert free_memory(CPU) == 12345
    monkeypatch.setattr(devices, "cgroup_memory", lambda: [2**62])
    assert 0 < free_memory(CPU) < 2**62
