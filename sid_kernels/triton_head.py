"""Placeholder until the kernel is merged."""


def takes(problem):
    return False
