"""Share oracles, grids of cases, and runs of `sid` in other processes among tests of several folders."""
