"""The fused cascade: problem, operator, dispatch and one file for each backend."""
