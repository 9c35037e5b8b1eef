"""The codebook of the image tokenizer: nearest rows, lookup, and k-means clusters of its rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from cogvideo.config import require
from cogvideo.layout import check_code_range

DISTANCES_PER_PASS = 2**24
"""Maximum number of distances in memory at once: 64 MiB in float32."""
MAX_ITERATIONS = 300
"""Limit of k-means iterations; it converges earlier unless rounding prevents that."""


class Codebook(nn.Module):
    """Vectors of the codes: code `i` is row `i` (VQ-VAE, arXiv 1711.00937; one codebook for all rates)."""

    def __init__(self, num_codes: int, embedding_dim: int) -> None:
        """Rows start as N(0, 1 / embedding_dim), so their length is about one.

        They have no gradient: training updates them by running averages (arXiv 1711.00937, appendix A.1).
        """
        super().__init__()
        rows = torch.empty(num_codes, embedding_dim)
        if not rows.is_meta:  # see `Embedding.reset_parameters` in transformer.py
            rows = torch.randn(num_codes, embedding_dim) * embedding_dim**-0.5
        self.embedding = nn.Parameter(rows, requires_grad=False)

    def nearest(self, vectors: Float[Tensor, "*positions embedding"]) -> Int64[Tensor, "*positions"]:
        """Code of the row nearest to each vector (L2); the lowest code if several are equally near."""
        return nearest_rows(vectors.flatten(0, -2), self.embedding).view(vectors.shape[:-1])

    def lookup(self, codes: Int64[Tensor, "*positions"]) -> Float[Tensor, "*positions embedding"]:
        """Rows of the codes; refuses codes outside `[0, num_codes)`."""
        check_code_range(codes, len(self.embedding))
        return F.embedding(codes, self.embedding)


@torch.no_grad()
def nearest_rows(vectors: Float[Tensor, "many dim"], rows: Float[Tensor, "few dim"]) -> Int64[Tensor, " many"]:
    """Index of the row nearest to each vector (L2), with at most `DISTANCES_PER_PASS` distances in memory.

    Computed at least in float32, even under autocast: half precision confuses neighbors.
    """
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    vectors, rows = vectors.to(dtype), rows.to(dtype)
    with torch.autocast(vectors.device.type, enabled=False):
        squares = rows.square().sum(1)
        passes = torch.split(vectors, max(1, DISTANCES_PER_PASS // len(rows)))
        # |v - r|^2 without |v|^2, which is the same for every row.
        return torch.cat([torch.addmm(squares, part, rows.T, alpha=-2).argmin(1) for part in passes])


@torch.no_grad()
def cluster_codes(
    embedding: Float[Tensor, "codes dim"], num_clusters: int, generator: torch.Generator
) -> Int64[Tensor, " codes"]:
    """Cluster the codebook's rows by k-means++; labels are in `[0, num_clusters)`, and no cluster is empty.

    For tokenizers without published clusters (the released one has 500 for its 20,000 codes). The work is
    done on the generator's device; on a CPU, equal generators give equal labels.

    Raises:
        ValueError: `num_clusters` is not in `[1, codes]`.
    """
    num_codes = len(embedding)
    require(1 <= num_clusters <= num_codes, f"num_clusters is {num_clusters}, expected a number in [1, {num_codes}]")
    points = embedding.detach().to(generator.device, torch.float32)
    centers = _first_centers(points, num_clusters, generator)
    labels = _assign(points, centers)
    for _ in range(MAX_ITERATIONS):
        previous, labels = labels, _assign(points, _means(points, labels, num_clusters))
        if torch.equal(previous, labels):
            break
    return labels.to(embedding.device)


def _first_centers(
    points: Float[Tensor, "points dim"], num_clusters: int, generator: torch.Generator
) -> Float[Tensor, "clusters dim"]:
    """Draw points in turn, weighted by squared distance to earlier ones (Arthur and Vassilvitskii 2007)."""
    squares = points.square().sum(1)
    distances = torch.full_like(squares, torch.inf)
    chosen = torch.randint(len(points), (1,), generator=generator, device=generator.device)
    centers = []
    for _ in range(num_clusters):
        center = points[chosen[0]]
        centers.append(center)
        distances = torch.minimum(distances, squares - 2 * (points @ center) + center.square().sum())
        distances = distances.clamp_min(torch.finfo(points.dtype).tiny)  # one can be drawn even if all are 0
        chosen = torch.multinomial(distances, 1, generator=generator)
    return torch.stack(centers)


def _means(
    points: Float[Tensor, "points dim"], labels: Int64[Tensor, " points"], num_clusters: int
) -> Float[Tensor, "clusters dim"]:
    """Mean of the points of each cluster, none of which is empty."""
    counts = labels.bincount(minlength=num_clusters)
    sums = points.new_zeros(num_clusters, points.shape[1]).index_add_(0, labels, points)
    return sums / counts[:, None]


def _assign(points: Float[Tensor, "points dim"], centers: Float[Tensor, "clusters dim"]) -> Int64[Tensor, " points"]:
    """Assign points to the nearest center; an empty cluster takes the farthest point that is not alone in its own."""
    labels = nearest_rows(points, centers)
    counts = labels.bincount(minlength=len(centers))
    empty = (counts == 0).nonzero().flatten()
    if len(empty) == 0:
        return labels
    distances = (points - centers[labels]).square().sum(1)
    for cluster in empty:
        farthest = distances.masked_fill(counts[labels] == 1, -1).argmax()
        counts[labels[farthest]] -= 1
        counts[cluster] = 1
        labels[farthest] = cluster
    return labels
