"""Training in one process: the loop, its settings, checkpoints and evaluation."""
