"""Make a network by your own function, named as text, so that a saved run can make it again."""

import importlib
import inspect
import os
import sys

from .cut_network import CutNetwork
from .modules import SIDNetwork

Network = SIDNetwork | CutNetwork


def make_own_network(function: str, num_classes: int, in_channels: int, image_size: tuple[int, int]) -> Network:
    """Call the function with a name "package.module:function", and return the network that it makes.

    It is called with the keyword arguments num_classes, in_channels and image_size (height, width), and returns what
    `cut` or `build_network` return. Modules in the current folder are found. Raises ValueError if it is missing or
    returns something else.
    """
    module_name, _, name = function.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        make = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"network must be MODULE:FUNCTION that can be imported, not {function!r} ({error})") from error
    arguments = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    try:
        inspect.signature(make).bind(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"network must be a function of {', '.join(arguments)}, but {function!r} is not") from error
    network = make(**arguments)
    if not isinstance(network, Network):
        kind = type(network).__name__
        raise ValueError(f"network must be a function that returns what `cut` or `build_network` return, not a {kind}")
    if network.num_classes != num_classes:
        raise ValueError(f"network must have num_classes {num_classes} as the data, not {network.num_classes}")
    return network
