"""Random generators that depend only on a seed and a purpose, so that a run resumes at any batch with the same bits."""

import numpy as np
import torch

ORDER, CROPS, NOISE = 0, 1, 4  # purposes; the first number of a generator's key


def seeded_generator(seed: int, *key: int) -> torch.Generator:
    """Return a CPU generator that is independent of those of other seeds and keys. Raises ValueError for seed < 0."""
    mixed = np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(mixed[0]))
