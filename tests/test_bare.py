"""Modules that need only PyTorch, numpy, einops, safetensors, jaxtyping and sentencepiece."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

JOB = """
import sys

LACKS = {"av", "rich", "psutil", "docstring_parser", "PIL", "beartype", "pyarrow", "huggingface_hub", "tensorboard"}

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in LACKS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())

import benchmarks.cuda
import benchmarks.decode
import benchmarks.generate
import benchmarks.train
import cogvideo.data.encoding
import cogvideo.data.loader
import cogvideo.pipeline
import cogvideo.training.export
import cogvideo.data.frame_store
import cogvideo.training.objectives.image
import cogvideo.training.launch
import cogvideo.training.objectives.tokenizer
import cogvideo.training.samples
import cogvideo.training.objectives.superres
import cogvideo.training.text
import cogvideo.training.objectives.video
"""


def test_training_and_decoding_need_no_codecs_and_no_terminal() -> None:
    """Guards against imports that make training, decoding or benchmarks need packages such as PyAV and rich."""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", JOB], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
