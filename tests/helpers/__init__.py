"""What tests of several folders share: oracles, grids of cases, runs of `sid` in other processes."""
