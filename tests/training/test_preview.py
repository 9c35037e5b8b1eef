"""The samples of a run: which weights draw them, of what, and that nothing of the run changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cogvideo.bundle.model import CogVideo
from cogvideo.data.clips import ClipSampling
from cogvideo.data.loader import ClipStream
from cogvideo.training import samples
from cogvideo.training.export import ExportTarget, modules
from cogvideo.training.optim import StageOptimization
from cogvideo.training.parallel import full_state
from cogvideo.training.samples import Preview
from cogvideo.training.stages import Choice, StageName
from cogvideo.training.step import Execution
from gallery import assert_same, make_model, make_trainer
from workshop import make_data


@pytest.fixture(scope="module")
def place(train_text_model: Callable[..., bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a whole bundle and data."""
    folder = tmp_path_factory.mktemp("preview")
    make_model(folder / "whole", train_text_model())
    make_data(folder / "data", folder / "whole")
    return folder


def preview_of(
    stage: StageName, place: Path, folder: Path, prompts: tuple[str, ...] = (), source: str = "whole", **options: Any
) -> Preview:
    """Of a stage in training, which moved a little from where it started."""
    model = CogVideo.from_pretrained(place / source)
    settings = StageOptimization(batch=2, ema=0.5, seed=6, precision=options.pop("precision", "float32"))
    trainer = make_trainer(stage, model, settings, Execution(**options))
    assert trainer.average is not None
    with torch.no_grad():
        for seed, each in enumerate(trainer.average.state.values()):
            each.add_(torch.randn(each.shape, generator=torch.Generator().manual_seed(seed)), alpha=0.05)
    mode = "image" if stage in ("image", "superres") else stage
    stream = ClipStream([place / "data"], "validation", ClipSampling(mode, high_codes=stage == "superres"))  # type: ignore[arg-type]
    return Preview(
        ExportTarget(folder, model, model.config, stage, Choice("continue")), trainer, stream, prompts, folder, 6
    )


def test_what_is_lacking_is_known(place: Path, tmp_path: Path) -> None:
    """Guards a run that goes on: it draws what a killed one could not, and nothing twice or in vain."""
    preview = preview_of("sequential", place, tmp_path / "samples")
    assert preview.lacks(3)
    sheet = preview(3)
    assert not preview.lacks(3)
    assert sheet is not None
    sheet.unlink()  # as if the process had been killed before the sheet, which is written last
    assert list(sheet.parent.iterdir())
    assert preview.lacks(3)
    preview.problem = "nothing can be drawn"
    assert not preview.lacks(3)


def test_what_a_preview_draws_with_stays_where_it_is(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the bundle that a run starts from: its modules were moved to the GPU for good, and took memory there."""
    preview = preview_of("sequential", place, tmp_path / "samples")
    source, weights = preview.target.source, full_state(preview.trainer.module)
    elsewhere = preview.trainer.ranks._replace(device=torch.device("meta"))
    monkeypatch.setattr(preview.trainer, "ranks", elsewhere)
    drawn = preview._system(weights)
    for name in ("base", "image_tokenizer"):
        assert {each.device.type for each in drawn.component(name).state_dict().values()} == {"meta"}
        assert {each.device.type for each in source.component(name).state_dict().values()} == {"cpu"}
    assert {each.device.type for each in preview.trainer.objective.parameters()} == {"cpu"}


@pytest.mark.parametrize("options", [{}, {"checkpointing": True}])
@pytest.mark.parametrize("stage", ["image", "sequential", "interpolation", "superres"])
def test_a_preview_draws_with_the_average(
    stage: StageName, options: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    """Guards the sheets of a run: they show the weights that would be exported, and nothing of the run changes."""
    preview = preview_of(stage, place, tmp_path / "samples", **options)
    trainer = preview.trainer
    assert preview.problem == ""
    assert trainer.average is not None

    def everything() -> list[Tensor]:
        assert trainer.average is not None
        state = [each.detach().clone() for each in (*trainer.objective.parameters(), *trainer.average.state.values())]
        modes = [
            torch.tensor([each.training, *[p.requires_grad for p in each.parameters()]])
            for each in trainer.module.modules()
        ]
        return [*state, *modes, torch.get_rng_state()]

    before = everything()
    sheet = preview(20)
    assert all(torch.equal(*pair) for pair in zip(before, everything(), strict=True))
    assert sheet == tmp_path / "samples" / "step-00000020.png"
    component = "base" if stage == "image" else stage
    prefix = "model.base." if stage == "image" else "model.channel."
    parts: dict[str, Any] = {
        name: part for name in preview.target.source.components for part in [preview.target.source.component(name)]
    }
    live = modules(stage, Choice("continue"), preview.target.config, trainer.average.state)[component]
    assert_same(live.state_dict(), {n.removeprefix(prefix): each for n, each in trainer.average.state.items()})
    rows = samples.draw(stage, CogVideo(preview.target.config, **(parts | {component: live})), preview.examples, seed=6)
    expected = samples.write_samples(tmp_path / "expected", 20, rows)
    assert np.array_equal(np.asarray(Image.open(sheet)), np.asarray(Image.open(expected)))
    assert len(preview.examples) == 4


@pytest.mark.parametrize("stage", ["sequential", "interpolation", "superres"])
def test_a_preview_of_a_base_in_bfloat16(stage: StageName, place: Path, tmp_path: Path) -> None:
    """Guards runs in bfloat16, whose frozen base is stored in it."""
    assert preview_of(stage, place, tmp_path, precision="bfloat16")(1) is not None


def test_a_preview_shows_prompts_where_it_can(place: Path, tmp_path: Path) -> None:
    """Guards what the user asked to see: prompts for the stages that start from text, true clips for the others."""
    prompts = ("a cat", "a dog")
    for stage, expected in (("image", list(prompts)), ("sequential", list(prompts)), ("interpolation", None)):
        shown = [each.prompt for each in preview_of(stage, place, tmp_path, prompts).examples]  # type: ignore[arg-type]
        assert shown == expected or (expected is None and all("moves" in each for each in shown))


def test_a_prompt_that_says_nothing_is_refused_at_once(place: Path, tmp_path: Path) -> None:
    """Guards a run that would fail at its first sheet, after hundreds of steps."""
    with pytest.raises(ValueError, match="the prompt is empty: ' '"):
        preview_of("sequential", place, tmp_path, ("a cat", " "))


def test_other_ranks_draw_nothing(place: Path, tmp_path: Path) -> None:
    """Guards two ranks that would write one file."""
    preview = preview_of("image", place, tmp_path / "samples")
    preview.trainer.ranks = preview.trainer.ranks._replace(rank=1)
    assert preview(1) is None
    assert not (tmp_path / "samples").exists()


def test_a_preview_without_a_tokenizer_says_why(
    place: Path, tmp_path: Path, train_text_model: Callable[..., bytes]
) -> None:
    """Guards runs on codes alone: they train, and say once why they draw nothing."""
    make_model(tmp_path / "model", train_text_model(), without=("image_tokenizer",))
    preview = preview_of("image", place, tmp_path / "samples", source=str(tmp_path / "model"))
    assert preview.problem == "No samples are drawn while training: the model has no image_tokenizer."
    assert preview(1) is None
