"""The recorder: metrics reach every requested output, only from the first rank, and utilization is accurate."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from cogvideo.config import CogVideoConfig
from cogvideo.devices import matrix_rate
from cogvideo.models.transformer import Base, TemporalChannel, Transformer
from cogvideo.models.upscaler import UpscaleChannel, Upscaler
from cogvideo.planning.training import flops_per_position
from cogvideo.runs import RunFolder
from cogvideo.training import recorder as module
from cogvideo.training.loop import interrupts
from cogvideo.training.recorder import ProgressLine, Recorder

ROW = {
    "step": 10,
    "loss": 4.5,
    "frame_1": 4.0,
    "frame_2": 5.0,
    "learning_rate": 2e-4,
    "gradient_norm": 0.7,
    "tokens_per_second": 12_345.6,
    "utilization": 0.412,
    "seconds": 3.0,
}
HELD_OUT = {"step": 10, "held_out": {"1 fps": {"loss": 4.6, "frame_1": 4.1}, "2 fps": {"loss": 4.8}}}
CONFIG = CogVideoConfig()


def console(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=160, soft_wrap=True, highlight=False)


def written(to: Console) -> str:
    assert isinstance(to.file, io.StringIO)
    return to.file.getvalue()


def rows_of(folder: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]


def test_rows_are_kept_as_they_are(tmp_path: Path) -> None:
    """Reports and other readers must get exactly what the loop measured, not values rounded for display."""
    folder = RunFolder(tmp_path)
    with Recorder(folder, done=0, steps=20, console=console()) as recorder:
        recorder.record(ROW)
        recorder.record(HELD_OUT)
    assert rows_of(folder) == [ROW, HELD_OUT]


def test_other_ranks_are_silent(tmp_path: Path) -> None:
    """Prevents other ranks from corrupting lines of a shared file and printing everything twice."""
    out = console()
    with Recorder(RunFolder(tmp_path), done=0, steps=20, tensorboard=True, console=out, is_first=False) as recorder:
        recorder.record(ROW)
        recorder.say("twice")
        recorder.picture(10, tmp_path / "none.png")
    assert list(tmp_path.iterdir()) == []
    assert written(out) == ""


def test_without_a_terminal_there_are_plain_lines_every_so_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log file must show that a run is alive, without a line for every step and without escape sequences."""
    now, out = [100.0], console()
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with Recorder(RunFolder(tmp_path), done=5, steps=105, console=out) as recorder:
        for step in range(15, 106, 10):
            now[0] += 20
            recorder.record(ROW | {"step": step})
    lines = written(out).splitlines()
    assert lines[0] == (
        "step 15 of 105: loss 4.5000  12,346 tokens/s  utilization 41.2%  3 min left"  # 20 s per 10 steps, 90 left
    )
    assert [line.split(" of")[0] for line in lines] == [
        "step 15",
        "step 35",
        "step 55",
        "step 75",
        "step 95",
        "step 105",
    ]
    assert lines[-1].endswith("utilization 41.2%")
    assert "\x1b" not in written(out)


def test_a_terminal_has_a_moving_line(tmp_path: Path) -> None:
    """A live progress line must show the step, the metrics, and the time left."""
    out = console(terminal=True)
    with Recorder(RunFolder(tmp_path), done=0, steps=20, console=out) as recorder:
        recorder.record(ROW)
    last = written(out).splitlines()[-2]
    for part in ("10/20", "loss 4.5000", "12,346 tokens/s", "utilization 41.2%", "left"):
        assert part in last


def test_held_out_losses_are_told(tmp_path: Path) -> None:
    """Held-out losses are rare and need a permanent line; a run that holds nothing out prints no empty line."""
    out = console()
    with Recorder(RunFolder(tmp_path), done=0, steps=20, console=out) as recorder:
        recorder.record(HELD_OUT, "held out 1 fps 4.6000")
        recorder.record({"step": 20, "held_out": {}})
        recorder.say("Samples [of 4] clips.")
    assert written(out).splitlines() == [
        "step 10: held out 1 fps 4.6000",
        "Samples [of 4] clips.",
    ]


def test_tensorboard_has_every_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every metric must be in TensorBoard under its standard name, or runs cannot be compared; rows that a killed run
    wrote after its last checkpoint must be hidden when it resumes."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder, sheet = RunFolder(tmp_path), tmp_path / "sheet.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(sheet)
    with Recorder(folder, done=0, steps=20, tensorboard=True, console=console()) as recorder:
        recorder.record(ROW | {"step": 12, "loss": 9.0})
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 2)  # event files are ordered by the seconds in their names
    with Recorder(folder, done=5, steps=20, tensorboard=True, console=console()) as recorder:
        recorder.record(ROW)
        recorder.record(HELD_OUT)
        recorder.picture(10, sheet)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    training = {f"train/{name}": value for name, value in ROW.items() if name != "step"}
    held_out = {"held_out/1_fps/loss": 4.6, "held_out/1_fps/frame_1": 4.1, "held_out/2_fps/loss": 4.8}
    assert scalars == {tag: [(10, pytest.approx(value))] for tag, value in (training | held_out).items()}
    assert [event.step for event in events.Images("samples")] == [10]


class Wandb(types.ModuleType):
    """A stand-in for the wandb client, which needs an account."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[tuple[str, Any]] = []

    def init(self, **settings: Any) -> Wandb:
        self.calls.append(("init", settings))
        return self

    def define_metric(self, *names: str, **settings: Any) -> None:
        self.calls.append(("define_metric", names))

    def log(self, figures: dict[str, Any]) -> None:
        self.calls.append(("log", figures))

    def finish(self, exit_code: int) -> None:
        self.calls.append(("finish", exit_code))

    def Image(self, path: str) -> str:
        return f"picture {path}"

    def of(self, name: str) -> list[Any]:
        return [value for each, value in self.calls if each == name]


def test_wandb_continues_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run must remain one run in W&B, even if it goes back to an earlier step; a failure must be visible."""
    client, folder = Wandb(), RunFolder(tmp_path / "out" / ".image-run")
    folder.claim({})
    monkeypatch.setitem(sys.modules, "wandb", client)
    with Recorder(folder, done=0, steps=20, settings={"seed": 1}, wandb=True, console=console()) as recorder:
        recorder.record(ROW)
        recorder.picture(10, tmp_path / "sheet.png")
    recorder = Recorder(folder, done=5, steps=20, wandb=True, console=console())
    recorder.__enter__().record(ROW | {"step": 6})
    recorder.__exit__(ValueError, ValueError("diverged"), None)
    first, second = client.of("init")
    assert first["config"] == {"seed": 1}
    assert first["name"] == "out/.image-run"
    assert first["id"] == second["id"] != ""
    assert [each["step"] for each in client.of("log")] == [10, 10, 6]
    assert client.of("log")[0]["train/frame_2"] == 5.0
    assert client.of("log")[1]["samples"] == f"picture {tmp_path / 'sheet.png'}"
    assert client.of("finish") == [0, 1]


@pytest.mark.parametrize(("package", "extra"), [("tensorboard", "train"), ("wandb", "wandb")])
def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, extra: str) -> None:
    """A missing package must be reported at once, not at the first row, along with the extra that installs it."""
    for name in [each for each in sys.modules if each.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    settings: dict[str, Any] = {package: True}
    with pytest.raises(ValueError, match=rf"{package} is missing: pip install 'cogvideo\[{extra}\]'"):
        Recorder(RunFolder(tmp_path), done=0, steps=20, console=console(), **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrix_rate_is_that_of_a_large_product(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a reference rate from matrices that are too small or not warmed up, which would inflate utilization.
    Measuring it must not change the global random state, and with it the run."""
    for clock in ("perf_counter", "monotonic"):  # other programs may use the CPU meanwhile
        monkeypatch.setattr(time, clock, time.process_time)
    state, device = torch.get_rng_state(), torch.device("cpu")
    rate = matrix_rate(device, dtype)
    assert torch.equal(torch.get_rng_state(), state)
    assert rate is matrix_rate(device, dtype), "measured once"
    side = 512
    left, right = torch.randn(2, side, side).to(dtype)
    times = []
    for _ in range(30):
        begin = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - begin)
    assert 0.3 < rate / (2 * side**3 / min(times)) < 3


def parts() -> tuple[Base, TemporalChannel, UpscaleChannel]:
    with torch.device("meta"):
        transformer, layout = CONFIG.transformer, CONFIG.layout
        return (
            Base(transformer),
            TemporalChannel(transformer, layout, CONFIG.sequential),
            UpscaleChannel(transformer, layout, CONFIG.upscaler),
        )


def test_work_of_a_position_by_hand() -> None:
    """Utilization must not count lookups as matrix products, or gradients that frozen weights do not have."""
    base, channel, upscale = parts()
    hidden, layers = CONFIG.transformer.hidden, CONFIG.transformer.num_layers
    block, attention, head = 12 * hidden**2, 4 * hidden**2, CONFIG.transformer.num_codes * hidden
    assert flops_per_position(Transformer(base)) == 6 * (layers * block + head)
    frozen = base.requires_grad_(False)
    assert flops_per_position(Transformer(frozen, channel)) == 4 * (layers * block + head) + 6 * layers * attention
    low = CONFIG.upscaler.text_slots + CONFIG.layout.grid**2
    high = (CONFIG.layout.grid * CONFIG.upscaler.ratio) ** 2
    ups = low * 2 * layers * block + high * (layers * (4 * 8 * hidden**2 + 6 * attention) + 4 * head)
    assert flops_per_position(Upscaler(frozen, upscale)) == pytest.approx(ups / (low + high))


def test_work_is_what_runs() -> None:
    """Estimated FLOPs must be close to what PyTorch counts for a step, apart from attention scores."""
    from torch.utils.flop_counter import FlopCounterMode

    from cogvideo.layout import SequenceLayout
    from cogvideo.models.plans import full_pass

    base, channel, _ = parts()
    base, channel = (each.to_empty(device="cpu") for each in (base, channel))
    for parameter in (*base.parameters(), *channel.parameters()):
        nn.init.normal_(parameter, 0, 0.02)
    model = Transformer(base.requires_grad_(False), channel)
    layout = SequenceLayout.sequential(CONFIG.layout)
    mask = torch.ones(1, layout.text_slots, dtype=torch.bool)
    plan = full_pass(layout, 0, mask, torch.float32, layout.num_frames)
    tokens = torch.randint(CONFIG.transformer.num_codes, (1, layout.length))
    positions = torch.cat([layout.text_positions(mask), layout.frame_positions(range(layout.num_frames))[None]], 1)
    with FlopCounterMode(display=False) as counter:
        model.base.logits(model(tokens, positions, plan)).sum().backward()
    products = [torch.ops.aten.mm, torch.ops.aten.addmm]
    counted = sum(counter.get_flop_counts()["Global"].get(each, 0) for each in products)
    assert flops_per_position(model) * layout.length == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_line_shows_the_first_step_and_asks_for_words_when_it_shows_them(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    """Catches an empty log, a bar stuck at zero for fifty steps, and metrics fetched from a GPU at every step."""
    now = [1000.0]
    asked: list[int] = []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    out = console(terminal)
    with ProgressLine(out, 10, 300) as line:
        for step in range(11, 75):
            now[0] += 0.0625 if terminal else 1.0
            line.advance(step, lambda step=step: f"loss {asked.append(step) or step}")
    if terminal:
        assert asked == list(range(11, 75, 4))
        assert "71/300" in written(out)
    else:
        assert asked == [11, 41, 71]
        assert written(out).splitlines() == [
            "step 11 of 300: loss 11  5 min left",
            "step 41 of 300: loss 41  4 min left",
            "step 71 of 300: loss 71  4 min left",
        ]


def test_the_first_interrupt_waits_and_the_second_does_not() -> None:
    """Ctrl-C must let a step finish, but pressing it again must interrupt a step that hangs."""
    before = signal.getsignal(signal.SIGINT)
    with interrupts() as caught:
        os.kill(os.getpid(), signal.SIGINT)
        assert caught == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
