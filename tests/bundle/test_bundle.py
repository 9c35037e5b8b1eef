"""Bundles: round trips, rejection of damaged files, and interrupted saves that leave the old bundle whole."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cogvideo.bundle import format as storage
from cogvideo.bundle.format import COMPONENTS, MANIFEST, Entry, Manifest, file_of
from cogvideo.bundle.model import CogVideo, update
from cogvideo.cli import main
from cogvideo.config import (
    CogVideoConfig,
    LayoutConfig,
    StageConfig,
    TextConfig,
    TransformerConfig,
    UpscalerConfig,
)
from cogvideo.files import LOCK
from cogvideo.models.autoencoder import Autoencoder
from cogvideo.models.transformer import Base, TemporalChannel
from cogvideo.models.upscaler import UpscaleChannel
from cogvideo.packing import PackedLinear, pack
from cogvideo.text import TextTokenizer
from killing import full_disk, kill_at
from workshop import small_autoencoder

NUM_CODES = 24
FILES = {
    MANIFEST,
    "base.safetensors",
    "sequential.safetensors",
    "interpolation.safetensors",
    "superres.safetensors",
    "image_tokenizer.safetensors",
    "cluster_labels.safetensors",
    "text.model",
}


def small_config(text_model: bytes) -> CogVideoConfig:
    text = TextTokenizer(text_model, TextConfig(), NUM_CODES)
    return CogVideoConfig(
        transformer=TransformerConfig(2, 16, 2, text.num_tokens, NUM_CODES, text.start_of_image, text.pad, 25),
        layout=LayoutConfig(grid=4, num_frames=3, text_slots=6, image_text_slots=6, frame_position=8),
        sequential=StageConfig(0),
        interpolation=StageConfig(2),
        upscaler=UpscalerConfig(ratio=2, text_slots=6, low_position=9),
        autoencoder=small_autoencoder(NUM_CODES),
    )


def randomized(module: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(generator=generator)
    return module


def small_components(config: CogVideoConfig, text_model: bytes, seed: int = 0) -> dict[str, Any]:
    sizes = (config.transformer, config.layout)
    modules = {
        "base": Base(config.transformer),
        "sequential": TemporalChannel(*sizes, config.sequential),
        "interpolation": TemporalChannel(*sizes, config.interpolation),
        "superres": UpscaleChannel(*sizes, config.upscaler),
        "image_tokenizer": Autoencoder(config.autoencoder),
    }
    parts: dict[str, Any] = {name: randomized(each, seed + index) for index, (name, each) in enumerate(modules.items())}
    parts["cluster_labels"] = torch.arange(NUM_CODES) // 5
    parts["text"] = TextTokenizer(text_model, config.text, NUM_CODES)
    return parts


@pytest.fixture(scope="module")
def config(text_model: bytes) -> CogVideoConfig:
    return small_config(text_model)


@pytest.fixture
def parts(config: CogVideoConfig, text_model: bytes) -> dict[str, Any]:
    return small_components(config, text_model)


@pytest.fixture
def folder(config: CogVideoConfig, parts: dict[str, Any], tmp_path: Path) -> Path:
    """Complete bundle in float32."""
    CogVideo(config, **parts).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def modules_of(model: CogVideo) -> dict[str, nn.Module]:
    channels = {"sequential": model.sequential.channel, "interpolation": model.interpolation.channel}
    superres, tokenizer = model.upscaler.channel, model.autoencoder
    return {"base": model.base, **channels, "superres": superres, "image_tokenizer": tokenizer}


def assert_same(module: nn.Module, expected: nn.Module, dtype: torch.dtype | None = None) -> None:
    got, expected_state = module.state_dict(), expected.state_dict()
    assert got.keys() == expected_state.keys()
    for name, tensor in expected_state.items():
        tensor = tensor if dtype is None else tensor.to(dtype)
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name


def assert_whole(folder: Path, parts: dict[str, Any]) -> None:
    """Check that the bundle in `folder` holds exactly these components."""
    model = CogVideo.from_pretrained(folder)
    assert set(model.components) == parts.keys()
    for name, module in modules_of(model).items():
        assert_same(module, parts[name])
    assert torch.equal(model.cluster_labels, parts["cluster_labels"])
    assert model.text.model == parts["text"].model


def names_in(folder: Path) -> set[str]:
    return {each.name for each in folder.iterdir()} - {LOCK}


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edit `bundle.json`."""
    values = json.loads((folder / MANIFEST).read_text())
    change(values)
    (folder / MANIFEST).write_text(json.dumps(values))


def replace_file(folder: Path, component: str, tensors: dict[str, Tensor]) -> None:
    """Replace the tensors of a component, and its hash: only the content is wrong."""
    path = folder / f"{component}.safetensors"
    save_file(tensors, path)
    entry = Entry.of(path)
    edit(folder, lambda values: values["components"].update({component: vars(entry)}))


# Round trips


def test_empty_modules_do_not_import_the_compiler() -> None:
    """Loading would take a second longer; random numbers on the meta device import it."""
    code = """
import sys, torch
from cogvideo.bundle.format import MODULES
from cogvideo.config import preset
with torch.device("meta"):
    for module in MODULES.values():
        module(preset("tiny"))
print("torch._dynamo" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"


def test_saved_equals_loaded(folder: Path, config: CogVideoConfig, parts: dict[str, Any]) -> None:
    """Catches swapped components, values changed on the way, or a configuration that does not survive JSON."""
    assert CogVideo.from_pretrained(folder).config == config
    assert_whole(folder, parts)


def test_files_of_a_bundle(folder: Path, config: CogVideoConfig) -> None:
    """Catches a base stored once per stage, leftover files, or file names that others cannot find."""
    assert names_in(folder) == FILES
    values = json.loads((folder / MANIFEST).read_text())
    assert values.keys() == {"format_version", "config", "components"}
    assert values["config"]["transformer"]["hidden"] == config.transformer.hidden
    stored = {name: Path(folder, entry["file"]) for name, entry in values["components"].items()}
    assert {path.name for path in stored.values()} == FILES - {MANIFEST}
    assert all(path.stat().st_size == values["components"][name]["num_bytes"] for name, path in stored.items())
    assert all(path.stat().st_mode == (folder / MANIFEST).stat().st_mode for path in stored.values())


def test_one_base_serves_all_stages(folder: Path) -> None:
    """Guards against one copy of the base per stage, as in the released system, which users could not afford."""
    model = CogVideo.from_pretrained(folder)
    stages = (model.image_model, model.sequential, model.interpolation, model.upscaler)
    assert all(stage.base is model.base for stage in stages)
    assert model.sequential.channel is model.sequential.channel
    assert model.image_model.channel is None
    assert (model.sequential.window, model.interpolation.window) == (0, 2)


def test_a_stage_with_its_own_base(config: CogVideoConfig, parts: dict[str, Any], tmp_path: Path) -> None:
    """Catches a stage that uses the shared base instead of its own, or vice versa."""
    parts |= {"interpolation_base": randomized(Base(config.transformer), 50)}
    parts |= {"superres_base": randomized(Base(config.transformer), 51)}
    CogVideo(config, **parts).save_pretrained(tmp_path)
    model = CogVideo.from_pretrained(tmp_path)
    assert model.components == tuple(name for name in COMPONENTS if name in parts)
    for stage, component in ((model.sequential, "base"), (model.interpolation, "interpolation_base")):
        assert_same(stage.base, parts[component])
    assert_same(model.upscaler.base, parts["superres_base"])


def test_loaded_weights_are_frozen(folder: Path) -> None:
    """Guards against a base that changes in training, and against memory for gradients that nobody needs."""
    for module in modules_of(CogVideo.from_pretrained(folder)).values():
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_on_load(folder: Path, parts: dict[str, Any], dtype: torch.dtype) -> None:
    """Guards against tensors that keep their stored dtype, which would fail or be slow. Labels must stay integers."""
    model = CogVideo.from_pretrained(folder, dtype=dtype)
    for name, module in modules_of(model).items():
        assert_same(module, parts[name], dtype)
    assert model.cluster_labels.dtype == torch.int64
    assert torch.equal(model.cluster_labels, parts["cluster_labels"])


def test_as_stored(config: CogVideoConfig, parts: dict[str, Any], tmp_path: Path) -> None:
    """Guards against half precision that comes back wider, or a file that is wider than its weights."""
    parts["base"].half()
    CogVideo(config, **parts).save_pretrained(tmp_path)
    assert all(tensor.dtype == torch.float16 for tensor in load_file(tmp_path / "base.safetensors").values())
    assert_whole(tmp_path, parts)


def test_writing_to_loaded_weights_leaves_the_file_alone(folder: Path, parts: dict[str, Any]) -> None:
    """Guards other readers of a bundle whose memory-mapped weights are trained in place."""
    model = CogVideo.from_pretrained(folder)
    model.base.words.weight.zero_()
    assert_whole(folder, parts)


def test_from_parts_in_memory(config: CogVideoConfig, parts: dict[str, Any]) -> None:
    """Guards against copies of the given parts: training would train something other than it saves."""
    model = CogVideo(config, **parts)
    assert modules_of(model) == {name: parts[name] for name in modules_of(model)}
    assert model.text is parts["text"]
    assert model.cluster_labels is parts["cluster_labels"]


# Components are loaded on first use


def test_unused_components_are_not_read(folder: Path) -> None:
    """Guards against loading a whole bundle where one stage is needed."""
    damage(folder / "interpolation.safetensors")
    damage(folder / "image_tokenizer.safetensors")
    model = CogVideo.from_pretrained(folder)
    assert model.sequential.channel is not None
    with pytest.raises(ValueError, match="sha256"):
        _ = model.interpolation


def test_missing_components_are_named(config: CogVideoConfig, parts: dict[str, Any], tmp_path: Path) -> None:
    """Checks that a bundle of only tokenizers works, and that a missing component is named, not a KeyError."""
    CogVideo(config, image_tokenizer=parts["image_tokenizer"], text=parts["text"]).save_pretrained(tmp_path)
    assert names_in(tmp_path) == {MANIFEST, "image_tokenizer.safetensors", "text.model"}
    model = CogVideo.from_pretrained(tmp_path)
    assert model.components == ("image_tokenizer", "text")
    assert_same(model.autoencoder, parts["image_tokenizer"])
    labels = model.cluster_labels  # none are stored, so they are computed from the codebook
    assert labels is not None
    assert torch.equal(labels, CogVideo.from_pretrained(tmp_path).cluster_labels)
    assert CogVideo(config, text=parts["text"]).cluster_labels is None
    with pytest.raises(ValueError, match=r"has no base, it has: image_tokenizer, text"):
        _ = model.sequential
    with pytest.raises(ValueError, match=r"this model has no text, it has: nothing"):
        _ = CogVideo(config).text


def test_wrong_parts_in_memory(config: CogVideoConfig, parts: dict[str, Any]) -> None:
    """Catches a misspelled component that would never be used, or a whole model in place of its channel."""
    with pytest.raises(ValueError, match=r"got the components \['upscaler'\], expected some of \['base'"):
        CogVideo(config, upscaler=parts["superres"])
    model = CogVideo(config, **parts)
    with pytest.raises(ValueError, match="sequential is a Transformer, expected a TemporalChannel"):
        _ = CogVideo(config, base=parts["base"], sequential=model.sequential).sequential


# Damage


def damage(path: Path) -> None:
    """Change the last byte, as a disk fault might."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("component", ["base", "cluster_labels", "text"])
def test_changed_content_is_refused(folder: Path, component: str) -> None:
    """Guards against weights damaged on the way, which give noise or, worse, slightly wrong clips."""
    damage(folder / json.loads((folder / MANIFEST).read_text())["components"][component]["file"])
    with pytest.raises(ValueError, match=rf"{component}\..* has the sha256 [0-9a-f]{{64}}, expected [0-9a-f]{{64}}"):
        getattr(CogVideo.from_pretrained(folder), component)


def test_verification_can_be_left_out(folder: Path, parts: dict[str, Any]) -> None:
    """Catches a `verify` switch that does nothing: hashing large files takes longer than mapping them."""
    damage(folder / "base.safetensors")
    model = CogVideo.from_pretrained(folder, verify=False)
    expected = parts["base"].state_dict()
    assert [name for name, tensor in model.base.state_dict().items() if not torch.equal(tensor, expected[name])]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.update(format_version=3), r"format_version is 3, expected 1 to 2.* upgrade"),
        (lambda values: values.update(format_version=3, more=1), r"format_version is 3, expected 1 to 2"),
        (lambda values: values.update(format_version="1"), r"format_version is '1', expected 1 to 2"),
        (lambda values: values.pop("format_version"), r"format_version is None"),
        (
            lambda values: values.update(format_version=0),
            "format_version is 0, expected 1 to 2: an older cogvideo wrote it; make it again",
        ),
        (lambda values: values.pop("config"), r"Manifest\.config: expected object, got null"),
        (lambda values: values.update(more=1), r"Manifest has the wrong fields: .*unknown \['more'\]"),
        (lambda values: values.update(components=[]), r"Manifest\.components: expected object, got array"),
        (lambda values: values.update(config=3), r"Manifest\.config: expected object, got int"),
        (lambda values: values["config"]["transformer"].pop("hidden"), r"missing \['hidden'\]"),
        (
            lambda values: values["config"]["transformer"].update(hidden="16"),
            r"Manifest\.config\.transformer\.hidden: expected int, got str",
        ),
        (lambda values: values["config"]["layout"].update(grid=5), r"grid 5 is not divisible"),
        (
            lambda values: values["components"].update(other=values["components"]["base"]),
            r"the components \['other'\], expected some of",
        ),
        (
            lambda values: values["components"]["base"].pop("sha256"),
            r"Manifest\.components\.base has the wrong fields: missing \['sha256'\]",
        ),
        (lambda values: values["components"].update(base="base.safetensors"), "expected object, got str"),
    ],
)
@pytest.mark.usefixtures("without_shape_checks")
def test_refused_manifests(folder: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    """Guards against newer or hand-edited bundles that fail with a KeyError somewhere, or load wrongly."""
    edit(folder, change)
    with pytest.raises(ValueError, match=rf"^cannot use .*bundle\.json: .*{message}"):
        CogVideo.from_pretrained(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe"])
def test_refused_json(folder: Path, content: bytes) -> None:
    """Catches a truncated download of the manifest."""
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(ValueError, match=r"^cannot use .*bundle\.json: "):
        CogVideo.from_pretrained(folder)


@pytest.mark.parametrize("file", ["../base.safetensors", "/etc/passwd", "a/b", "..", "", ".hidden", "a\\b", "C:base"])
def test_file_names_outside_of_the_bundle_are_refused(folder: Path, file: str) -> None:
    """Guards against a malicious bundle that reads files elsewhere, or has them removed when it is replaced."""
    edit(folder, lambda values: values["components"]["base"].update(file=file))
    with pytest.raises(ValueError, match=r"is refused, expected a plain name inside the bundle"):
        CogVideo.from_pretrained(folder)


def test_incomplete_bundles_are_refused_at_once(folder: Path) -> None:
    """Guards against a truncated download that only shows hours later, when its stage is first used."""
    content = (folder / "superres.safetensors").read_bytes()
    (folder / "superres.safetensors").write_bytes(content[:-7])
    message = rf"superres.safetensors has {len(content) - 7} bytes, expected {len(content)}"
    with pytest.raises(ValueError, match=message):
        CogVideo.from_pretrained(folder)
    (folder / "superres.safetensors").unlink()
    with pytest.raises(ValueError, match=r"there is no file .*superres.safetensors"):
        CogVideo.from_pretrained(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"bundle.json: No such file"):
        CogVideo.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.bias"), r"missing tensors: norm.bias; unexpected tensors: none"),
        (lambda t: [t.pop(f"blocks.1.norm{n}.bias") for n in (1, 2, 3, 4)], r"norm3.bias and 1 more; unexpected"),
        (lambda t: t.update(more=torch.zeros(1)), r"missing tensors: none; unexpected tensors: more"),
        (lambda t: t.update({"norm.bias": torch.zeros(17)}), r"norm.bias \(17,\), expected \(16,\)"),
        (
            lambda t: t.update({"norm.bias": torch.zeros(16, dtype=torch.int32)}),
            r"norm.bias torch.int32, expected float",
        ),
    ],
)
def test_refused_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    """Guards against files of another model, which would load in part, or fail deep inside a matrix product."""
    tensors = load_file(folder / "base.safetensors")
    change(tensors)
    replace_file(folder, "base", tensors)
    with pytest.raises(ValueError, match=rf"base.safetensors does not fit the configuration as base: .*{message}"):
        _ = CogVideo.from_pretrained(folder).base


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(NUM_CODES + 1, dtype=torch.int64), r"labels \(25,\), expected \(24,\)"),
        (torch.zeros(NUM_CODES), r"labels torch.float32, expected torch.int64"),
        (torch.arange(NUM_CODES) - 1, r"labels lie in \[-1, 22\], expected \[0, 24\)"),
        (torch.arange(NUM_CODES) + 1, r"labels lie in \[1, 24\], expected \[0, 24\)"),
    ],
)
def test_refused_labels(folder: Path, labels: Tensor, message: str) -> None:
    """Guards against labels of another tokenizer, which would index codes out of range."""
    replace_file(folder, "cluster_labels", {"labels": labels})
    with pytest.raises(ValueError, match=message):
        _ = CogVideo.from_pretrained(folder).cluster_labels


def test_what_is_no_safetensors_file_is_refused(folder: Path) -> None:
    """Catches an error page saved in place of a download."""
    path = folder / "base.safetensors"
    path.write_bytes(b"<html>not found</html>")
    edit(folder, lambda values: values["components"].update(base=vars(Entry.of(path))))
    with pytest.raises(ValueError, match=r"base.safetensors is not a safetensors file"):
        _ = CogVideo.from_pretrained(folder).base


def test_text_that_belongs_to_another_transformer_is_refused(folder: Path) -> None:
    """Guards against pads and start tokens of another vocabulary, which would make every prompt nonsense."""
    edit(folder, lambda values: values["config"]["transformer"].update(pad=NUM_CODES))
    with pytest.raises(ValueError, match=r"text.model does not fit the configuration as text: pad is 24"):
        _ = CogVideo.from_pretrained(folder).text


def test_unusable_dtype_and_device(folder: Path) -> None:
    """Guards against failing only after gigabytes have been read."""
    with pytest.raises(ValueError, match=r"dtype is torch.int8, expected one of"):
        CogVideo.from_pretrained(folder, dtype=torch.int8)
    with pytest.raises(ValueError, match="cannot use the device 'cuad'"):
        CogVideo.from_pretrained(folder, device="cuad")


# Where bundles come from


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, Any]:
    """Fake Hub that has `owner/model` and records what it is asked for."""
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **settings: Any) -> str:
        asked[name] = settings
        if name != "owner/model":
            raise ConnectionError("no route to host")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_hub_ids_are_downloaded(hub: dict[str, Any], config: CogVideoConfig) -> None:
    """Guards against downloading files that run code, or that nobody needs, from an untrusted repository."""
    assert CogVideo.from_pretrained("owner/model").config == config
    assert hub == {"owner/model": {"allow_patterns": ["*.json", "*.safetensors", "*.model"]}}


def test_a_folder_wins_over_the_hub(
    hub: dict[str, Any], folder: Path, config: CogVideoConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against using a stranger's model in place of a local one with the same name."""
    monkeypatch.chdir(folder.parent.parent)
    assert CogVideo.from_pretrained(f"{folder.parent.name}/model").config == config
    assert not hub


def test_an_unreachable_hub_says_what_to_do(hub: dict[str, Any]) -> None:
    """Guards against an HTTP library's traceback where a folder was misspelled or the machine is offline."""
    with pytest.raises(ValueError, match=r"no folder owner/other, .*no route to host.*: pass the folder of a bundle"):
        CogVideo.from_pretrained("owner/other")
    assert list(hub) == ["owner/other"]


@pytest.mark.parametrize("name", ["model", "/no/such/model", "./owner/model", "owner/model/part"])
def test_what_cannot_be_an_id_asks_no_hub(hub: dict[str, Any], name: str) -> None:
    """Guards against sending a misspelled path over the network."""
    with pytest.raises(ValueError, match=r"there is no folder .*: pass the folder of a bundle, .*, or pocket"):
        CogVideo.from_pretrained(name)
    assert not hub


# Saving


def hashes(folder: Path) -> dict[str, str]:
    """Verified hashes of a bundle's components."""
    components = Manifest.complete(folder).components
    for entry in components.values():
        entry.verify(folder / entry.file)
    return {name: entry.sha256 for name, entry in components.items()}


def test_saving_into_the_folder_it_came_from(folder: Path, parts: dict[str, Any]) -> None:
    """Guards against overwriting memory-mapped weights, which would kill the process or corrupt the bundle."""
    model = CogVideo.from_pretrained(folder)
    model.sequential.channel.positions.weight.fill_(3)
    parts["sequential"].positions.weight.data.fill_(3)
    for _ in range(3):
        model.save_pretrained(folder)
        assert_whole(folder, parts)
        assert len(names_in(folder)) == len(FILES)
    assert_same(model.interpolation.channel, parts["interpolation"])


def test_saving_what_was_not_loaded(folder: Path, parts: dict[str, Any], tmp_path: Path) -> None:
    """Guards against losing components that were never loaded."""
    CogVideo.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    assert_whole(tmp_path / "copy", parts)
    assert names_in(tmp_path / "copy") == FILES


def test_damage_is_not_copied(folder: Path, tmp_path: Path) -> None:
    """Guards against saving damaged weights under a new hash, which would hide the damage for good."""
    damage(folder / "base.safetensors")
    with pytest.raises(ValueError, match="sha256"):
        CogVideo.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy" / MANIFEST).exists()


def test_saving_in_another_dtype(folder: Path, parts: dict[str, Any], tmp_path: Path) -> None:
    """Guards against converting only what was loaded, and, in the same folder, removing files before reading them."""
    CogVideo.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "copy")
    model = CogVideo.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for each in (CogVideo.from_pretrained(tmp_path / "copy"), CogVideo.from_pretrained(folder), model):
        for name, module in modules_of(each).items():
            assert_same(module, parts[name], torch.bfloat16)


def test_other_files_are_left_alone(folder: Path, parts: dict[str, Any]) -> None:
    """Guards a model card, and a file that only looks like ours, against being lost to a save."""
    (folder / "README.md").write_text("card")
    (folder / "superres_base.safetensors").write_text("not of this bundle")
    model = CogVideo.from_pretrained(folder)
    parts["superres_base"] = model.base
    CogVideo(model.config, **parts).save_pretrained(folder)
    assert (folder / "README.md").read_text() == "card"
    assert (folder / "superres_base.safetensors").read_text() == "not of this bundle"
    assert_same(CogVideo.from_pretrained(folder).upscaler.base, parts["base"])


class Interruption(Exception):
    """Stands for anything that may interrupt a save."""


@pytest.mark.parametrize("moment", ["save_file", "rename", "replace", "write", "unlink"])
@pytest.mark.parametrize("place", [1, 2, 4])
def test_interrupted_saves_leave_the_old_bundle(
    folder: Path, parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch, moment: str, place: int
) -> None:
    """Guards against a save that fails midway, as on a full disk, and leaves neither the old bundle nor the new one."""
    owner = {"save_file": storage, "write": Manifest, "rename": Path, "replace": Path, "unlink": Path}[moment]
    original, calls = getattr(owner, moment), []

    def interrupted(*arguments: Any, **settings: Any) -> Any:
        calls.append(arguments)
        if len(calls) == place:
            raise Interruption
        return original(*arguments, **settings)

    config = CogVideo.from_pretrained(folder).config
    others, before = small_components(config, parts["text"].model, seed=90), hashes(folder)
    monkeypatch.setattr(owner, moment, interrupted)
    try:
        CogVideo(config, **others).save_pretrained(folder)
    except Interruption:
        assert_whole(folder, parts if hashes(folder) == before else others)
        if moment != "unlink":
            assert hashes(folder) == before
            assert names_in(folder) == FILES
    else:
        assert len(calls) < place
        assert_whole(folder, others)
    monkeypatch.undo()
    CogVideo(config, **parts).save_pretrained(folder)
    assert_whole(folder, parts)
    assert len(names_in(folder)) == len(FILES)


def test_a_killed_update_leaves_a_whole_bundle(
    folder: Path, config: CogVideoConfig, parts: dict[str, Any], tmp_path: Path
) -> None:
    """Kills an update, without cleanup, between any two changes of the file system: a partial bundle must never look
    whole, and the next update removes what the killed one left."""
    other = versioned(config, "sequential", 1)
    before, after = hashes(folder), hashes(folder)
    CogVideo(config, sequential=other).save_pretrained(tmp_path / "other")
    after |= hashes(tmp_path / "other")
    for number in count(1):
        copy = tmp_path / f"killed-{number}"
        shutil.copytree(folder, copy)
        killed = kill_at(number, lambda: update(copy, config, sequential=other))  # noqa: B023
        left = hashes(copy)
        assert left in ((before, after) if killed else (after,))
        update(copy, config, text=parts["text"])
        assert hashes(copy) == left
        assert len(names_in(copy)) == len(FILES)
        if not killed:
            break
    assert number > 12, "the update was over before it was killed often"


KILLED, UPDATED = 12, 25
"""Number of kills and of confirmed updates in a short run."""


def update_for_ever(folder: Path, config: CogVideoConfig, component: str, version: int, told: int) -> None:
    """Store versions of a component, filled with their number, and send each number to a pipe once it is stored."""
    while True:
        version += 1
        update(folder, config, **{component: versioned(config, component, version)})
        os.write(told, version.to_bytes(4, "big"))


def versioned(config: CogVideoConfig, component: str, version: int) -> nn.Module:
    module = storage.MODULES[component](config)
    for parameter in module.parameters():
        parameter.data.fill_(version)
    return module


def version_of(module: Any) -> int:
    """The number that fills a component; a mix of two versions fails."""
    (version,) = {float(value) for each in module.parameters() for value in each.unique()}
    return int(version)


def stored_version(folder: Path, component: str) -> int:
    """The number that fills a stored component, read again if it is replaced meanwhile."""
    while True:
        try:
            return version_of(CogVideo.from_pretrained(folder).component(component))
        except ValueError as error:
            if "was replaced: load the bundle again" not in str(error):
                raise


def started(work: Callable[[], None]) -> int:
    """Start a process that is to be killed, and return its ID."""
    if process := os.fork():
        return process
    try:
        work()
    finally:
        os._exit(1)


def hammer(folder: Path, config: CogVideoConfig, updates: int, kills: int, seed: int) -> tuple[int, int]:
    """Update the components of one bundle from several processes that are killed at random moments, until there have
    been enough updates and kills. After each kill, the bundle is whole, and no version is older than the last confirmed
    one."""
    random = Random(seed)
    names = ("base", "sequential", "interpolation", "superres")
    confirmed, num_updates, num_kills = dict.fromkeys(names, 0), 0, 0
    update(folder, config, **{name: versioned(config, name, 0) for name in names})
    processes: dict[str, tuple[int, int]] = {}
    while num_updates < updates or num_kills < kills:
        for name in names:
            if name not in processes:
                told, tells = os.pipe()
                work = partial(update_for_ever, folder, config, name, confirmed[name], tells)
                processes[name] = started(work), told
                os.close(tells)
        time.sleep(random.uniform(0, 0.3))
        name = random.choice(names)
        process, told = processes.pop(name)
        os.kill(process, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
        versions = os.read(told, 1 << 16)
        os.close(told)
        num_kills, num_updates = num_kills + 1, num_updates + len(versions) // 4
        stored = {each: stored_version(folder, each) for each in names}
        assert stored[name] - int.from_bytes(versions[-4:] or confirmed[name].to_bytes(4, "big"), "big") in (0, 1)
        assert all(stored[each] >= confirmed[each] for each in names)
        confirmed[name] = stored[name]
    for process, told in processes.values():
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(told)
    update(folder, config)
    return num_updates, num_kills


def test_concurrent_updates_that_are_killed_lose_nothing(tmp_path: Path, config: CogVideoConfig) -> None:
    """Guards two stages that finish at the same time: each must not overwrite the other's weights with the bundle it
    read earlier. Meanwhile, readers always see a whole bundle."""
    hammer(tmp_path, config, UPDATED, KILLED, seed=5)
    names = ("base", "sequential", "interpolation", "superres")
    assert {each.split(".")[0].split("-")[0] for each in names_in(tmp_path)} == {*names, "bundle"}
    assert len(names_in(tmp_path)) == len(names) + 1


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="gives up the rights of root")
def test_a_folder_that_cannot_be_written_is_named(folder: Path, config: CogVideoConfig, parts: dict[str, Any]) -> None:
    """Guards against the lock's traceback, or an endless wait for it, if the bundle belongs to somebody else."""
    folder.chmod(0o555)
    (folder / LOCK).chmod(0o444)
    for parent in folder.parents[:3]:
        parent.chmod(0o755)
    process = os.fork()
    if not process:
        status = 1
        try:
            os.setuid(65534)
            update(folder, config, base=parts["base"])
        except PermissionError as error:
            status = 0 if error.filename == str(folder) and error.strerror == "Permission denied" else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    assert_whole(folder, parts)


def test_what_was_replaced_meanwhile_is_said(
    folder: Path, config: CogVideoConfig, parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards a model opened before an update against silently loading other weights, or calling the new bundle damaged,
    even if the update comes between safetensors and PyTorch opening a file."""
    model = CogVideo.from_pretrained(folder)
    update(folder, config, base=versioned(config, "base", 1), superres=versioned(config, "superres", 1))
    with pytest.raises(ValueError, match=r"base of the bundle .* was replaced: load the bundle again"):
        _ = model.base
    update(folder, config, superres=versioned(config, "superres", 2))  # reuses the file name that became free
    with pytest.raises(ValueError, match=r"superres of the bundle .* was replaced"):
        model.component("superres")
    assert_same(model.component("sequential"), parts["sequential"])
    model, from_file = CogVideo.from_pretrained(folder), torch.UntypedStorage.from_file

    def late(*arguments: Any, **settings: Any) -> Any:
        monkeypatch.undo()
        update(folder, config, sequential=versioned(config, "sequential", 1))
        return from_file(*arguments, **settings)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", staticmethod(late))
    with pytest.raises(ValueError, match=r"sequential of the bundle .* was replaced"):
        model.component("sequential")


def test_a_file_that_is_replaced_while_it_is_checked(
    folder: Path, config: CogVideoConfig, parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards readers against a traceback if an update removes a file between two looks at it."""
    stat, old = Path.stat, file_of(folder, Manifest.read(folder).components["sequential"])

    def late(path: Path, **options: Any) -> os.stat_result:
        found = stat(path, **options)
        if path == old:
            monkeypatch.undo()
            update(folder, config, sequential=versioned(config, "sequential", 1))
        return found

    monkeypatch.setattr(Path, "stat", late)
    assert stored_version(folder, "sequential") == 1
    assert not old.exists()


def test_failed_first_save_leaves_no_bundle(
    config: CogVideoConfig, parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a folder that loads with half of its weights, and an error that names neither file nor reason."""

    def full(tensors: object, path: Path) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(OSError, match=r"cannot write base \(No space left on device\): .*base.safetensors"):
        CogVideo(config, **parts).save_pretrained(tmp_path / "model")
    assert not names_in(tmp_path / "model")


def test_a_full_disk_names_the_text_tokenizer(config: CogVideoConfig, parts: dict[str, Any], tmp_path: Path) -> None:
    """Checks that the error for a full disk names the file."""
    with full_disk(100), pytest.raises(OSError, match=r"File too large: .*text\.model"):
        CogVideo(config, text=parts["text"]).save_pretrained(tmp_path)


def test_what_does_not_fit_is_not_saved(folder: Path, config: CogVideoConfig, parts: dict[str, Any]) -> None:
    """Guards against bundles that can never be loaded: packed weights, other sizes or templates, a file as folder."""
    model = CogVideo.from_pretrained(folder)
    wide = replace(config, transformer=replace(config.transformer, hidden=32))
    with pytest.raises(ValueError, match=r"the model does not fit the configuration as base: wrong shapes"):
        CogVideo(wide, base=model.base).save_pretrained(folder)
    packed = randomized(Base(replace(config.transformer, hidden=256)), 1)
    pack(packed)
    if any(isinstance(each, PackedLinear) for each in packed.modules()):
        wide = replace(config, transformer=packed.config)
        with pytest.raises(ValueError, match=r"as base: missing tensors"):
            CogVideo(wide, base=packed).save_pretrained(folder)
    other = replace(config, text=TextConfig(image_template="{caption}!"))
    with pytest.raises(ValueError, match=r"text has TextConfig.*expected TextConfig"):
        CogVideo(other, text=parts["text"]).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"base.safetensors is a file, expected a folder"):
        CogVideo(config, **parts).save_pretrained(folder / "base.safetensors")
    assert_whole(folder, parts)


# Memory

MEASURE = """
import sys, torch
from dataclasses import replace
from pathlib import Path
from cogvideo.bundle.model import CogVideo, update
from cogvideo.config import preset
from cogvideo.models.transformer import Base

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

dtype = {"none": None, "float32": torch.float32}[sys.argv[2]]
with torch.device("meta"):
    Base(preset("pocket").transformer)  # PyTorch imports what it needs for this
Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
before = status("VmHWM")
model = CogVideo.from_pretrained(sys.argv[1], dtype=dtype)
weights = [*model.base.parameters()]
for weight in weights:
    weight.view(torch.uint8).amax()  # every page of every weight
print((status("VmHWM") - before) / sum(weight.nbytes for weight in weights), sum(weight.nbytes for weight in weights))
"""


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundle with a base in float16, 230 MB."""
    config = replace(CogVideoConfig(), transformer=TransformerConfig(num_layers=16, hidden=768, num_heads=12))
    with torch.device("meta"):
        base = Base(config.transformer).half()
    base.to_empty(device="cpu")
    for parameter in base.parameters():
        parameter.data.view(torch.int16).random_(0, 1 << 14)
    folder = tmp_path_factory.mktemp("large")
    CogVideo(config, base=base).save_pretrained(folder)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["none", "float32"])
def test_peak_memory_of_loading(large_folder: Path, dtype: str) -> None:
    """Guards against three copies of the weights in host memory, which got users' processes killed.

    Measured in a fresh process: peak resident memory while a base is loaded and every weight is read once, including
    pages of the memory-mapped file, minus memory after all imports, divided by the size of the loaded weights.
    """
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(large_folder), dtype], capture_output=True, text=True, check=True
    )
    ratio, num_bytes = (float(value) for value in run.stdout.split())
    assert num_bytes > 2e8
    assert 0.8 < ratio < 1.2


OLD = Path(__file__).parent / "files"


def test_a_bundle_and_a_sidecar_of_the_first_format(tmp_path: Path) -> None:
    """Checks files that version 0.1.0 wrote in November 2026: they load, and the sidecar reproduces the same codes."""
    shutil.copytree(OLD, tmp_path / "old")
    model = CogVideo.from_pretrained(tmp_path / "old/model-1")
    assert sorted(model.components) == sorted(each for each in COMPONENTS if not each.endswith("_base"))
    assert (model.config.transformer.hidden, model.config.interpolation.window) == (8, 2)
    sidecar, output = tmp_path / "old/clip.json", tmp_path / "new"
    assert main(["generate", "--from-sidecar", str(sidecar), "--output", str(output)]) == 0
    (made,) = output.glob("*.json")
    before, after = (json.loads(path.read_text()) for path in (sidecar, made))
    assert (after["codes"], after["bundle"]) == (before["codes"], before["bundle"])
