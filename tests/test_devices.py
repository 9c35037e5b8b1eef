"""Which device is taken, and how it is set up."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from cogvideo.devices import CUDNN_ATTENTION, usable

CUDA = torch.device("cuda:0")


@pytest.fixture(autouse=True)
def choices() -> Iterator[None]:
    """PyTorch's own choice of kernels, before and after."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with one GPU, as far as `usable` can see."""
    monkeypatch.setattr(torch, "ones", lambda *shape, device: SimpleNamespace(device=CUDA, item=lambda: 1.0))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("value", "enabled"), [(None, False), ("0", False), ("1", True)])
def test_cudnn_attention_is_off_on_cuda(monkeypatch: pytest.MonkeyPatch, value: str | None, enabled: bool) -> None:
    """Guards against wrong gradients with masks on Hopper, unless the environment asks for cuDNN."""
    monkeypatch.delenv(CUDNN_ATTENTION, raising=False)
    if value is not None:
        monkeypatch.setenv(CUDNN_ATTENTION, value)
    assert usable("cuda") == CUDA
    assert torch.backends.cuda.cudnn_sdp_enabled() is enabled


def test_a_cpu_leaves_the_choice_of_kernels_alone() -> None:
    """Guards against a setting that reaches what another program does in the same process."""
    assert usable("cpu").type == "cpu"
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize(("device", "message"), [("cuad", "cannot use the device 'cuad'"), ("cpu:1", "no device")])
def test_devices_that_are_not_there(device: str, message: str) -> None:
    """Guards against a traceback of PyTorch, and against a GPU's number that is taken for a CPU's."""
    with pytest.raises(ValueError, match=message):
        usable(device)
