"""Draws by seed and position: their distribution, and that nothing else decides them."""

from __future__ import annotations

import torch

from rollout.sglang.cpu.sampling import draw, filtered, hash64, sample, sample_filtered, uniform

NUM_DRAWS = 200_000


def grid(num_seeds: int, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Seeds and positions that follow each other, the hardest case for a hash."""
    return torch.arange(num_seeds).repeat_interleave(num_positions), torch.arange(num_positions).repeat(num_seeds)


def test_the_hash_is_splitmix64() -> None:
    """Its published first outputs for the state 0: the finalizer of 1, 2 and 3 increments."""
    increment = -0x61C8864680B583EB
    words = hash64(increment * torch.tensor([1, 2, 3]))
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [word % 2**64 for word in words.tolist()] == expected


def test_uniform_numbers_are_uniform_and_independent() -> None:
    u = uniform(*grid(400, 500))
    assert u.min() > 0
    assert u.max() < 1
    assert u.unique().numel() == NUM_DRAWS
    share = torch.histc(u, 50, 0, 1) / NUM_DRAWS
    assert (share - 0.02).abs().max() < 5 * (0.02 / NUM_DRAWS) ** 0.5
    table = (u - 0.5).view(400, 500)
    of_neighbors = (table[1:] * table[:-1]).mean(), (table[:, 1:] * table[:, :-1]).mean()
    assert all(abs(found) < 5 / 12 / NUM_DRAWS**0.5 for found in of_neighbors)


def test_draws_have_the_distribution_of_the_weights() -> None:
    weights = torch.tensor([0.0, 0.5, 1e-3, 0.0, 0.2, 0.05, 0.249, 0.0])  # of any sum
    found = draw(weights.expand(NUM_DRAWS, -1), *grid(400, 500))
    share = torch.bincount(found, minlength=8) / NUM_DRAWS
    assert (share[weights == 0] == 0).all()
    expected = weights / weights.sum()
    assert ((share - expected).abs() <= 5 * (expected / NUM_DRAWS).sqrt()).all()


def test_the_ends_of_the_interval_fall_on_tokens_with_weight() -> None:
    """No seed reaches past the last token, whatever the sum is rounded to."""
    weights = torch.rand(5000, 7, dtype=torch.float64) * 10.0 ** torch.randint(-30, 30, (5000, 1))
    weights[:, 0] = weights[:, -1] = 0
    found = draw(weights, *grid(5000, 1))
    assert ((found > 0) & (found < 6)).all()


def test_a_draw_does_not_depend_on_the_requests_beside_it() -> None:
    probs = torch.softmax(torch.randn(64, 300, generator=torch.Generator().manual_seed(0)), -1)
    seeds, positions = torch.randint(2**62, (64,)), torch.arange(64)
    together = sample(probs, seeds, positions)
    assert (probs.argmax(-1) != together).any()
    for row in range(64):
        assert sample(probs[row : row + 1], seeds[row : row + 1], positions[row : row + 1]) == together[row]


def test_limits_of_other_requests_change_nothing() -> None:
    """Beside greedy requests and ones with top-p, a request without limits draws what it draws alone."""
    probs = torch.softmax(torch.randn(90, 40, generator=torch.Generator().manual_seed(1)), -1)
    seeds, positions = torch.arange(90), torch.full((90,), 7)
    top_ks, top_ps, min_ps = torch.full((90,), 1 << 30), torch.ones(90), torch.zeros(90)
    top_ks[::3], top_ps[1::3] = 1, 0.3
    found = sample_filtered(probs, top_ks, top_ps, min_ps, False, seeds, positions, max_top_k=None)
    assert found.dtype == torch.int32
    assert (found[::3] == probs[::3].argmax(-1)).all()
    assert (found[2::3] == sample(probs, seeds, positions)[2::3]).all()


def test_each_limit_by_hand() -> None:
    probs = torch.tensor([0.1, 0.4, 0.3, 0.2]).expand(4, -1)
    limits = torch.tensor([2, 4, 4, 4]), torch.tensor([1.0, 0.6, 1.0, 1.0]), torch.tensor([0.0, 0.0, 0.6, 0.0])
    kept = filtered(probs, *limits) > 0
    by_top_k, by_top_p, by_min_p, all_of_them = kept.tolist()
    assert by_top_k == by_top_p == by_min_p == [False, True, True, False]
    assert all(all_of_them)
    assert (filtered(probs, limits[0], limits[1], None)[2] == probs[2]).all()
