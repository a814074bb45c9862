"""A backend and the device it runs on: the value of the fixture `backend`."""

from typing import NamedTuple


class Backend(NamedTuple):
    name: str  # as in `backend=`
    device: str  # "cpu" or "cuda"
