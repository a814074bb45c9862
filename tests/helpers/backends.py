"""A backend and the device it runs on: what the fixture `backend` gives a test."""

from typing import NamedTuple


class Backend(NamedTuple):
    name: str  # as in `backend=`
    device: str  # "cpu" or "cuda"
