"""Random generators that depend on a seed and a purpose alone: a run resumes at any batch with the same bits."""

import numpy as np
import torch

ORDER, CROPS, NOISE = 0, 1, 4  # purposes; the first number of a generator's key


def seeded_generator(seed: int, *key: int) -> torch.Generator:
    """Return a CPU generator, independent of those with another seed or key. Raises ValueError for seed < 0."""
    mixed = np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(mixed[0]))
