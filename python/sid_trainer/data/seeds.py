"""Random streams that depend on a seed and on their purpose only.

They never depend on what was drawn before, so a run resumes at any batch with the bits it would have had.
"""

import numpy as np
import torch

ORDER, CROPS, SUBSET, VALIDATION, NOISE = range(5)  # what a stream is for; the first number of its key


def seeded(seed: int, *key: int) -> torch.Generator:
    """Return a CPU generator, independent of those with another seed or key. Raises ValueError for seed < 0."""
    mixed = np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(mixed[0]))
