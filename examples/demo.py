"""Three clips on a CPU: run `make demo`, or cell by cell in an editor that supports `# %%`.

usage: python examples/demo.py [OUT] [MODEL]
"""

# %% Load the model in the box, or one from a folder or the Hugging Face Hub.
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from cogvideo.media.images import contact_sheet, write_image
from cogvideo.pipeline import CogVideoPipeline, export_to_video

out = Path(sys.argv[1] if len(sys.argv) > 1 else "out")
model = sys.argv[2] if len(sys.argv) > 2 else "pocket"
pipeline = CogVideoPipeline.from_pretrained(model)
out.mkdir(parents=True, exist_ok=True)

# %% Generate an emoji, a scene of the World, and a clip that continues from the emoji's last frame.
prompts = {
    "emoji": "a yellow face blinks, then opens its mouth into a happy smile, on a light blue background",
    "world": "a big orange star makes two small jumps and flies up like a rocket, taking its time, on a beach",
    "moving-on": "a yellow face sticks out its pink tongue, on a light blue background",
}
image = None
rows = []
with Progress(transient=True, console=Console(stderr=True)) as progress:
    for number, (name, prompt) in enumerate(prompts.items()):
        task = progress.add_task(name, total=33)
        clips = pipeline(
            prompt,
            image if name == "moving-on" else None,
            generator=torch.Generator().manual_seed(number),
            callback=lambda frame, task=task: progress.advance(task),
        )
        # `clips.frames` is (clips, frames, height, width, 3) in order of time.
        path = export_to_video(clips.frames[0], out / f"{name}.mp4", fps=clips.fps)
        print(f"{path}: {prompt}")
        rows.append(clips.frames[0])
        image = clips.frames[0, -1] if name == "emoji" else image

# %% Combine them into one picture.
sheet = out / "contact_sheet.png"
write_image(sheet, contact_sheet(rows, 9, labels=list(prompts.values())))
print(f"{sheet}: all three clips")
