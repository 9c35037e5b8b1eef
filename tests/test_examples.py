"""The examples, run as readers run them, and as their host programs do."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cogvideo.media.video import read_video
from serving import make_whole_bundle

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.soak
def test_the_demo(tmp_path: Path) -> None:
    """Guards `make demo`: three clips of 33 frames and a contact sheet; the third clip continues the first."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / "demo.py", tmp_path / "out"],
        capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = ["emoji.mp4", "world.mp4", "moving-on.mp4", "contact_sheet.png"]
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [str(tmp_path / "out" / name) for name in names]
    emoji, world, moving = (read_video(tmp_path / "out" / name, 8).frames.astype(int) for name in names[:3])
    assert len(emoji) == len(world) == len(moving) == 33
    distance = [np.abs(moving[0] - frame).mean() for frame in (emoji[-1], world[-1], world[0])]
    assert min(distance) == distance[0]
    with Image.open(tmp_path / "out" / names[3]) as sheet:
        assert sheet.width > 9 * emoji.shape[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, text_model: bytes) -> Path:
    return make_whole_bundle(tmp_path_factory.mktemp("model") / "small", text_model)


class Host:
    """Treats a folder of nodes as ComfyUI does: imported by path, called with named inputs, outputs by position."""

    def __init__(self, folder: Path) -> None:
        spec = spec_from_file_location("custom_nodes.cogvideo", folder / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses need it
        spec.loader.exec_module(module)
        self.nodes: dict[str, Any] = module.NODE_CLASS_MAPPINGS
        assert module.NODE_DISPLAY_NAME_MAPPINGS.keys() == self.nodes.keys()

    def run(self, name: str, /, **connected: Any) -> tuple[Any, ...]:
        """Run a node with the defaults of its widgets; a list of choices defaults to the first."""
        node = self.nodes[name]
        inputs: dict[str, dict[str, Any]] = node.INPUT_TYPES()
        assert inputs.keys() <= {"required", "optional", "hidden"}
        given = {}
        for key, (kind, *more) in inputs["required"].items():
            if isinstance(kind, list):
                given[key] = kind[0]
            elif kind in ("INT", "FLOAT", "STRING", "BOOLEAN"):
                given[key] = more[0]["default"]
        given |= connected
        assert (
            inputs["required"].keys() <= given.keys() <= inputs["required"].keys() | inputs.get("optional", {}).keys()
        )
        outputs = getattr(node(), node.FUNCTION)(**given)
        assert len(outputs) == len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
        return outputs


def test_comfyui_nodes(model: Path) -> None:
    """Guards users of ComfyUI: the nodes fit together, and fit other nodes, which exchange batches of images."""
    host = Host(EXAMPLES / "comfyui")
    (loaded,) = host.run("CogVideoLoad", name=str(model), device="cpu")
    (clip,) = host.run("CogVideoSample", model=loaded, prompt="a cat", rounds=1)
    images, fps = host.run("CogVideoDecode", clip=clip)
    assert (images.shape, images.dtype, fps) == ((9, 32, 32, 3), torch.float32, 2.0)
    assert 0 <= images.min() < images.max() <= 1
    (longer,) = host.run("CogVideoExtend", model=loaded, clip=clip, prompt="a dog")
    more, _ = host.run("CogVideoDecode", clip=longer)
    assert len(more) > 9
    assert torch.equal(longer.made.codes[0, :9], clip.made.codes[0])
    (between,) = host.run(
        "CogVideoSample",
        model=loaded,
        prompt="a cat",
        rounds=0,
        first=images[:1],
        last=images[3:],
        seed=2,
        negative="x",
    )
    ends = loaded.encode([(255 * images[place]).round().byte().numpy() for place in (0, 3)])
    assert torch.equal(between.made.codes[0, [0, 4]], ends)
    (loop,) = host.run("CogVideoSample", model=loaded, prompt="a cat", rounds=0, loop=True)
    assert len(host.run("CogVideoDecode", clip=loop)[0]) == 4


@pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed")
def test_gradio_app(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards Spaces: the app starts as a program, shows frames before the clip, and reports mistakes."""
    from gradio_client import Client, exceptions, handle_file

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    Image.fromarray(np.full((20, 30, 3), 200, np.uint8)).save(tmp_path / "start.png")
    with subprocess.Popen(
        [sys.executable, "-u", EXAMPLES / "gradio_app.py", model], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            address = next(line.split()[-1] for line in lines if line.startswith("* Running on"))
            client = Client(address, verbose=False, download_files=str(tmp_path))
            start = handle_file(str(tmp_path / "start.png"))
            job = client.submit("a cat", start, 1, 7, False, api_name="/generate")
            _, video = job.result(120)
            shown = job.outputs()
            assert len(shown) == 10
            assert [clip is None for _, clip in shown] == [True] * 9 + [False]
            path = video["video"] if isinstance(video, dict) else video
            assert read_video(Path(path), 2).frames.shape == (9, 32, 32, 3)
            with pytest.raises(exceptions.AppError, match="16 fit"):
                client.predict("word " * 50, None, 1, 7, False, api_name="/generate")
        finally:
            process.kill()
