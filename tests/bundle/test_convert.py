"""Converting released checkpoints to bundles, with small folders in the released format, intact and broken."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cogvideo.bundle.convert import convert, released_autoencoder_names
from cogvideo.bundle.model import CogVideo
from cogvideo.cli import main
from cogvideo.config import AutoencoderConfig, CogVideoConfig, TextConfig, TransformerConfig, preset
from cogvideo.layout import SequenceLayout
from cogvideo.models.autoencoder import Autoencoder
from cogvideo.models.plans import full_pass
from cogvideo.text import TextTokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
NUM_CODES = 200
STAGES = ("stage1", "stage2", "dsr")
BASE_SEED = 7
SETTINGS = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "tokenizer_type": "icetk",
    "image_length": 400,
}
AUTOENCODER = AutoencoderConfig(
    channels=8,
    encoder_multipliers=(1, 2),
    encoder_blocks=1,
    decoder_multipliers=((1, 1, 1, 2), (1, 1, 2), (1, 2)),
    embedding_dim=16,
    num_codes=NUM_CODES,
    num_downsamplers=2,
    rate=4,
    groups=4,
    nominal_resolution=32,
    attention_resolution=8,
)

Tensors = dict[str, Tensor]


@cache
def golden_weights() -> Any:
    spec = importlib.util.spec_from_file_location("golden_weights", GOLDEN / "weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def _released(kind: str, seed: int) -> Tensors:
    shapes = json.loads((GOLDEN / f"state_dict_shapes_{kind}.json").read_text())
    base = golden_weights().weights({name: shapes[name] for name in shapes if "mixins" not in name}, BASE_SEED)
    added = golden_weights().weights({name: shapes[name] for name in shapes if "mixins" in name}, seed)
    return {name: torch.from_numpy(value) for name, value in (base | added).items()}


def released(stage: str) -> Tensors:
    """Small float16 tensors of a released stage; all stages share their base."""
    kind = "dsr" if stage == "dsr" else "cogvideo"
    return {name: value.half() for name, value in _released(kind, BASE_SEED + STAGES.index(stage)).items()}


def released_tokenizer() -> Tensors:
    """Image tokenizer, including the running averages that training left in it."""
    with torch.device("meta"):
        ours = Autoencoder(AUTOENCODER).state_dict()
    shapes = {name: list(ours[mine].shape) for name, mine in released_autoencoder_names(AUTOENCODER).items()}
    tensors = {name: torch.from_numpy(value) for name, value in golden_weights().vqvae_weights(shapes, 7).items()}
    averages = {"quantize.cluster_size": torch.ones(NUM_CODES), "quantize.embed_avg": torch.ones(16, NUM_CODES)}
    return tensors | averages


@dataclass
class Download:
    """Folders and files as users download them; tests change them before `write`."""

    root: Path
    stages: dict[str, Tensors]
    tokenizer: Tensors | None
    text_model: bytes
    labels: Any = field(default_factory=lambda: np.arange(NUM_CODES, dtype=np.int32) // 7)
    settings: dict[str, Any] = field(default_factory=lambda: dict(SETTINGS))

    def write(self) -> dict[str, Path]:
        """Write everything, and return the arguments of `convert`."""
        given = {stage: self.write_stage(stage, tensors) for stage, tensors in self.stages.items()}
        if self.tokenizer is not None:
            given["ice"] = self.root / "ice"
            given["ice"].mkdir()
            torch.save({"module": self.tokenizer}, given["ice"] / "ice_image.pt")
            (given["ice"] / "ice_text.model").write_bytes(self.text_model)
            given["clusters"] = self.root / "cluster_label2.npy"
            np.save(given["clusters"], self.labels)
        return given

    def write_stage(self, stage: str, tensors: Tensors) -> Path:
        folder = self.root / stage
        (folder / "27500").mkdir(parents=True)
        (folder / "latest").write_text("27500\n")
        (folder / "model_config.json").write_text(json.dumps(self.settings))
        torch.save({"module": tensors}, folder / "27500" / "mp_rank_00_model_states.pt")
        return folder


@pytest.fixture
def download(tmp_path: Path, text_model: bytes) -> Download:
    """Everything that was released."""
    return Download(tmp_path, {stage: released(stage) for stage in STAGES}, released_tokenizer(), text_model)


@pytest.fixture(scope="module")
def config(text_model: bytes) -> CogVideoConfig:
    """Released layout, small sizes, and the tokens of a small text model."""
    text = TextTokenizer(text_model, TextConfig(), NUM_CODES)
    transformer = TransformerConfig(4, 64, 4, 600, NUM_CODES, text.start_of_image, text.pad, 1024)
    return replace(preset("cogvideo"), transformer=transformer, autoencoder=AUTOENCODER)


BASE_NAMES = {
    "words.weight": "word_embeddings.weight",
    "positions.weight": "position_embeddings.weight",
    "norm.weight": "final_layernorm.weight",
    "norm.bias": "final_layernorm.bias",
}
BLOCK_NAMES = {
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "norm3": "third_layernorm",
    "norm4": "fourth_layernorm",
    "qkv": "attention.query_key_value",
    "out": "attention.dense",
    "mlp_in": "mlp.dense_h_to_4h",
    "mlp_out": "mlp.dense_4h_to_h",
}
ADDED_NAMES = {"qkv": "query_key_value", "out": "dense", "gate": "attn_distribution"}


def base_name(ours: str) -> str:
    """Released name of a base parameter: the inverse of the table under test."""
    if ours in BASE_NAMES:
        return f"transformer.{BASE_NAMES[ours]}"
    _, layer, part, kind = ours.split(".")
    return f"transformer.layers.{layer}.{BLOCK_NAMES[part]}.{kind}"


def added_name(ours: str) -> str:
    """Released name of a parameter that a stage adds."""
    if ours == "positions.weight":
        return "mixins.extra_position_embedding.position_embeddings.weight"
    _, layer, part, *kind = ours.split(".")
    return ".".join(["mixins.attention_plus", ADDED_NAMES[part], layer, *kind])


def assert_is(module: torch.nn.Module, tensors: Tensors, name: Callable[[str], str]) -> None:
    """Check that the module's parameters are the released tensors, in the released dtype."""
    for ours, parameter in module.state_dict().items():
        assert parameter.dtype == tensors[name(ours)].dtype
        assert torch.equal(parameter, tensors[name(ours)]), ours


# Everything released is converted


def test_everything_released(download: Download, config: CogVideoConfig, tmp_path: Path) -> None:
    """Catches tensors that are swapped, changed, or lost on the way, and a base stored once per stage."""
    conversion = convert(tmp_path / "out", **download.write(), config=config)
    names = ("base", "sequential", "interpolation", "superres", "image_tokenizer", "cluster_labels", "text")
    assert conversion == (names, {})
    model = CogVideo.from_pretrained(tmp_path / "out")
    assert model.config == config
    assert model.components == names
    channels = (model.sequential.channel, model.interpolation.channel, model.upscaler.channel)
    for stage, channel in zip(STAGES, channels, strict=True):
        assert_is(channel, download.stages[stage], added_name)
    assert_is(model.base, download.stages["stage1"], base_name)
    tokenizer, table = model.autoencoder.state_dict(), released_autoencoder_names(AUTOENCODER)
    assert tokenizer.keys() == set(table.values())
    assert all(torch.equal(tokenizer[ours], download.tokenizer[name]) for name, ours in table.items())
    assert model.cluster_labels.tolist() == download.labels.tolist()
    assert model.text.model == download.text_model


@torch.inference_mode()
def test_the_released_logits(tmp_path: Path) -> None:
    """Catches errors in the name table itself: the bundle's model must compute the same logits as the released one."""
    case = load_file(GOLDEN / "train_stage1_full.safetensors")
    tensors = {name: torch.from_numpy(value) for name, value in golden_weights().weights(_shapes(), 7).items()}
    given = Download(tmp_path, {"stage1": tensors}, None, b"").write()
    transformer = TransformerConfig(4, 64, 4, 600, 512, 513, 0, 1024)
    autoencoder = replace(AUTOENCODER, num_codes=512)
    config = replace(preset("cogvideo"), transformer=transformer, autoencoder=autoencoder)
    convert(tmp_path / "out", **given, config=config)
    model = CogVideo.from_pretrained(tmp_path / "out", dtype=torch.float64).sequential
    layout, mask = SequenceLayout.sequential(config.layout), case["text_mask"].bool()
    plan = full_pass(layout, 0, mask, torch.float64, layout.num_frames)
    hidden = model(case["tokens"].long(), case["position_ids"].long(), plan)[:, layout.text_slots :]
    logits = model.base.logits(hidden[:, case["probe"].long()])
    torch.testing.assert_close(logits, case["logits"].double(), rtol=0, atol=1e-4)


def _shapes() -> dict[str, list[int]]:
    return json.loads((GOLDEN / "state_dict_shapes_cogvideo.json").read_text())


def test_sizes_follow_from_the_checkpoints(tmp_path: Path) -> None:
    """Guards users without a configuration: layers, widths, and heads are inferred, the rest is as released."""
    shapes = {"transformer.word_embeddings.weight": [150_010, 8]}
    shapes |= {name: shape for name, shape in small_shapes(hidden=8, num_layers=2).items() if name not in shapes}
    tensors = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}
    given = Download(tmp_path, {"stage1": tensors}, None, b"", settings={"num_attention_heads": 2}).write()
    convert(tmp_path / "out", **given)
    expected = replace(preset("cogvideo").transformer, num_layers=2, hidden=8, num_heads=2)
    assert CogVideo.from_pretrained(tmp_path / "out").config == replace(preset("cogvideo"), transformer=expected)


def small_shapes(hidden: int, num_layers: int, vocab_size: int = 600) -> dict[str, list[int]]:
    """The golden shapes, scaled to another width and depth."""
    golden, shapes = _shapes(), {}
    for name, shape in golden.items():
        if ".0." in name or name.endswith(".0"):
            for layer in range(num_layers):
                other = name.replace(".0.", f".{layer}.") if ".0." in name else f"{name[:-1]}{layer}"
                shapes[other] = [size * hidden // 64 for size in shape]
        elif not any(f".{layer}." in name or name.endswith(f".{layer}") for layer in (1, 2, 3)):
            shapes[name] = [size * hidden // 64 if size == 64 else size for size in shape]
    return shapes | {"transformer.word_embeddings.weight": [vocab_size, hidden]}


@pytest.mark.parametrize("stage", STAGES)
def test_one_folder_alone(download: Download, config: CogVideoConfig, tmp_path: Path, stage: str) -> None:
    """Checks conversion for users with only one of the folders, whichever it is: its base becomes the base."""
    download.stages, download.tokenizer = {stage: download.stages[stage]}, None
    convert(tmp_path / "out", **download.write(), config=config)
    model = CogVideo.from_pretrained(tmp_path / "out")
    component = {"stage1": "sequential", "stage2": "interpolation", "dsr": "superres"}[stage]
    assert model.components == ("base", component)
    assert_is(model.base, download.stages[stage], base_name)


def test_tokenizers_alone(download: Download, config: CogVideoConfig, tmp_path: Path) -> None:
    """Checks that tokenizers can be converted without any stage."""
    download.stages = {}
    convert(tmp_path / "out", **download.write(), config=config)
    assert CogVideo.from_pretrained(tmp_path / "out").components == ("image_tokenizer", "cluster_labels", "text")


def test_nothing_to_convert(tmp_path: Path) -> None:
    """Guards against an empty bundle in place of an error; labels alone are not a model."""
    with pytest.raises(ValueError, match="nothing to convert, expected at least one of stage1, stage2, dsr, ice"):
        convert(tmp_path / "out", clusters=tmp_path / "labels.npy")
    assert not (tmp_path / "out").exists()


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against missing options, and against asking users for a configuration."""
    given = Download(tmp_path, {"stage1": released("stage1")}, None, b"").write()
    assert main(["convert", str(tmp_path / "out"), "--stage1", str(given["stage1"])]) == 2
    assert "num_codes 20000 is larger than vocab_size 600" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    shown = capsys.readouterr().out
    assert all(f"--{option}" in shown for option in (*STAGES, "ice", "clusters"))
    assert "config" not in shown


# Bases


def test_bases_that_differ_are_kept(download: Download, config: CogVideoConfig, tmp_path: Path) -> None:
    """Guards against silently running a stage with a base it was not trained on."""
    changed = {
        "transformer.layers.2.mlp.dense_h_to_4h.bias": (5, 0.25),
        "transformer.position_embeddings.weight": ((1000, 3), 2.0),
    }
    for name, (index, change) in changed.items():
        download.stages["stage2"][name][index] = download.stages["stage1"][name][index] + change
    conversion = convert(tmp_path / "out", **download.write(), config=config)
    differing = conversion.differing["interpolation"]
    assert list(differing) == ["positions.weight", "blocks.2.mlp_in.bias"]
    assert list(differing.values()) == pytest.approx([2.0, 0.25], rel=1e-2)
    assert conversion.differing.keys() == {"interpolation"}
    model = CogVideo.from_pretrained(tmp_path / "out")
    assert model.components[-1] == "text"
    assert "interpolation_base" in model.components
    assert_is(model.interpolation.base, download.stages["stage2"], base_name)
    assert_is(model.sequential.base, download.stages["stage1"], base_name)
    assert model.upscaler.base is model.base
    printed = conversion.summary()
    assert "interpolation keeps its own base: 2 tensors differ" in printed
    assert "blocks.2.mlp_in.bias: by at most 0.25" in printed


def test_a_difference_anywhere_is_found(download: Download, config: CogVideoConfig, tmp_path: Path) -> None:
    """Guards against comparing only the first chunk of a large tensor, and against treating NaN as equal."""
    word_embeddings = "transformer.word_embeddings.weight"
    download.stages["stage2"][word_embeddings][-1, -1] += 1
    download.stages["dsr"][word_embeddings][300, 7] = torch.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cogvideo.bundle.convert.COMPARED_AT_ONCE", 1000)
        differing = convert(tmp_path / "out", **download.write(), config=config).differing
    assert differing["interpolation"] == pytest.approx({"words.weight": 1.0}, rel=1e-2)
    assert np.isnan(differing["superres"]["words.weight"])


# Strict in both directions


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("transformer.layers.3.mlp.dense_4h_to_h.bias"),
            r"missing transformer.layers.3.mlp.*bias; unk",
        ),
        (lambda t: t.pop("mixins.attention_plus.dense.0.weight"), r"missing mixins.attention_plus.dense.0.weight; unk"),
        (lambda t: t.update({"mixins.more": torch.zeros(1)}), r"missing none; unknown mixins.more"),
        (
            lambda t: t.update({"transformer.layers.4.input_layernorm.bias": torch.zeros(64)}),
            r"unknown transformer.lay",
        ),
        (
            lambda t: t.update({"transformer.final_layernorm.bias": torch.zeros(65)}),
            r"norm.bias \(65,\), expected \(64",
        ),
        (
            lambda t: t.update({"transformer.final_layernorm.bias": torch.zeros(64).int()}),
            r"torch.int32, expected float",
        ),
        (
            lambda t: t.update({"transformer.final_layernorm.bias": None}),
            r"entries that are not tensors: transformer.final_layern",
        ),
    ],
)
def test_other_tensors_are_refused(
    download: Download,
    config: CogVideoConfig,
    tmp_path: Path,
    stage: str,
    change: Callable[[Tensors], object],
    message: str,
) -> None:
    """Guards against a checkpoint of another model, part of which would be ignored or left uninitialized."""
    change(download.stages[stage])
    with pytest.raises(ValueError, match=rf"{stage}/27500/mp_rank_00_model_states.pt .*{message}"):
        convert(tmp_path / "out", **download.write(), config=config)
    assert not (tmp_path / "out").exists()


def test_gates_belong_to_video_stages(download: Download, config: CogVideoConfig, tmp_path: Path) -> None:
    """Checks that super-resolution may contain gates, which it does not use, and that a video stage must have them."""
    gates = {name: tensor for name, tensor in download.stages["stage1"].items() if "attn_distribution" in name}
    download.stages["dsr"] |= gates
    assert "superres" in convert(tmp_path / "out", **download.write(), config=config).components
    for name in gates:
        del download.stages["stage2"][name]
    others = Download(tmp_path / "others", {"stage2": download.stages["stage2"]}, None, b"").write()
    with pytest.raises(ValueError, match=r"missing mixins.attention_plus.attn_distribution.0, .* and 1 more; unknown"):
        convert(tmp_path / "out", **others, config=config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("quantize.embed.weight"),
            r"ice_image.pt does not have the tensors.* missing quantize.embed.weight",
        ),
        (
            lambda t: t.update({"loss.weight": torch.zeros(1)}),
            r"ice_image.pt does not have the tensors.* unknown loss.weight",
        ),
        (
            lambda t: t.update({"quantize.proj.bias": torch.zeros(3)}),
            r"ice_image.pt does not fit .*project.bias \(3,\)",
        ),
    ],
)
def test_other_tokenizers_are_refused(
    download: Download, config: CogVideoConfig, tmp_path: Path, change: Callable[[Tensors], object], message: str
) -> None:
    """Guards against other tokenizers in the same way; only the codebook's running averages may be dropped."""
    download.stages = {}
    assert download.tokenizer is not None
    change(download.tokenizer)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "out", **download.write(), config=config)


# Broken folders

STATES = "27500/mp_rank_00_model_states.pt"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "latest").unlink(), r"cannot read .*latest: No such file"),
        (lambda f: (f / "latest").write_text("30000"), r"there is no file .*30000/mp_rank_00_model_states.pt"),
        (lambda f: (f / STATES).rename(f / "27500" / "model.pt"), r"there is no file .*27500/mp_rank_00_model_states"),
        (
            lambda f: (f / "27500/mp_rank_01_model_states.pt").touch(),
            r"split into 2 files, expected only mp_rank_00.* merge",
        ),
        (lambda f: (f / "model_config.json").unlink(), r"cannot read .*model_config.json: No such file"),
        (lambda f: (f / "model_config.json").write_text("{"), r"cannot read .*model_config.json: Expecting"),
        (lambda f: (f / "model_config.json").write_text("[]"), r"num_attention_heads is None in .*model_config.json"),
        (lambda f: (f / "model_config.json").write_text('{"num_attention_heads": "4"}'), r"num_attention_heads is '4'"),
        (lambda f: torch.save({"model": {}}, f / STATES), r"has no table 'module'"),
        (lambda f: torch.save([1], f / STATES), r"has no table 'module'"),
        (lambda f: torch.save({"module": {}}, f / STATES), r"has no matrix transformer.position_embeddings.weight, "),
        (lambda f: (f / STATES).write_bytes(b"<html>not found</html>"), r"cannot read .*mp_rank_00_model_states.pt: "),
        (lambda f: os.truncate(f / STATES, 5000), r"cannot read .*mp_rank_00_model_states.pt: "),
    ],
)
def test_broken_folders(tmp_path: Path, change: Callable[[Path], object], message: str) -> None:
    """Guards against tracebacks for interrupted downloads and archives with another layout."""
    folder = Download(tmp_path, {"stage1": released("stage1")}, None, b"").write()["stage1"]
    change(folder)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "out", stage1=folder)
    assert not (tmp_path / "out").exists()


class Code:
    """Payload of a malicious pickle: a call that is made when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, int]]:
        return os.mkdir, (str(self.path), 0o777)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    """Guards the machine against checkpoints that run code, since they may come from untrusted mirrors."""
    folder = Download(tmp_path, {"stage1": released("stage1")}, None, b"").write()["stage1"]
    torch.save({"module": released("stage1"), "more": Code(tmp_path / "owned")}, folder / STATES)
    with pytest.raises(
        ValueError, match=r"cannot read .*: it holds more than tensors and numbers, and may contain code"
    ):
        convert(tmp_path / "out", stage1=folder)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("missing", ["ice_image.pt", "ice_text.model"])
def test_missing_tokenizer_files(download: Download, config: CogVideoConfig, tmp_path: Path, missing: str) -> None:
    """Catches half a tokenizer, and guards the existing bundle, which must survive the attempt."""
    convert(tmp_path / "out", **download.write(), config=config)
    (tmp_path / "ice" / missing).unlink()
    with pytest.raises(ValueError, match=rf"cannot read .*{missing}: No such file"):
        convert(tmp_path / "out", ice=tmp_path / "ice", config=config)
    assert len(CogVideo.from_pretrained(tmp_path / "out").components) == 7


def test_text_model_of_another_vocabulary(download: Download, config: CogVideoConfig, tmp_path: Path) -> None:
    """Guards against a text model whose tokens are not those that the transformer was trained with."""
    other = replace(config, transformer=replace(config.transformer, pad=0))
    with pytest.raises(ValueError, match=r"ice_text.model does not fit .*: pad is 0 in the transformer, expected 203"):
        convert(tmp_path / "out", ice=download.write()["ice"], config=other)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.arange(NUM_CODES - 1), r"cluster_label2.npy does not fit .*labels \(199,\), expected \(200,\)"),
        (np.zeros((NUM_CODES, 1), dtype=np.int64), r"labels \(200, 1\), expected \(200,\)"),
        (np.zeros(NUM_CODES), r"cluster_label2.npy is not an array of integers"),
        (np.arange(NUM_CODES) - 1, r"labels lie in \[-1, 198\], expected \[0, 200\)"),
        (np.array([Code(Path("/nonexistent/code"))] * NUM_CODES), r"cannot read .*cluster_label2.npy: .*pickle"),
    ],
)
def test_refused_labels(
    download: Download, config: CogVideoConfig, tmp_path: Path, labels: np.ndarray, message: str
) -> None:
    """Guards against labels of another tokenizer, and against pickles, which may run code."""
    download.stages, download.labels = {}, labels
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "out", **download.write(), config=config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_layers": 5}, r"num_layers is 5 in .*stage1/model_config.json, expected 4"),
        ({"hidden_size": 128}, r"hidden_size is 128 in .*, expected 64"),
        ({"num_attention_heads": 8}, r"num_attention_heads is 8 in .*, expected 4"),
    ],
)
def test_settings_that_contradict_the_tensors(
    download: Download, config: CogVideoConfig, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    """Guards against a wrong number of heads, which silently changes results, and files that lack layers."""
    download.settings |= settings
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "out", **download.write(), config=config)


def test_stages_of_different_models(tmp_path: Path) -> None:
    """Guards against folders of different models, the last of which would determine the configuration."""
    stages = {}
    for stage, num_layers in (("stage1", 1), ("stage2", 2)):
        shapes = small_shapes(hidden=4, num_layers=num_layers, vocab_size=150_010)
        stages[stage] = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}
    given = Download(tmp_path, stages, None, b"", settings={"num_attention_heads": 2}).write()
    with pytest.raises(ValueError, match=r"expected checkpoints of one model, .*num_layers=1.*num_layers=2"):
        convert(tmp_path / "out", **given)


# Memory

MEASURE = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from cogvideo.config import TransformerConfig, preset
from cogvideo.bundle.convert import convert
from cogvideo.models.transformer import Base

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

root = Path(sys.argv[1])
config = preset("cogvideo")
transformer = TransformerConfig(12, 512, 4, 600, 512, start_of_image=513, pad=0, num_positions=1024)
config = replace(config, transformer=transformer, autoencoder=replace(config.autoencoder, num_codes=512))
with torch.device("meta"):
    Base(preset("pocket").transformer)  # PyTorch imports what it needs for this
Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
before = status("VmHWM")
convert(root / "out", stage1=root / "stage1", stage2=root / "stage2", config=config)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("bases", ["equal", "different"])
def test_peak_memory(tmp_path: Path, bases: str) -> None:
    """Guards against two released files in host memory at once: 30 GB where 16 GB must do.

    Measured in a fresh process: peak resident memory while two stages are converted, including pages of memory-mapped
    files, minus memory after all imports. It may be one file's size plus a fixed 96 MiB (PyTorch's threads).
    """
    stages = {}
    for stage in ("stage1", "stage2"):
        shapes = small_shapes(hidden=512, num_layers=12)
        fill = 1.0 if bases == "equal" or stage == "stage1" else 2.0
        stages[stage] = {name: torch.full(shape, fill, dtype=torch.float16) for name, shape in shapes.items()}
    Download(tmp_path, stages, None, b"", settings={"num_attention_heads": 4}).write()
    run = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    size = (tmp_path / "stage1" / STATES).stat().st_size
    assert size > 1e8
    assert (len(list((tmp_path / "out").glob("*base*"))) == 2) == (bases == "different")
    assert size / 2 < int(run.stdout.splitlines()[-1]) < size + 3 * 2**25
