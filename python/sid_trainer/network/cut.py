"""Cut your own model into stages, and make heads that fit its features."""

import copy
import difflib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from inspect import signature
from itertools import pairwise
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .channels import infer_channels, record_outputs
from .cut_network import CutNetwork, as_arguments, first_tensor
from .heads import FeaturePooling, HeadOptions, PositionHead, StageHead
from .modules import SIDNetwork, Stage
from .tails import TailedHead, following_blocks, new_blocks

Heads = Callable[[int, Tensor], nn.Module] | Sequence[nn.Module] | nn.ModuleList


class Features(NamedTuple):
    """The features that a stage computes from the example."""

    tensor: Tensor  # (B, ...)
    channels: str | None  # "first" or "last"; None: not certain


def cut(
    model: nn.Module, at: Sequence[int] | Sequence[str], num_classes: int, example: Any, *, head_depth: int = 1,
    hidden_dim: int = 256, grid: int = 4, norm: bool = False, prior_input: bool = True, channels: str | None = None,
    tail: int = 0, heads: Heads | None = None, own_classifier: bool = False, per_position: bool = False,
    shift: bool = False, mask: str | None = None,
) -> Any:  # fmt: skip
    """Cut a model into local stages; no gradient crosses a cut. Example: `cut(model, ["layer1", "layer2"], 10, x)`.

    The model is not copied and keeps its state dict. The features at each cut are given to a head made here.

    Args:
        model: Any module, or an `nn.Sequential` trunk without its classifier.
        at: Names of the submodules that end the stages, in the order in which they run, as in
            `model.named_modules()`. What follows the last one does not run, unless `own_classifier` is True. For an
            `nn.Sequential` also increasing indices, counted from 0, of the layers that begin stages 2, 3, ...
        num_classes: Number of classes C.
        example: Inputs for the model: a tensor (B, ...), a tuple of positional inputs, or a dict of keyword inputs.
            They run through the model in evaluation mode, to find the features and each stage's parameters.
        head_depth, hidden_dim: Number and size of the hidden layers of each head; 0 makes it linear.
        grid: The heads read features of images, series and volumes pooled to `grid` cells per dimension.
        norm: Normalize the hidden layers of the heads: batch-norm, and layer-norm with `per_position`.
        prior_input: Whether the heads read the preceding belief. It is part of the loss in either case.
        channels: Where the features have their channels, "first" or "last"; None infers it from the model's layers.
        tail: Number of blocks through which each head reads its features, except that of the last stage. They are new
            copies of the submodules after the cut in the module that holds both, such as `layer2` after `layer1`; for
            an `nn.Sequential` cut by indices, of the stages that follow.
        heads: The heads, or a function (stage counted from 0, features of the example) -> head. A head is called as
            head(features, prior), and as head(features, prior, mask) if there is a mask.
        own_classifier: Make the rest of the model one more stage, the last, with the model's own output as its logits.
        per_position: Predict a class for each token (B, T), pixel (B, H, W) or step of a series (B, T).
        shift: Use the label of the next token as the target of each token, as for causal language models.
        mask: Name of the keyword input (B, T) that is 0 at padding, which the heads leave out of their mean over the
            tokens; "" for none. Default: "attention_mask" if the example has it.

    Returns a `SIDNetwork` for indices and a `CutNetwork` for names. Raises ValueError for cuts that the model does not
    have or does not reach in this order, for parameters used in more than one stage, and for features whose layout is
    not certain.
    """
    options = HeadOptions(head_depth, hidden_dim, grid, norm, prior_input)
    check_arguments(model, at, num_classes, example, channels, tail)
    if not at or not isinstance(at[0], str):
        if per_position or own_classifier or shift or mask or heads is not None:
            raise ValueError("at must be names for heads, own_classifier, per_position, shift and mask, not indices")
        return cut_sequential(model, at, num_classes, example, options, channels, tail)
    if shift and not per_position:
        raise ValueError("shift must be False without per_position=True: it is for labels of each token")
    names = [str(name) for name in at]
    check_names(model, names)
    keywords = example if isinstance(example, Mapping) else {}
    if mask and mask not in keywords:
        raise ValueError(f"mask must be the name of a keyword input of the example, not {mask!r}")
    if mask is None and "attention_mask" in keywords and not per_position:
        mask = "attention_mask"
    if tail and (heads is not None or mask):
        raise ValueError(f"tail must be 0 with {'a mask' if heads is None else 'heads of your own'}, not {tail}")
    network = CutNetwork(
        model, names, (), num_classes, own_classifier=own_classifier, per_position=per_position, shift=shift,
        mask=mask or None,
    )  # fmt: skip
    stage_features = inspect(network, example, channels)[: len(names)]
    if heads is not None:
        arguments = "features, prior, mask" if mask else "features, prior"
        new_heads = own_heads(heads, [features.tensor for features in stage_features], arguments)
    else:
        new_heads = []
        for i, (name, features) in enumerate(zip(names, stage_features, strict=True)):
            blocks = new_blocks(following_blocks(model, name, tail if i < network.depth - 1 else 0))
            features = through_tail(blocks, features, name)
            place = known_channels(channels or features.channels, features, repr(name))
            head = make_head(tuple(features.tensor.shape[1:]), place, num_classes, options, per_position=per_position)
            new_heads.append(TailedHead(blocks, head) if blocks else head)
    for head, features in zip(new_heads, stage_features, strict=True):
        network.heads.append(head.to(features.tensor.device, features.tensor.dtype))
    check_shared(network)
    check_logits(network, example)
    return network


def own_heads(heads: Heads, features: Sequence[Tensor], arguments: str) -> list[nn.Module]:
    """Return the heads given to `cut`. Raises ValueError unless there is one per cut, called with these arguments."""
    if isinstance(heads, nn.ModuleList) or not callable(heads):
        modules = list(heads) if isinstance(heads, Iterable) else [heads]
    elif isinstance(heads, nn.Module):
        raise ValueError(f"heads must be a list of modules or a function that makes them, not a {type(heads).__name__}")
    else:
        modules = [heads(i, tensor) for i, tensor in enumerate(features)]
    if len(modules) != len(features):
        raise ValueError(f"heads must be one for each of the {len(features)} cuts, not {len(modules)}")
    for head in modules:
        if not isinstance(head, nn.Module):
            raise ValueError(f"heads must be modules, not {type(head).__name__}")
        try:
            signature(head.forward).bind(*arguments.split())
        except TypeError as error:
            raise ValueError(f"heads must be called as head({arguments}), but {type(head).__name__} is not") from error
    return modules


def make_head(
    shape: tuple[int, ...], channels: str, num_classes: int, options: HeadOptions, *, per_position: bool = False,
    tail: Sequence[nn.Module] = (),
) -> nn.Module:  # fmt: skip
    """Make a head for features of `shape`, without the batch, that reads them through the modules of `tail`."""
    common = asdict(options)
    grid = common.pop("grid")
    if per_position:
        return PositionHead(shape, channels, num_classes=num_classes, **common)
    pooling = FeaturePooling(shape, grid, channels)
    dim = pooling.dim
    return StageHead(dim, num_classes, pooling=nn.Sequential(*tail, pooling) if tail else pooling, **common)


def known_channels(channels: str | None, features: Features, name: str) -> str:
    """Return `channels`. Raises ValueError if it is None: neither the caller nor the layers tell where they are."""
    if channels is None:
        shape = tuple(features.tensor.shape)
        raise ValueError(f"channels must be 'first' or 'last' for the features {shape} of {name}: no layer tells")
    return channels


def check_arguments(model: nn.Module, at: Any, num_classes: int, example: Any, channels: str | None, tail: int) -> None:
    """Raise ValueError for arguments of `cut` that fit no model."""
    is_list = isinstance(at, Sequence) and not isinstance(at, str)
    if not is_list or not any(all(isinstance(name, kind) for name in at) for kind in (str, Integral)):
        given = f"of {', '.join(type(name).__name__ for name in at)}" if is_list else repr(at)
        raise ValueError(f"at must be a list of names of submodules, or of indices, not {given}")
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, not {type(model).__name__}")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError("model must not be compiled as a whole: cut it, and compile its blocks")
    if isinstance(model, (CutNetwork, SIDNetwork)):
        raise ValueError(f"model must not be cut already, as this {type(model).__name__} is; cut its own model")
    if not isinstance(num_classes, Integral) or num_classes < 2:
        raise ValueError(f"num_classes must be a whole number of at least 2, not {num_classes!r}")
    if not isinstance(tail, Integral) or tail < 0:
        raise ValueError(f"tail must be a whole number of at least 0, not {tail!r}")
    if channels not in (None, "first", "last"):
        raise ValueError(f"channels must be 'first', 'last' or None, not {channels!r}")
    if not isinstance(example, (Tensor, tuple, list, Mapping)):
        raise ValueError(f"example must be a tensor, a tuple or a dict of inputs, not {type(example).__name__}")


def check_names(model: nn.Module, at: Sequence[str]) -> None:
    """Raise ValueError for names that are not those of different submodules."""
    names = {name for name, _ in model.named_modules()} - {""}
    if not at or len(set(at)) < len(at):
        raise ValueError(f"at must be one or more different names of submodules, not {list(at)}")
    for name in at:
        if name not in names:
            near = difflib.get_close_matches(name, names, 3)
            hint = f"; similar are {', '.join(near)}" if near else f"; the first are {', '.join(sorted(names)[:5])}"
            raise ValueError(f"at must be names of submodules; the model has no {name!r}{hint}")


# ---------------------------------------------------------------- what the model does with the example


@torch.enable_grad()
def inspect(network: CutNetwork, example: Any, channels: str | None = None) -> list[Features]:
    """Run the example, set `network.stage_parameters`, and return the features of every stage."""
    names: dict[int, list[str]] = {}
    for name, parameter in network.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    stage_features: list[Features] = []
    owner: dict[str, int] = {}
    ran: set[str] = set()
    frozen = {name for name, parameter in network.model.named_parameters() if not parameter.requires_grad}
    start = sequence_number()

    def finish_stage(i: int, features: Tensor, channels: str | None) -> None:
        nonlocal start
        stage_features.append(Features(features.detach(), channels))
        for name, *others in sorted(names[key] for key in parameters_behind(features, start) & names.keys()):
            if owner.setdefault(name, i) == i:
                continue
            if name not in frozen:
                raise ValueError(tied_error([name, *others], owner[name], i))
            network.shared.append(name)
        start = sequence_number()

    with evaluating(network.model), record_outputs(network.model, ran) as outputs:

        def visit(i: int, features: Tensor) -> bool:
            check_features(network.at[i], features, example)
            finish_stage(i, features, infer_channels(outputs, features))
            outputs.clear()
            return True

        output = network.run(*as_arguments(example, {}), visit)
        first = stage_features[0]
        network.channels = channels or first.channels or "last"
        network.series &= first.tensor.dim() == 3 and network.channels == "first"
        if network.own_classifier:
            finish_stage(network.depth - 1, network.own_logits(output), None)
            if network.depth - 1 not in owner.values():
                raise ValueError(f"at must leave parameters behind {network.at[-1]!r} for the stage of own_classifier")
    assign_idle_parameters(network, owner, ran)
    network.stage_parameters = [[name for name in owner if owner[name] == i] for i in range(network.depth)]
    return stage_features


def check_features(name: str, features: Tensor, example: Any) -> None:
    """Raise ValueError unless features are floating point and have the batch of the example first."""
    shape = tuple(features.shape)
    if not features.is_floating_point():
        raise ValueError(f"at must name modules whose output is floating point, unlike {name!r}: {features.dtype}")
    inputs = [x for x in tree_leaves([*as_arguments(example, {})]) if isinstance(x, Tensor)]
    if len(shape) < 2 or shape[:1] not in {tuple(x.shape[:1]) for x in inputs}:
        raise ValueError(f"features must have the batch first, as the example has, but those of {name!r} are {shape}")


def check_shared(network: CutNetwork) -> None:
    """Raise ValueError if a head has a parameter that another stage trains, too."""
    names: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    owner: dict[int, int] = {}
    for i in range(network.depth):
        for parameter in network.parameters_of_stage(i):
            if parameter.requires_grad and owner.setdefault(id(parameter), i) != i:
                raise ValueError(tied_error(names[id(parameter)], owner[id(parameter)], i))


def tied_error(names: Sequence[str], first: int, second: int) -> str:
    """Return the message of the error for a parameter that two stages, counted from 0, train."""
    return f"parameter {' = '.join(names)} is used in stages {first + 1} and {second + 1}: untie it"


def check_logits(network: CutNetwork, example: Any) -> None:
    """Raise ValueError unless every head's logits for the example have the classes last."""
    with evaluating(network), torch.no_grad():
        for i, logits in enumerate(network.stage_logits(example)):
            if logits.shape[-1] != network.num_classes:
                raise ValueError(
                    f"heads must return logits (B, ..., {network.num_classes}), but head {i} returned"
                    f" {tuple(logits.shape)}"
                )


def assign_idle_parameters(network: CutNetwork, owner: dict[str, int], ran: set[str]) -> None:
    """Assign parameters that the example did not use, such as those of idle experts, to the stage around them.

    Warn about parameters that the example used but no stage trains, because its loss does not depend on them.

    Args:
        owner: The stage of each parameter that has one; it is extended.
        ran: The names of the modules that ran to their end.
    """
    reached, untrained = dict(owner), []
    for name, parameter in network.model.named_parameters():
        if name in owner:
            continue
        enclosing = module = name.rpartition(".")[0]
        while enclosing and enclosing not in ran:
            enclosing = enclosing.rpartition(".")[0]
        prefix = enclosing + "."
        stages = {stage for own, stage in reached.items() if own.startswith(prefix)}
        if len(stages) == 1 and not any(cut.startswith(prefix) for cut in network.at):
            owner[name] = stages.pop()
        elif module in ran and parameter.requires_grad:
            untrained.append(name)
    if untrained:
        more = f" and {len(untrained) - 1} more" if len(untrained) > 1 else ""
        warnings.warn(
            f"no stage trains {untrained[0]}{more}: the loss of the stage in which they run does not depend on them,"
            " and what later stages read has no gradient",
            stacklevel=5,  # the caller of `cut`
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, with gradients for all parameters and no autocast, within the context."""
    modes = [(module, module.training) for module in model.modules()]
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    devices = {parameter.device.type for parameter in model.parameters()} - {"meta"}
    model.eval()
    try:
        for parameter in frozen:
            parameter.requires_grad_()
        with torch.autocast(min(devices, default="cpu"), enabled=False):  # heads take the dtype of the features
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        model.train(modes[0][1])  # some modules drop in `train` what they keep for evaluation
        for module, training in modes:
            module.training = training


def sequence_number() -> int:
    """Return the number that autograd gives to the node made now; later nodes have higher ones."""
    node = torch.zeros((), requires_grad=True).neg().grad_fn
    assert node is not None
    return node._sequence_nr()


def parameters_behind(output: Tensor, start: int) -> set[int]:
    """Return the `id` of every leaf that the gradient of `output` reaches through nodes made after `start`."""
    leaves, seen, stack = set[int](), set[Any](), [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        elif node._sequence_nr() > start:
            stack += [following for following, _ in node.next_functions]
    return leaves


# ---------------------------------------------------------------- nn.Sequential, by indices


def cut_sequential(
    trunk: nn.Module, at: Sequence[Any], num_classes: int, example: Tensor, options: HeadOptions, channels: str | None,
    tail: int,
) -> SIDNetwork:  # fmt: skip
    """Cut an `nn.Sequential` before the layers with the indices `at`. The other arguments are those of `cut`."""
    if not isinstance(trunk, nn.Sequential):
        raise ValueError(f"at must be names of submodules for a {type(trunk).__name__}; indices are for nn.Sequential")
    if not isinstance(example, Tensor):
        raise ValueError(f"example must be a tensor (B, ...) for cuts by indices, not {type(example).__name__}")
    if list(at) != sorted(set(at)) or (at and not (0 < at[0] and at[-1] < len(trunk))):
        raise ValueError(f"at must be increasing numbers of layers in 1..{len(trunk) - 1}, not {list(at)}")
    bodies = [trunk[start:end] for start, end in pairwise([0, *at, len(trunk)])]
    owner: dict[int, int] = {}
    for i, body in enumerate(bodies):
        for parameter in body.parameters():
            if parameter.requires_grad and owner.setdefault(id(parameter), i) != i:
                names = [name for name, other in trunk.named_parameters(remove_duplicate=False) if other is parameter]
                raise ValueError(tied_error(names, owner[id(parameter)], i))
    heads = []
    for i, features in enumerate(block_features(bodies, example)):
        blocks = new_blocks(bodies[i + 1 :][:tail])
        features = through_tail(blocks, features, f"stage {i + 1}")
        place = channels or features.channels or ("first" if features.tensor.dim() > 3 else None)
        place = known_channels(place, features, f"stage {i + 1}")
        head = make_head(tuple(features.tensor.shape[1:]), place, num_classes, options, tail=blocks)
        heads.append(head.to(features.tensor.device, features.tensor.dtype))
    return SIDNetwork(nn.Identity(), map(Stage, heads, bodies), num_classes)


def through_tail(blocks: Sequence[nn.Module], features: Features, name: str) -> Features:
    """Return the features after the blocks of a tail, as the head reads them.

    Raises ValueError if the blocks cannot run on the features alone.
    """
    if not blocks:
        return features
    try:
        return block_features(blocks, features.tensor)[-1]
    except (TypeError, AttributeError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"tail must be 0 for this model: what follows {name} does not run on its features alone ({reason})"
        ) from error


@torch.no_grad()
def block_features(blocks: Sequence[nn.Module], example: Tensor) -> list[Features]:
    """Return the example's features after each block; copies of the blocks run, so no statistics change."""
    features = []
    for block in blocks:
        trial = copy.deepcopy(block).eval()
        with record_outputs(trial) as outputs:
            example = first_tensor(trial(example))
        features.append(Features(example, infer_channels(outputs, example)))
    return features


def stagewise(
    blocks: Sequence[nn.Module], num_classes: int, example: Tensor, options: HeadOptions,
    tails: Sequence[Sequence[nn.Module]] | None = None,
) -> SIDNetwork:  # fmt: skip
    """Return a network with one stage per block: images with their channels first, tokens with them last.

    `tails` has for each stage the modules between its features and its head's pooling.
    """
    stages = []
    tails = tails or [()] * len(blocks)
    for i, (tail, features) in enumerate(zip(tails, block_features(blocks, example), strict=True)):
        shape = tuple(through_tail(tail, features, f"stage {i + 1}").tensor.shape[1:])
        head = make_head(shape, "first" if len(shape) > 2 else "last", num_classes, options, tail=tail)
        stages.append(Stage(head, blocks[i]))
    return SIDNetwork(nn.Identity(), stages, num_classes)
