"""A page for a Space on the Hugging Face Hub: as its `app.py`, with cogvideo and gradio in its `requirements.txt`.

usage: python examples/gradio_app.py [MODEL]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
import torch

from cogvideo.config import InputError
from cogvideo.generation.request import Request
from cogvideo.pipeline import CogVideoPipeline, collect, export_to_video

pipeline = CogVideoPipeline.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "pocket", device="auto")


def generate(prompt: str, image: Any, rounds: float, seed: float, loop: bool) -> Iterator[tuple[Any, str | None]]:
    """Show each frame when it is finished, then the clip."""
    try:
        settings = replace(pipeline.settings, rounds=int(rounds))
        given = None if image is None else pipeline.encode([image])
        request = Request([prompt], [torch.Generator().manual_seed(int(seed))], settings, given, loop=loop)
        frames = []
        for frame in pipeline.frames(request):
            frames.append(frame)
            yield frame.pixels[0], None
    except InputError as error:
        raise gr.Error(str(error)) from error
    clip = collect(frames, pipeline.fps(settings))
    with TemporaryDirectory() as folder:  # the page takes a copy
        yield clip.frames[0, 0], export_to_video(clip.frames[0], f"{folder}/clip.mp4", clip.fps)


demo = gr.Interface(
    generate,
    [
        gr.Textbox("a red heart beats, on a white background", label="Prompt", max_length=2000),
        gr.Image(label="First frame"),
        gr.Slider(0, 3, 3, step=1, label="Rounds: 5, 9, 17 or 33 frames"),
        gr.Number(7, label="Seed", precision=0, minimum=0),
        gr.Checkbox(label="Loop"),
    ],
    [gr.Image(label="Latest frame"), gr.Video(label="Clip", autoplay=True, loop=True)],
    title="CogVideo",
    api_name="generate",
)

if __name__ == "__main__":
    demo.launch()
