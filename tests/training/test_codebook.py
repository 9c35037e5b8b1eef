"""Codebook updates, compared with slow oracles."""

from dataclasses import dataclass

import pytest
import torch

from cogvideo.models.quantizer import Codebook, nearest_rows
from cogvideo.training.objectives.codebook import MovingCodebook, straight_through


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def vectors(many, dim=3, seed=0):
    return torch.randn(many, dim, generator=seeded(seed), dtype=torch.float64)


def codebook(num_codes=5, dim=3, decay=0.9, restart_below=0.05):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MovingCodebook(Codebook(num_codes, dim).double(), decay, restart_below)


@dataclass
class Oracle:
    """Running averages in plain lists, one code at a time."""

    counts: list
    sums: list

    def move(self, given, codes, decay):
        for code in range(len(self.counts)):
            own = [vector for vector, chosen in zip(given.tolist(), codes.tolist(), strict=True) if chosen == code]
            self.counts[code] = decay * self.counts[code] + (1 - decay) * len(own)
            for place in range(len(self.sums[code])):
                new = sum(vector[place] for vector in own)
                self.sums[code][place] = decay * self.sums[code][place] + (1 - decay) * new

    def rows(self):
        return torch.tensor([[x / n for x in s] for s, n in zip(self.sums, self.counts, strict=True)])


def test_rows_are_running_means():
    """Catches an inverted decay or rows that ignore the counts, either of which would drift away from the vectors."""
    moving = codebook()
    oracle = Oracle([1.0] * 5, moving.rows.tolist())
    for step in range(6):
        given = vectors(40, seed=step)
        codes = nearest_rows(given, moving.rows)
        assert moving.update(given, codes, seeded()) == 0
        oracle.move(given, codes, 0.9)
        torch.testing.assert_close(moving.rows.detach(), oracle.rows().double())
        torch.testing.assert_close(moving.counts, torch.tensor(oracle.counts).double())


def test_exactly_dead_codes_start_again():
    """Codes in use must not be restarted; dead ones must move to input vectors, and stay alive for a while."""
    moving = codebook(num_codes=4, restart_below=0.5)
    given = vectors(8)
    moving.counts.copy_(torch.tensor([2.0, 1.2, 1.0, 0.5]))  # even share: 2; counts below 1 after the step are dead
    moving.sums.copy_(moving.rows * moving.counts[:, None])
    before = moving.rows.clone()
    codes = torch.tensor([0] * 6 + [1] * 2)  # counts become 2.4, 1.28, 0.9, 0.45
    assert moving.update(given, codes, seeded()) == 2
    rows = moving.rows
    assert moving.counts.tolist() == pytest.approx([2.4, 1.28, 2, 2])
    for dead in (2, 3):
        assert min(torch.dist(rows[dead], vector) for vector in given) < 1e-12
        assert torch.dist(rows[dead], before[dead]) > 0.1
    for alive, share in ((0, 0.1 * 6 / 2.4), (1, 0.1 * 2 / 1.28)):
        mean = given[codes == alive].mean(0)
        torch.testing.assert_close(rows[alive], (1 - share) * before[alive] + share * mean)


def test_restarts_depend_on_the_generator_alone():
    """Restarts must pick the same vectors in a resumed run as in an uninterrupted one."""
    results = []
    for seed in (1, 1, 2):
        moving = codebook(num_codes=32, restart_below=0.9)
        torch.manual_seed(seed * 100 + len(results))
        moving.update(vectors(64), torch.zeros(64, dtype=torch.int64), seeded(seed))
        results.append(moving.rows.clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_k_means_starts_at_the_clusters():
    """Catches a poor initialization, which leaves most codes unused for thousands of steps."""
    centres = 10 * vectors(5, seed=3)
    given = (centres[torch.arange(100) % 5] + 0.01 * vectors(100)).double()
    moving = codebook()
    moving.start(given, per_step=20, generator=seeded())
    rows = moving.rows.detach()
    nearest = torch.cdist(centres, rows).argmin(1)
    assert sorted(nearest.tolist()) == [0, 1, 2, 3, 4]
    for centre, row in enumerate(nearest.tolist()):
        torch.testing.assert_close(rows[row], given[torch.arange(100) % 5 == centre].mean(0))
    assert moving.counts.tolist() == pytest.approx([4.0] * 5)  # an even share of a step of 20 vectors
    moving.update(given, nearest_rows(given, moving.rows), seeded())
    torch.testing.assert_close(moving.rows.detach(), rows)  # the means are a fixed point of the averages


def test_gradients_go_straight_through():
    """Gradients must reach the encoder unchanged, while the forward values are the codebook's rows."""
    features = torch.randn(1, 2, 2, 2, generator=seeded(), requires_grad=True)
    chosen = torch.randn(1, 2, 2, 2, generator=seeded(1), requires_grad=True)
    weights = torch.randn(1, 2, 2, 2, generator=seeded(2))
    result = straight_through(features, chosen)
    torch.testing.assert_close(result, chosen)
    (result * weights).sum().backward()
    assert torch.equal(features.grad, weights)
    assert chosen.grad is None
