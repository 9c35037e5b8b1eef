"""Adapters: no effect at the start, same results fused or not, sums of several, PEFT's files, and error messages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cogvideo.bundle.adapters import CONFIG, WEIGHTS, write_adapter
from cogvideo.bundle.model import CogVideo
from cogvideo.cli import main
from cogvideo.config import InputError
from cogvideo.layout import SequenceLayout
from cogvideo.models.adapters import adapt
from cogvideo.models.plans import full_pass
from cogvideo.models.transformer import Transformer
from cogvideo.pipeline import CogVideoPipeline
from cogvideo.web.served import ServedModel
from gallery import assert_same, make_model
from reference import relative_error

ADAPTED = ("base", "sequential")


def load(folder: Path, dtype: torch.dtype | None = torch.float64, **adapters: float) -> CogVideo:
    """Load a model with adapters by name and scale."""
    return CogVideo.from_pretrained(folder, dtype, adapters=adapters)


def matrices(model: CogVideo, component: str, rank: int, seed: int) -> dict[str, Tensor]:
    """Matrices of an adapter with a large effect."""
    module = model.part(component, torch.nn.Module)
    adapt(module, rank)
    shapes = {name: each.shape for name, each in module.state_dict().items() if ".lora_" in name}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) / 4 for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def bundle(train_text_model: Callable[..., bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model with adapters `one` and `two`, of ranks 2 and 3, for the base and key frames."""
    folder = tmp_path_factory.mktemp("adapters") / "model"
    model = make_model(folder, train_text_model())
    for seed, name in enumerate(("one", "two")):
        for component in ADAPTED:
            tensors = matrices(load(folder), component, 2 + seed, seed)
            facts = {"component_sha256": model.sha256(component)}
            write_adapter(folder / "adapters" / name / component, tensors, facts)
    return folder


def passed(source: CogVideo, model: Transformer) -> Tensor:
    """Output of a key-frame pass over random tokens."""
    layout = SequenceLayout.sequential(source.config.layout)
    mask = torch.ones(2, layout.text_slots, dtype=torch.bool)
    plan = full_pass(layout, model.window, mask, model.base.words.weight.dtype, layout.num_frames)
    frames = layout.frame_positions(range(layout.num_frames)).expand(2, -1)
    positions = torch.cat([layout.text_positions(mask), frames], 1)
    tokens = torch.randint(0, 40, positions.shape, generator=torch.Generator().manual_seed(5))
    return model(tokens, positions, plan)


def weights(model: CogVideo, component: str) -> dict[str, Tensor]:
    return model.part(component, torch.nn.Module).state_dict()


def test_an_adapter_is_nothing_at_its_start(bundle: Path) -> None:
    """Guards training: before the first step, a model with adapters is bit-identical to the one it starts from."""
    source = load(bundle, torch.float32)
    before = passed(source, source.sequential)
    for component in ADAPTED:
        adapt(source.part(component, torch.nn.Module), source.config.transformer.hidden)
    assert torch.equal(passed(source, source.sequential), before)
    assert sum(each.requires_grad for each in source.sequential.parameters()) == 2 * (4 + 2) * 2
    with pytest.raises(InputError, match="lora is 0, expected a rank of 1 to 32"):
        adapt(load(bundle).base, 0)


def test_fused_adapters_are_those_of_training(bundle: Path) -> None:
    """Checks that generation, which adds adapters to weights, agrees with training, which adds products."""
    plain, fused, loose = load(bundle), load(bundle, one=1.0), load(bundle)
    for component in ADAPTED:
        module = loose.part(component, torch.nn.Module)
        adapt(module, 2)
        tensors = load_file(bundle / "adapters" / "one" / component / WEIGHTS)
        found = {name.removeprefix("base_model.model."): each.double() for name, each in tensors.items()}
        module.double().load_state_dict(found, strict=False)
    expected = passed(loose, loose.sequential).detach()
    assert relative_error(passed(fused, fused.sequential), expected) < 1e-12
    assert relative_error(passed(plain, plain.sequential), expected) > 0.1


def test_two_adapters_are_their_sum(bundle: Path) -> None:
    """Checks several adapters at once, each with its own scale."""
    plain, one, two = load(bundle), load(bundle, one=1.0), load(bundle, two=1.0)
    both = weights(load(bundle, one=1.0, two=-0.5), "base")
    for name, before in weights(plain, "base").items():
        change = weights(one, "base")[name] - before - (weights(two, "base")[name] - before) / 2
        assert relative_error(both[name], before + change) < 1e-12, name
    assert load(bundle, one=1.0).fingerprint != load(bundle, one=0.5).fingerprint != plain.fingerprint


def test_peft_reads_and_writes_the_same_files(bundle: Path, tmp_path: Path) -> None:
    """Checks that adapters can be exchanged with PEFT in both directions."""
    peft = pytest.importorskip("peft")
    ours, folder = bundle / "adapters" / "two" / "base", tmp_path / "theirs" / "base"
    wrapped = peft.PeftModel.from_pretrained(load(bundle, torch.float32).base, ours)
    wrapped.save_pretrained(folder)
    assert_same(load_file(folder / WEIGHTS), load_file(ours / WEIGHTS))
    merged = wrapped.merge_and_unload().state_dict()
    for each in (load(bundle, torch.float32, two=1.0), load(bundle, torch.float32, **{str(folder.parent): 1.0})):
        found = weights(each, "base") if len(each.adapters) == 1 else each.base.state_dict()
        assert found.keys() == merged.keys()
        assert max(relative_error(found[name], merged[name]) for name in merged) < 1e-6


def test_a_pipeline_with_adapters(bundle: Path, tmp_path: Path) -> None:
    """Checks adapted clips: packed weights are adapted, super-resolution keeps its base, and saved models are fused."""

    def clip(model: CogVideo) -> Tensor:
        pipeline = CogVideoPipeline(model)
        made = pipeline("a cat runs", generator=torch.Generator().manual_seed(1), settings=settings)
        assert not model.is_loaded("base")
        return made.codes

    settings = CogVideoPipeline.from_pretrained(bundle).settings
    plain, adapted = clip(load(bundle, torch.float32)), load(bundle, torch.float32, one=1.0)
    load(bundle, torch.float32, one=1.0).save_pretrained(tmp_path / "fused")
    saved = CogVideo.from_pretrained(tmp_path / "fused", torch.float32)
    assert_same(weights(saved, "superres_base"), weights(load(bundle, torch.float32), "base"))
    assert torch.equal(clip(saved), clip(adapted))
    assert not torch.equal(clip(adapted), plain)
    assert torch.equal(clip(load(bundle, torch.float32, one=0.0)), plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "has use_dora True, expected plain LoRA"),
        ({"r": 0}, "expected PEFT's settings"),
    ],
)
def test_other_adapters_are_refused(change: dict[str, object], message: str, bundle: Path, tmp_path: Path) -> None:
    """Guards against PEFT files with settings that are not supported here."""
    shutil.copytree(bundle / "adapters" / "one", tmp_path / "odd")
    path = tmp_path / "odd" / "base" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        load(bundle, **{str(tmp_path / "odd"): 1.0}).component("base")


def test_mistakes(bundle: Path, tmp_path: Path, train_text_model: Callable[..., bytes]) -> None:
    """Checks the messages that say what is wrong with an adapter."""
    with pytest.raises(InputError, match=r"no adapter 'three', expected one of one, two, or a folder"):
        load(bundle, three=1.0)
    with pytest.raises(InputError, match="is not an adapter, expected one with adapter_config"):
        load(bundle, **{str(tmp_path): 1.0})
    with pytest.raises(InputError, match="scale of the adapter one is nan"):
        load(bundle, one=float("nan"))
    other = make_model(tmp_path / "other", train_text_model(), hidden=64)
    assert other.folder is not None
    with pytest.raises(InputError, match=r"was trained on another base \(sha256 .*pass the model"):
        load(other.folder, **{str(bundle / "adapters" / "one"): 1.0})
    write_adapter(tmp_path / "wide" / "base", matrices(load(other.folder), "base", 2, 0), {})
    with pytest.raises(InputError, match=r"does not fit blocks\.0\.\w+ of base \("):
        load(bundle, **{str(tmp_path / "wide"): 1.0}).component("base")


def test_clips_with_adapters_are_made_again(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checks `generate` with several `--adapter` options, and the sidecars of its clips."""
    monkeypatch.chdir(tmp_path)
    options = ["--model", str(bundle), "--rounds", "0"]
    given = ["--adapter", str(bundle / "adapters" / "one"), "--adapter", "two:0.5"]
    assert main(["generate", "a cat runs", "--seed", "1", "--output", "a.mp4", *options, *given]) == 0
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["adapter"] == ["one:1", "two:0.5"]
    assert main(["generate", "--from-sidecar", "a.json", "--model", str(bundle), "--output", "b.mp4"]) == 0
    assert json.loads((tmp_path / "b.json").read_text())["codes"] == record["codes"]
    assert main(["generate", "a cat", "--output", "c.mp4", *options, "--adapter", "two:much"]) == 2
    assert "adapter is 'two:much', expected NAME or NAME:SCALE" in capsys.readouterr().err
    assert ServedModel(str(bundle), adapters={"one": 1.0, "two": 0.5}).fingerprint == record["bundle"]
