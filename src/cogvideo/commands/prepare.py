"""`cogvideo data prepare`: from captioned clips to shards of codes."""

from __future__ import annotations

from pathlib import Path

from cogvideo.config import require
from cogvideo.data.encoding import PrepareSettings
from cogvideo.data.engines import Machines
from cogvideo.data.prepare import prepare as make_shards
from cogvideo.data.sources import SourceOptions

TOO_MANY_REJECTED = 1
"""Exit status."""


def prepare(
    source: str,
    /,
    out: Path,
    tokenizer: str,
    settings: PrepareSettings = PrepareSettings(),  # noqa: B008  # frozen
    options: SourceOptions = SourceOptions(),  # noqa: B008
    machines: Machines = Machines(),  # noqa: B008
    max_rejected: int = 0,
) -> int:
    """Turn captioned clips into shards of codes. Run an interrupted command again to continue.

    Exit status 1 means that more clips were rejected than allowed; `rejected.csv` lists them with the reasons.

    Args:
        source: Folder of videos with x.txt next to x.mp4, table (CSV, JSONL, Parquet) with the columns file and
            caption, WebDataset tars, or world:NUMBER for clips of the synthetic World.
        out: Folder for the shards.
        tokenizer: Bundle with the image tokenizer: a folder, or its ID on the Hugging Face Hub.
        settings: Encoding settings.
        options: Source options.
        machines: Devices and processes.
        max_rejected: Number of rejected clips to allow; more give exit status 1.
    """
    require(max_rejected >= 0, f"max_rejected is {max_rejected}, expected 0 or more")
    card = make_shards(source, out, tokenizer, settings, options, machines)
    return TOO_MANY_REJECTED if card.num_rejected > max_rejected else 0
