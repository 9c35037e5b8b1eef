"""Published figures on the data sets of the paper, to show next to a model's own."""

from __future__ import annotations

from typing import NamedTuple

TABLE_1 = "CogVideo (arXiv 2205.15868), table 1"
NOTE = (
    "* computed with another network than that of FVD, as CogVideo's first author states "
    "(github.com/zai-org/CogVideo, issue 25): no target to reach. ** real clips replaced by reconstructions by the "
    "tokenizer. Published rows differ in frame rate, windows and number of clips."
)


class Published(NamedTuple):
    """A row of a table."""

    method: str
    fvd: float | None
    inception_score: float | None = None
    source: str = TABLE_1


UCF101 = (
    Published("VideoGPT", None, 24.69),
    Published("DVD-GAN", None, 27.38),
    Published("TGANv2, train split", 1209, 28.87),
    Published("MoCoGAN-HD", 838, 32.36),
    Published("DIGAN, train split", 655, 29.71),
    Published("DIGAN", 577, 32.70),
    Published("TATS-base", 332, 79.28),
    Published("CogVideo *", 626, 50.46),
    Published("CogVideo * **", 545),
    Published("CogVideo, later", 305, 51.11, "Papers with Code; probably the corrected figure"),
)
KINETICS600 = (
    Published("Latent Video Transformer", 224.73),
    Published("Video Transformer", 170),
    Published("DVD-GAN-FP", 69.15),
    Published("TriVD-GAN-FP", 25.74),
    Published("CogVideo *", 109.23),
    Published("CogVideo * **", 59.55),
    Published("Video Diffusion Models", 16.2, source="Video Diffusion Models (arXiv 2204.03458)"),
    Published("MAGVIT-L", 9.9, source="MAGVIT (arXiv 2212.05199)"),
)
