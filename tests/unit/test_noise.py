"""Counter-based noise: the values depend only on seed, step and position."""

import numpy as np
import pytest
import torch

from models.diffusion import noise


def test_philox_gives_the_published_words() -> None:
    """Test vector of Random123 for philox4x32-10."""
    zero = noise.words(0, 0, (1, 1))[:, 0, 0]
    assert [hex(int(w)) for w in zero] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]


def test_all_64_bits_of_a_seed_are_used() -> None:
    words = [noise.words(seed, 0, (2, 2)) for seed in (1, 1 + 2**32, 2**64 - 1)]
    assert not torch.equal(words[0], words[1])
    assert all(int(w.min()) >= 0 and int(w.max()) < 2**32 for w in words)


def test_a_window_has_the_values_of_the_whole_picture() -> None:
    whole = noise.normals(5, 2, (3, 140, 50))
    window = noise.normals(5, 2, (3, 80, 20), origin=(11, 23))
    assert torch.equal(window, whole[:, :, 11:91, 23:43])


def test_values_are_normal_and_independent_across_steps_and_channels() -> None:
    a, b = (noise.normals(2**63 + 1, step, (4, 128, 128)) for step in (0, 1))
    assert float(a.mean()) == pytest.approx(0, abs=0.02)
    assert float(a.var()) == pytest.approx(1, abs=0.02)
    assert float((a**4).mean()) == pytest.approx(3, abs=0.15)
    channels = torch.cat([a[0].flatten(1), b[0].flatten(1)])
    correlation = np.corrcoef(channels.numpy()) - np.eye(8)
    assert np.abs(correlation).max() < 0.03
