"""`cogvideo convert`."""

from __future__ import annotations

from pathlib import Path

from cogvideo.bundle import convert as room


def convert(
    out: Path,
    /,
    *,
    stage1: Path | None = None,
    stage2: Path | None = None,
    dsr: Path | None = None,
    ice: Path | None = None,
    clusters: Path | None = None,
) -> None:
    """Convert the released checkpoints, or some of them, to a bundle.

    Identical frozen bases are stored once. Host memory stays below the largest file plus its largest tensor.

    Args:
        out: Folder for the bundle; an existing bundle is replaced once the new one is complete.
        stage1: Folder of the sequential stage (`cogvideo-stage1`).
        stage2: Folder of the interpolation stage (`cogvideo-stage2`).
        dsr: Folder of super-resolution (`cogview2-dsr`).
        ice: Folder of the tokenizers, with `ice_text.model` and `ice_image.pt`.
        clusters: File with the cluster of each image code (`cluster_label2.npy`).
    """
    folders = {"sequential": stage1, "interpolation": stage2, "superres": dsr}
    given = {component: folder for component, folder in folders.items() if folder is not None}
    print(room.convert(out, given, ice, clusters).summary())
