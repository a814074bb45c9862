"""The fused belief head: problem, operator, dispatch and the Triton kernel."""
