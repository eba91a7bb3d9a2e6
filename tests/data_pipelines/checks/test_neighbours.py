from __future__ import annotations

import numpy as np
import pytest
import torch

from data_pipelines.checks.neighbours import Pairs, cosine_pairs, hamming_pairs


def listed(parts) -> list[tuple[int, int, float]]:
    return sorted(
        (int(a), int(b), float(d))
        for part in parts
        for a, b, d in zip(part.first, part.second, part.distance, strict=True)
    )


def hashes_with_neighbours(count: int, furthest: int, seed: int) -> np.ndarray:
    """Random hashes of 128 bits; every fifth is another one with up to `furthest` bits turned."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2, (count, 128), dtype=np.uint8)
    for row in range(0, count, 5):
        bits[row] = bits[rng.integers(count)]
        bits[row, rng.choice(128, rng.integers(furthest + 1), replace=False)] ^= 1
    return np.packbits(bits, axis=1).view(np.uint64)


def all_pairs(hashes: np.ndarray, others: np.ndarray, radius: int) -> list[tuple[int, int, float]]:
    found = []
    for one in range(len(hashes)):
        for two in range(one + 1, len(hashes)):
            distance = sum(
                int(a ^ b).bit_count() for a, b in zip(hashes[one].tolist(), others[two].tolist(), strict=True)
            )
            if distance <= radius:
                found.append((one, two, float(distance)))
    return found


@pytest.mark.parametrize("radius", [0, 1, 7, 16, 25])
@pytest.mark.parametrize("threads", [1, 3])
def test_hamming_pairs_are_those_of_a_comparison_of_all_with_all(radius: int, threads: int) -> None:
    hashes = hashes_with_neighbours(300, radius + 4, seed=radius)
    assert listed(hamming_pairs(hashes, radius, threads=threads)) == all_pairs(hashes, hashes, radius)


@pytest.mark.parametrize("radius", [0, 9, 16])
def test_with_turned_bits_too(radius: int) -> None:
    turned = np.array([0x5555555555555555, 0x00000000FFFF0001], dtype=np.uint64)
    hashes = hashes_with_neighbours(300, radius + 4, seed=radius)
    hashes[::5] ^= turned
    assert listed(hamming_pairs(hashes, radius, turned=turned)) == all_pairs(hashes, hashes ^ turned, radius)


def test_nothing_is_missed_where_all_hashes_share_most_bits() -> None:
    """Buckets of the tables are then as full as they can be."""
    hashes = np.zeros((200, 2), dtype=np.uint64)
    hashes[:, 1] = np.random.default_rng(0).integers(0, 256, 200)
    assert listed(hamming_pairs(hashes, 3)) == all_pairs(hashes, hashes, 3)


def test_one_hash_has_no_pair_and_a_radius_of_all_bits_is_refused() -> None:
    assert not list(hamming_pairs(np.zeros((1, 2), dtype=np.uint64), 16))
    with pytest.raises(ValueError, match=r"0 \.\. 127"):
        list(hamming_pairs(np.zeros((2, 2), dtype=np.uint64), 128))


def test_cosine_pairs_are_those_of_one_large_product() -> None:
    features = torch.randn(90, 4, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(features, dim=1)
    cosines = unit @ unit.T
    expected = [(a, b) for a in range(90) for b in range(a + 1, 90) if cosines[a, b] >= 0.9]
    found = listed(cosine_pairs(features, 0.9, rows=16, columns=32))
    assert [(a, b) for a, b, _ in found] == expected
    assert all(abs(1 - cosines[a, b] - distance) < 1e-5 for a, b, distance in found)
    assert isinstance(next(cosine_pairs(features, 0.9)), Pairs)
