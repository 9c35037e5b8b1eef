"""The moving codebook: k-means initialization, running averages of each code's vectors, restarts of dead codes.

VQ-VAE (arXiv 1711.00937, appendix A.1); restarts as in Jukebox (arXiv 2005.00341, section 3).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from cogvideo.models.quantizer import Codebook, cluster_codes


class MovingCodebook(nn.Module):
    """Running sums of the vectors assigned to each code; the code's row is their mean.

    A code whose running count falls below `restart_below` times an even share is dead: its row becomes a random
    vector of the step, and its count an even share, so that it has time to settle.
    """

    def __init__(self, codebook: Codebook, decay: float, restart_below: float) -> None:
        super().__init__()
        self.decay = decay
        self.restart_below = restart_below
        self.rows = nn.Buffer(codebook.embedding.detach())  # the same memory
        self.counts = nn.Buffer(torch.ones_like(self.rows[:, 0]))
        self.sums = nn.Buffer(self.rows.clone())

    @torch.no_grad()
    def start(self, vectors: Float[Tensor, "many embedding"], per_step: int, generator: torch.Generator) -> None:
        """Initialize the rows by k-means of at least as many vectors; `per_step` vectors come in each step."""
        labels = cluster_codes(vectors, len(self.counts), generator)
        counts, sums = totals(vectors, labels, len(self.counts))
        rows = sums / counts[:, None]  # k-means leaves no cluster empty
        self.counts.copy_(counts * (per_step / len(vectors)))
        self.sums.copy_(rows * self.counts[:, None])
        self.rows.copy_(rows)

    @torch.no_grad()
    def take_up(self, per_step: int) -> None:
        """Continue from the current rows, as if used evenly so far; `per_step` vectors come in each step."""
        self.counts.fill_(per_step / len(self.counts))
        self.sums.copy_(self.rows * self.counts[:, None])

    @torch.no_grad()
    def update(
        self, vectors: Float[Tensor, "many embedding"], codes: Int64[Tensor, " many"], generator: torch.Generator
    ) -> Int64[Tensor, ""]:
        """Move the rows toward the vectors assigned to them; returns the number of restarted codes.

        The generator is on the CPU, whatever the device.
        """
        counts, sums = totals(vectors, codes, len(self.counts))
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        even = len(vectors) / len(self.counts)
        dead = self.counts < self.restart_below * even
        # every code draws a vector, only dead ones take it: this avoids a device synchronization
        drawn = torch.randint(len(vectors), (len(dead),), generator=generator).to(vectors.device, non_blocking=True)
        self.counts.masked_fill_(dead, even)
        self.sums.copy_(torch.where(dead[:, None], vectors[drawn] * even, self.sums))
        self.rows.copy_(self.sums / self.counts[:, None])
        return dead.sum()


def totals(
    vectors: Float[Tensor, "many embedding"], codes: Int64[Tensor, " many"], num_codes: int
) -> tuple[Float[Tensor, " codes"], Float[Tensor, "codes embedding"]]:
    """Number and sum of the vectors of each code."""
    counts = vectors.new_zeros(num_codes).index_add_(0, codes, vectors.new_ones(len(codes)))  # unlike bincount, no wait
    return counts, vectors.new_zeros(num_codes, vectors.shape[1]).index_add_(0, codes, vectors)


def straight_through(
    features: Float[Tensor, "batch embedding rows columns"], chosen: Float[Tensor, "batch embedding rows columns"]
) -> Float[Tensor, "batch embedding rows columns"]:
    """`chosen`, whose gradient passes straight through to `features` (arXiv 1711.00937, section 3.2)."""
    return features + (chosen - features).detach()
