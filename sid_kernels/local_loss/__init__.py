"""The fused local loss: problem, operator, dispatch and one file for each backend."""
