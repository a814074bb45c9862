"""Placeholder until the kernel is merged."""


def takes(problem):
    return False


def run(problem):
    raise AssertionError
