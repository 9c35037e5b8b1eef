"""The package reproduces the released system's figures, and the parity program notices deviations."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import parity
from cogvideo.bundle.convert import released_base_names, released_channel_names
from cogvideo.generation.decode import Passes
from reference import Oracle, Prompt, Stage

TRAINED = [path.stem for path in parity.cases(parity.GOLDEN) if not path.stem.startswith("infer")]
GENERATED = {
    "infer_first_frame": Passes(draft=8),
    "infer_stage1_guided": Passes(draft=8),
    "infer_stage1_unguided": Passes(parallel_frames=True),
    "infer_stage2_guided": Passes(draft=8),
    "infer_stage2_unguided": Passes(parallel_frames=True),
}
"""Passes of each case in these tests; `make check` generates all cases one code at a time."""


def require_parity(name: str, passes: Passes) -> None:
    outcome = parity.check(parity.GOLDEN / f"{name}.safetensors", passes)
    assert outcome.total > 0
    assert outcome.equal == outcome.total
    assert outcome.error <= outcome.limit
    assert outcome.passed


@pytest.mark.usefixtures("without_shape_checks")  # thousands of small passes: checks would dominate the time
@pytest.mark.parametrize("name", TRAINED)
def test_released_figures(name: str) -> None:
    """Guards fidelity in training, the image tokenizer and super-resolution: logits, losses, codes and pixels."""
    require_parity(name, Passes())


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("name", GENERATED)
def test_released_clips(name: str) -> None:
    """Guards all codes and probed logits, also with fewer passes, and with windows of 10 shifted by 5."""
    require_parity(name, GENERATED[name])


def test_all_cases_are_there() -> None:
    """Guards against losing case files: a missing file would be skipped."""
    assert [path.stem for path in parity.cases(parity.GOLDEN)] == [
        "dsr",
        "icetk_vqvae",
        "infer_first_frame",
        "infer_stage1_guided",
        "infer_stage1_unguided",
        "infer_stage2_guided",
        "infer_stage2_unguided",
        "train_stage1_full",
        "train_stage1_window",
        "train_stage2_window",
    ]


# A folder with other sizes, computed by the oracle

SIZES = {"num_layers": 3, "hidden_size": 24, "num_attention_heads": 3, "vocab_size": 70, "num_image_tokens": 40}
START, WORDS, GRID, BATCH = 47, 9, 4, 2
AREA = GRID**2


def released_shapes(num_frames: int) -> dict[str, list[int]]:
    """Return released names with smaller shapes; the table of added positions has rows that no slot reads."""
    hidden, vocab, layers = SIZES["hidden_size"], SIZES["vocab_size"], SIZES["num_layers"]
    golden = json.loads((parity.GOLDEN / "state_dict_shapes_cogvideo.json").read_text())
    old = {600: vocab, 64: hidden, 192: 3 * hidden, 256: 4 * hidden, 1024: 560, 2000: num_frames * AREA + 3}
    names = [name for name in golden if not any(part.isdigit() and int(part) >= layers for part in name.split("."))]
    return {name: [old[size] for size in golden[name]] for name in names}


class Folder:
    """A folder of parity cases, computed by the oracle."""

    def __init__(self, path: Path, num_frames: int, window: int) -> None:
        self.path, self.num_frames, self.window = path, num_frames, window
        self.shapes = released_shapes(num_frames)
        (path / "state_dict_shapes_cogvideo.json").write_text(json.dumps(self.shapes))
        self.random = np.random.default_rng(5)
        self.meta = SIZES | {"seed": 23, "grid": GRID, "frames": num_frames, "text_len_train": WORDS}

    def oracle(self, stage: Stage, window: int) -> Oracle:
        layers = SIZES["num_layers"]
        weights = parity.golden_weights().weights(self.shapes, self.meta["seed"])
        base, channel = (
            {ours: torch.from_numpy(weights[name]).double() for name, ours in names(layers).items()}
            for names in (released_base_names, released_channel_names)
        )
        sizes = (layers, SIZES["num_attention_heads"], SIZES["num_image_tokens"], START, GRID, self.num_frames, 512)
        return Oracle(stage, base, None if stage == "image" else channel, *sizes, window)

    def write(self, name: str, tensors: dict[str, Tensor], **meta: Any) -> None:
        contiguous = {key: value.contiguous() for key, value in tensors.items()}
        save_file(contiguous, self.path / f"{name}.safetensors", {"meta": json.dumps(self.meta | meta)})

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.from_numpy(self.random.integers(low, high, shape))

    def write_training(self, name: str, stage: Stage) -> None:
        """Write a training case, with every figure from the dense oracle."""
        oracle, places = self.oracle(stage, self.window), range(self.num_frames)
        codes = self.integers(0, SIZES["num_image_tokens"], BATCH, self.num_frames, AREA)
        text, pads = self.integers(48, 70, BATCH, WORDS), [2, 5]
        mask = torch.tensor([[index >= count for index in range(WORDS)] for count in pads])
        whole, frames, losses = [], [], []
        for sample in range(BATCH):
            prompt = Prompt(text[sample].tolist(), tuple(mask[sample].tolist()))
            _, x = oracle.hidden(prompt, dict(zip(places, codes[sample].tolist(), strict=True)))
            whole.append(oracle.logits(x[WORDS - 4 : WORDS], whole_vocabulary=True))
            frames.append(oracle.logits(x[WORDS:]))
            losses.append(-frames[-1].log_softmax(1).gather(1, codes[sample].flatten()[:, None])[:, 0])
        loss = torch.stack(losses).view(BATCH, self.num_frames, AREA)
        drawn = loss[:, 1:] if stage == "sequential" else loss[:, 1::2]
        start = torch.full((BATCH, self.num_frames, 1), START)
        fed = torch.cat([start, codes[:, :, :-1]], 2).flatten(1)
        positions = [
            [max(index - count, 0) for index in range(WORDS)] + [512 + slot for slot in range(self.num_frames * AREA)]
            for count in pads
        ]
        probe = torch.arange(0, self.num_frames * AREA, 3)
        tensors = {
            "tokens": torch.cat([text, fed], 1),
            "position_ids": torch.tensor(positions),
            "text_mask": mask.float(),
            "labels": torch.cat([text, codes.flatten(1)], 1),
            "probe": probe,
            "logits": torch.stack(frames)[:, probe].float(),
            "loss": drawn.mean().float(),
            "per_token_loss": loss.flatten(1).float(),
            "text_logits": torch.stack(whole).float(),
        }
        self.write(name, tensors, stage=1 if stage == "sequential" else 2, window=self.window, npad=pads)

    def write_generation(self, name: str, stage: Stage, guided: bool) -> None:
        """Write a generation case, from the naive decoder with the noise of the format."""
        oracle = self.oracle(stage, self.window if stage == "interpolation" else 0)
        places = {"image": [0], "sequential": range(1, self.num_frames), "interpolation": range(1, self.num_frames, 2)}
        drawn = list(places[stage])
        known = [place for place in range(self.num_frames) if place not in drawn] if stage != "image" else []
        given = self.integers(0, SIZES["num_image_tokens"], BATCH, len(known), AREA)
        rng = np.random.default_rng(77)
        size = (BATCH, SIZES["num_image_tokens"])
        noise = torch.stack([torch.from_numpy(rng.gumbel(size=size)) for _ in range(len(drawn) * AREA)], 1)
        text, guide = self.integers(48, 70, 6).tolist(), self.integers(48, 70, 11).tolist()
        bonus, temperature = (0.0, 1.1) if guided else (1.4, 0.9)
        codes, logits = [], []
        for sample in range(BATCH):
            out = oracle.decode(
                Prompt(text, (True,) * 6),
                dict(zip(known, given[sample].tolist(), strict=True)),
                drawn,
                noise[sample].unflatten(0, (len(drawn), AREA)),
                temperature,
                bonus,
                Prompt(guide, (True,) * 11) if guided else None,
                2.0,
            )
            codes.append(out.codes)
            logits.append(out.logits.flatten(0, 1))
        kind = "_".join(name.split("_")[:2])
        drawn_codes, every = torch.stack(codes), parity.PROBED_EVERY[kind]
        tensors = {"logits_probe": torch.stack(logits, 1)[::every].float()}
        tensors |= {
            "image": lambda: {"tokens": drawn_codes[:, 0]},
            "sequential": lambda: {"first": given[:, 0], "frames": torch.cat([given, drawn_codes], 1)},
            "interpolation": lambda: {"given": given, "inserted": drawn_codes},
        }[stage]()
        settings: dict[str, Any] = {"text": text, "guide_text": guide if guided else None, "boi": START, "batch": BATCH}
        settings |= {"alpha": 2.0 if guided else None, "log_text_attention_weight": bonus, "noise_seed": 77}
        self.write(name, tensors, temperature=temperature, **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of cases with other sizes, seeds and texts; the guide text is longer than the text slots of training."""
    path = tmp_path_factory.mktemp("parity")
    maker = Folder(path, num_frames=3, window=2)
    maker.write_training("train_stage1_window", "sequential")
    maker.write_training("train_stage2_window", "interpolation")
    maker.write_generation("infer_first_frame", "image", guided=False)
    maker.write_generation("infer_stage1_guided", "sequential", guided=True)
    maker.write_generation("infer_stage2_unguided", "interpolation", guided=False)
    return path


def test_a_folder_of_other_sizes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a program, or a package, that is correct only at the sizes of the golden cases."""
    assert parity.main([str(folder)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "pass" in line]
    assert len(lines) == 5
    assert "32/32" in "".join(lines)


def off(name: str, amount: float) -> Callable[[dict[str, Tensor]], None]:
    """Return a function that changes one figure."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].flatten()[-1:].add_(torch.tensor(amount, dtype=tensors[name].dtype))

    return change


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("train_stage1_window", off("logits", 2e-4)),
        ("train_stage1_window", off("logits", float("nan"))),
        ("train_stage1_window", off("loss", 2e-4)),
        ("train_stage1_window", off("per_token_loss", 2e-4)),
        ("train_stage1_window", off("text_logits", 2e-4)),
        ("train_stage1_window", off("position_ids", 1)),
        ("train_stage2_window", off("tokens", 1)),
        ("infer_first_frame", off("tokens", 1)),
        ("infer_first_frame", off("logits_probe", 2e-4)),
        ("infer_stage1_guided", off("frames", 1)),
        ("infer_stage1_guided", lambda tensors: tensors.pop("logits_probe")),
        ("infer_stage2_unguided", off("inserted", 1)),
        ("infer_stage2_unguided", lambda tensors: tensors.update(logits_probe=tensors["logits_probe"][1:])),
    ],
)
def test_a_wrong_figure_fails(folder: Path, tmp_path: Path, case: str, change: Callable, capsys) -> None:
    """Checks the program itself: a figure that is off, NaN or missing must fail."""
    original = parity.Case.read(folder / f"{case}.safetensors")
    change(original.tensors)
    save_file(original.tensors, tmp_path / f"{case}.safetensors", {"meta": json.dumps(original.meta)})
    shapes = "state_dict_shapes_cogvideo.json"
    (tmp_path / shapes).write_text((folder / shapes).read_text())
    assert parity.main([str(tmp_path)]) == 1
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"seed": 24}, {"temperature": 0.1}, {"noise_seed": 78}, {"alpha": 1.9}])
def test_a_wrong_setting_fails(folder: Path, tmp_path: Path, change: dict[str, Any], capsys) -> None:
    """Guards against settings that are ignored."""
    case = parity.Case.read(folder / "infer_stage1_guided.safetensors")
    save_file(case.tensors, tmp_path / f"{case.name}.safetensors", {"meta": json.dumps(case.meta | change)})
    shapes = "state_dict_shapes_cogvideo.json"
    (tmp_path / shapes).write_text((folder / shapes).read_text())
    assert parity.main([str(tmp_path)]) == 1
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "usage"), (["nowhere"], "nowhere is not a folder"), (["."], "holds no case"), ([".", "."], "usage")],
)
def test_nothing_to_test(arguments: list[str], message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """Guards against success when nothing was compared."""
    monkeypatch.chdir(tmp_path)
    assert parity.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_command(tmp_path: Path) -> None:
    """Guards the documented command: `python -m tests.parity DIR` in the repository."""
    command = [sys.executable, "-m", "tests.parity", str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "holds no case" in done.stderr
