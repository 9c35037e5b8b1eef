"""Uploaded pictures and videos, decoded in a separate process with limited memory and time.

`python -m cogvideo.web.uploads FPS SIZE FRAMES MEMORY SECONDS` reads a file from stdin and writes frames to stdout.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import suppress

import numpy as np

from cogvideo.config import InputError, Sides, size_of, size_text
from cogvideo.media.colors import Pixels

MAX_MEMORY = 2 * 2**30
"""Bytes of address space, most of which libraries reserve and never use."""
CPU_SECONDS = 20
"""CPU time, and a third of the wall-clock time."""


def decode(content: bytes, fps: float, size: Sides, max_frames: int) -> Pixels:
    """Frames of a picture or video, as `media.video.read_video` reads them."""
    command = [
        sys.executable,
        "-m",
        "cogvideo.web.uploads",
        *map(str, (fps, size_text(size), max_frames, MAX_MEMORY, CPU_SECONDS)),
    ]
    settings = {name: value for name, value in os.environ.items() if name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH")}
    limits = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, input=content, capture_output=True, timeout=3 * CPU_SECONDS, check=False, env=settings | limits
        )
    except subprocess.TimeoutExpired:
        raise InputError(f"the upload takes more than {3 * CPU_SECONDS} seconds to decode") from None
    if done.returncode == 0:
        return np.load(io.BytesIO(done.stdout), allow_pickle=False)
    if done.returncode == 2:
        raise InputError(f"the upload cannot be used: {done.stderr.decode(errors='replace').strip():.300}")
    raise InputError(f"the upload needs more than {MAX_MEMORY // 2**20} MiB or {CPU_SECONDS} seconds to decode")


def _limit(memory: int, seconds: int) -> None:
    """Limit this process's memory and CPU time, and forbid writing files, if the system can."""
    with suppress(ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def _main(fps: str, size: str, max_frames: str, memory: str, seconds: str) -> int:
    _limit(int(memory), int(seconds))
    from cogvideo.media.video import read_video

    try:
        content = io.BytesIO(sys.stdin.buffer.read())
        video = read_video(content, float(fps), size_of(size), max_frames=int(max_frames))
    except InputError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    found = io.BytesIO()
    np.save(found, video.frames)
    sys.stdout.buffer.write(found.getvalue())
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
