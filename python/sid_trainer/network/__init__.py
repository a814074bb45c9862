"""What is trained: stages, heads and architectures."""
