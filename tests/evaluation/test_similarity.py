"""`cogvideo evaluate text` against a slow oracle, with a small, randomly initialized CLIP model."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from cogvideo.cli import main
from cogvideo.data.engines import Machines
from cogvideo.evaluation.footage import Reading
from cogvideo.evaluation.protocols import PROTOCOLS
from cogvideo.evaluation.similarity import Similarity, is_vit_b32
from cogvideo.media.video import read_video, write_video

FRAMES, LONGEST, SIDE = 3, 12, 32
CAPTIONS = {
    "a.webp": ("a red ball", "it rolls"),
    "b.webp": ("blue", "a very long caption about a cat"),
    "c.webp": ("green tree",),
}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete CLIP model, as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("clip") / "model"
    folder.mkdir()
    tokens = [*ascii_lowercase, *(f"{letter}</w>" for letter in ascii_lowercase), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = {"vocab_size": len(tokens), "max_position_embeddings": LONGEST, "eos_token_id": len(tokens) - 1}
    text |= {"bos_token_id": len(tokens) - 2}
    vision = {"image_size": SIDE, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=sizes | text, vision_config=sizes | vision, projection_dim=16)
    torch.manual_seed(0)
    model = transformers.CLIPModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=LONGEST).save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


def processor() -> Any:
    """The library's own preprocessing, with Pillow."""
    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    return kind(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COGVIDEO_CACHE", str(tmp_path / "cache"))


def clips(folder: Path, seed: int) -> str:
    """A folder of clips that are not square, with a table of captions."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    rows = []
    for name, captions in CAPTIONS.items():
        write_video(folder / name, random.integers(0, 256, (FRAMES + 2, 40, 57, 3), np.uint8), 8)
        rows.append(json.dumps({"file": name, "caption": list(captions)}) + "\n")
    (folder / "captions.jsonl").write_text("".join(rows))
    return str(folder)


@cache
def whole_model(network: Path) -> Any:
    """The complete model."""
    return transformers.CLIPModel.from_pretrained(network).eval()


def oracle(network: Path, file: Path, caption: str) -> float:
    """Mean cosine similarity of a caption and the first frames, by one forward pass of the complete model per frame."""
    model = whole_model(network)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(network)
    tokens = tokenizer(caption)["input_ids"]
    if len(tokens) > LONGEST:
        tokens = [*tokens[: LONGEST - 1], tokens[-1]]
    found = []
    for frame in read_video(file, 8).frames[:FRAMES]:
        pixels = processor()(frame, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            output = model(input_ids=torch.tensor([tokens]), pixel_values=pixels)
        image, text = output.image_embeds[0], output.text_embeds[0]
        found.append((image @ text / image.norm() / text.norm()).item())
    return sum(found) / len(found)


def table(network: Path, folder: str) -> list[list[float]]:
    """Similarities by clip and caption."""
    return [[oracle(network, Path(folder) / name, each) for each in texts] for name, texts in CAPTIONS.items()]


def mean(values: Sequence[Sequence[float]]) -> float:
    """Mean over captions, then over clips."""
    return sum(sum(each) / len(each) for each in values) / len(values)


def run(network: Path, *arguments: object) -> int:
    """Exit status of the command."""
    options = ["--network", network, "--frames", FRAMES, "--device", "cpu", "--workers", 1, *arguments]
    return main(["evaluate", "text", *map(str, options)])


def test_figures_are_those_of_the_whole_model(
    network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checks the protocol: it averages over frames, then captions, then clips. Long captions are truncated and counted.
    Relative matching divides by the similarity of the real clips."""
    made, real = clips(tmp_path / "made", 0), clips(tmp_path / "real", 1)
    path = tmp_path / "figures.json"
    assert run(network, made, "--real", real, "--captions", "all", "--json", path) == 0
    printed = capsys.readouterr().out
    assert "captions cut to the length that CLIP reads: 1" in printed
    assert "CLIPSIM" not in printed
    found = json.loads(path.read_text())
    values = {(each["name"], each["of"]): each for each in found["figures"]}
    expected = {"generated": mean(table(network, made)), "real": mean(table(network, real))}
    for name, value in expected.items():
        figure = values["CLIP similarity (not ViT-B/32)", name]
        assert figure["value"] == pytest.approx(value, abs=1e-6)
        assert figure["interval"][0] < figure["value"] < figure["interval"][1]
        assert figure["clips"] == 3
    ratio = values["relative matching", "generated / real"]["value"]
    assert ratio == pytest.approx(expected["generated"] / expected["real"], abs=1e-5)
    assert abs(expected["generated"] - expected["real"]) > 1e-3
    assert found["sources"]["generated"]["cut"] == 1


def test_one_caption_of_each_clip_counts(network: Path, tmp_path: Path) -> None:
    """Checks the choice of captions: a random one by seed, not always the first."""
    made = clips(tmp_path / "made", 0)
    protocol = replace(PROTOCOLS["tfhub"], clips=9, frames=FRAMES, order="sorted")
    reading = Reading(protocol, caption_columns=("caption",))
    expected = table(network, made)
    chosen = set()
    for seed in range(4):
        measured = Similarity(network, reading, Machines("cpu", workers=1), "random", seed).measure(made)
        for clip, (value, values) in enumerate(zip(measured.similarities[:, 0].tolist(), expected, strict=True)):
            near = [number for number, each in enumerate(values) if abs(each - value) < 1e-6]
            assert len(near) == 1
            chosen.add((clip, near[0]))
    assert chosen == {(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)}


def test_sizes_of_the_network_make_the_name(tmp_path: Path) -> None:
    """Reserves the name CLIPSIM for ViT-B/32: other networks give other figures."""
    for sizes, expected in (({}, True), ({"patch_size": 16}, False), ({"hidden_size": 1008}, False)):
        transformers.CLIPConfig(vision_config=sizes).save_pretrained(tmp_path)
        assert is_vit_b32(tmp_path) is expected


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_models_that_cannot_be_used_are_refused(
    network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refuses incomplete models, which would score with untrained weights; nothing in a model is executed."""
    made = clips(tmp_path / "made", 0)
    trap = tmp_path / "trap"
    tensors = load_file(network / "model.safetensors")

    def refused(name: str, message: str) -> None:
        assert run(tmp_path / name, made) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert message in error
        assert not trap.exists()

    def changed(name: str) -> Path:
        return shutil.copytree(network, tmp_path / name)

    refused("nowhere", "pass the folder of a CLIP model")
    (changed("bare") / "model.safetensors").unlink()
    refused("bare", "has no weights, expected model.safetensors")
    (changed("pickled") / "model.safetensors").unlink()
    (tmp_path / "pickled/pytorch_model.bin").write_bytes(pickle.dumps(Trap(trap)))
    refused("pickled", "cannot use")
    (changed("broken") / "model.safetensors").write_bytes(b"x" * 100)
    refused("broken", "cannot use")
    kept = {name: tensor for name, tensor in tensors.items() if "vision_model.encoder.layers.1" not in name}
    save_file(kept, changed("partial") / "model.safetensors", {"format": "pt"})
    refused("partial", "weights of CLIP, such as vision_model.encoder.layers.1")
    config = json.loads((network / "tokenizer_config.json").read_text())
    (changed("remote") / "code.py").write_text(
        f"from pathlib import Path\nPath({str(trap)!r}).touch()\nTokens = None\n"
    )
    automatic = {"AutoTokenizer": ["code.Tokens", "code.Tokens"], "AutoModel": "code.Tokens"}
    (tmp_path / "remote/tokenizer_config.json").write_text(json.dumps(config | {"auto_map": automatic}))
    run(tmp_path / "remote", made)
    assert not trap.exists()


def test_clips_without_captions_are_refused(network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reports a folder of videos without captions in one line."""
    made = clips(tmp_path / "made", 0)
    (tmp_path / "made/captions.jsonl").unlink()
    assert run(network, made) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
