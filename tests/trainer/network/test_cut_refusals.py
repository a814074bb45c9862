"""Test what `cut` and cut networks refuse, each in one line that says what is wrong."""

import pytest
import torch
from torch import nn

from sid_trainer import StageLossOptions, cut, sid_step

CLASSES = 5


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Linear(8, 8)

    def forward(self, x):
        return self.block(self.block(x))


class Rounded(nn.Module):
    def forward(self, x):
        return x.long().clamp(0, 8)


class Swapped(nn.Module):
    def forward(self, x):
        return x.transpose(0, 1)


class WithHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(8, 8), SHARED

    def forward(self, x):
        x = self.first(x)
        return self.head(x, x[:, :CLASSES])


SHARED = nn.Bilinear(8, CLASSES, CLASSES)
TRUNK = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
REFUSED = {
    "unknown name": (TRUNK, ["0", "5"], {}, ValueError, "at must be names of submodules; the model has no '5'"),
    "twice the same": (TRUNK, ["0", "0"], {}, ValueError, "at must be one or more different names of submodules"),
    "a text": (TRUNK, "02", {}, ValueError, "at must be a list of names of submodules, or of indices, not '02'"),
    "indices of another model": (Tied(), [1], {}, ValueError, "at must be names of submodules for a Tied"),
    "options without names": (TRUNK, [1], {"own_classifier": True}, ValueError, "at must be names for heads, own_classifier, per_position, shift and mask"),
    "another order": (TRUNK, ["2", "0"], {}, ValueError, "in this order; '0' did not"),
    "a module that runs twice": (Twice(), ["block"], {"own_classifier": True}, ValueError, "once each, in this order; 'block' did not"),
    "tied parameters": (Tied(), ["first", "last"], {}, ValueError, "parameter first.weight = last.weight is used in stages 1 and 2: untie it"),
    "heads of another size": (TRUNK, ["0"], {"heads": [nn.Bilinear(8, CLASSES, 3)]}, ValueError, r"heads must return logits \(B, ..., 5\), but head 0"),
    "too few heads": (TRUNK, ["0", "2"], {"heads": [nn.Bilinear(8, CLASSES, CLASSES)]}, ValueError, "heads must be one for each of the 2 cuts, not 1"),
    "channels": (TRUNK, ["0"], {"channels": "middle"}, ValueError, "channels must be 'first', 'last' or None, not 'middle'"),
    "part of a unit": (TRUNK, ["0"], {"hidden_dim": 1.5}, ValueError, "hidden_dim must be a whole number of at least 1, not 1.5"),
    "one class": (TRUNK, ["0"], {"num_classes": 1}, ValueError, "num_classes must be a whole number of at least 2, not 1"),
    "classes as text": (TRUNK, ["0"], {"num_classes": "5"}, ValueError, "num_classes must be a whole number of at least 2, not '5'"),
    "names and indices": (TRUNK, ["0", 2], {}, ValueError, "at must be a list of names of submodules, or of indices, not of str, int"),
    "modules": (TRUNK, [TRUNK[0]], {}, ValueError, "at must be a list of names of submodules, or of indices, not of Linear"),
    "no names": (TRUNK, None, {}, ValueError, "at must be a list of names of submodules, or of indices, not None"),
    "a function": (torch.relu, ["0"], {}, ValueError, "model must be an nn.Module, not builtin_function_or_method"),
    "a compiled model": (torch.compile(TRUNK), ["0"], {}, ValueError, "model must not be compiled as a whole"),
    "a dict for indices": (TRUNK, [1], {"example": {"input": torch.randn(2, 8)}}, ValueError, r"example must be a tensor \(B, ...\) for cuts by indices, not dict"),
    "tied parameters by indices": (nn.Sequential(TRUNK[0], TRUNK[1], TRUNK[0]), [1], {}, ValueError, "parameter 0.weight = 2.weight is used in stages 1 and 2: untie it"),
    "a head for all stages": (TRUNK, ["0", "2"], {"heads": [SHARED, SHARED]}, ValueError, "parameter heads.0.weight = heads.1.weight is used in stages 1 and 2"),
    "a head of another stage's parameters": (WithHead(), ["first"], {"heads": [SHARED], "own_classifier": True}, ValueError, "parameter model.head.bias = heads.0.bias is used in stages 1 and 2"),
    "one head": (TRUNK, ["0", "2"], {"heads": SHARED}, ValueError, "heads must be a list of modules or a function that makes them, not a Bilinear"),
    "no head": (TRUNK, ["0", "2"], {"heads": lambda i, features: None}, ValueError, "heads must be modules, not NoneType"),
    "a head of one input": (TRUNK, ["0"], {"heads": [nn.Linear(8, CLASSES)]}, ValueError, r"heads must be called as head\(features, prior\), but Linear is not"),
    "a mask that is no input": (TRUNK, ["0"], {"mask": "keep"}, ValueError, "mask must be the name of a keyword input of the example, not 'keep'"),
    "next tokens without tokens": (TRUNK, ["0"], {"shift": True}, ValueError, "shift must be False without per_position=True"),
    "the batch second": (nn.Sequential(Swapped(), nn.Linear(8, 8)), ["1"], {"example": torch.randn(2, 5, 8)}, ValueError, r"features must have the batch first, as the example has, but those of '1' are \(5, 2, 8\)"),
    "whole numbers": (nn.Sequential(Rounded(), nn.Embedding(9, 8)), ["0"], {}, ValueError, "at must name modules whose output is floating point, unlike '0': torch.int64"),
    "the classifier in at": (TRUNK, ["0", "2"], {"own_classifier": True, "num_classes": 8}, ValueError, "at must leave parameters behind '2' for the stage of own_classifier"),
    "one output": (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1)), ["0"], {"own_classifier": True}, ValueError, "own_classifier must be False for a model with one output"),
    "no example": (TRUNK, ["0"], {"example": None}, ValueError, "example must be a tensor, a tuple or a dict of inputs, not NoneType"),
    "cut already": (cut(TRUNK, [1], CLASSES, torch.zeros(2, 8)), ["stages.0"], {}, ValueError, "model must not be cut already, as this SIDNetwork is"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_one_line_says_what_is_wrong(case):
    model, at, options, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message) as caught:
        cut(model, at, **{"num_classes": CLASSES, "example": torch.randn(2, 8)} | options)
    assert "\n" not in str(caught.value)


def test_tied_parameters_that_are_frozen_may_be_used_in_several_stages():
    model = Tied().requires_grad_(False)
    model.first.bias.requires_grad_(True)
    network, batch = (
        cut(model, ["first", "last"], CLASSES, torch.randn(2, 8)),
        (torch.randn(2, 8), torch.tensor([0, 1])),
    )
    network(*batch).loss.backward()
    assert model.first.weight.grad is None and model.first.bias.grad is not None
    model.requires_grad_(True)
    with pytest.raises(
        ValueError, match="parameter first.weight must stay frozen, or be untied: several stages use it"
    ):
        network(*batch)


@pytest.mark.parametrize("weight", [[1.0] * CLASSES, torch.ones(CLASSES, 1), torch.tensor([1.0, -1.0])])
def test_class_weights_that_are_none(weight):
    with pytest.raises(ValueError, match=r"class_weight must be a tensor \(C,\) of numbers of at least 0, not"):
        StageLossOptions(class_weight=weight)


def test_class_weights_of_other_classes():
    network = cut(nn.Sequential(nn.Linear(8, 8)), ["0"], CLASSES, torch.randn(2, 8))
    network.loss_options = StageLossOptions(class_weight=torch.ones(3))
    with pytest.raises(ValueError, match="class_weight must have 5 entries, one per class, not 3"):
        network(torch.randn(2, 8), torch.tensor([0, 1]))


def test_parameters_that_are_added_after_the_cut_are_not_left_untrained_in_silence():
    trunk = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    network = cut(trunk, ["0", "2"], CLASSES, torch.randn(2, 8))
    trunk[1] = nn.PReLU()
    with pytest.raises(
        ValueError, match=r"model has other parameters than when it was cut, such as 1.weight: cut it again"
    ):
        network(torch.randn(2, 8), torch.tensor([0, 1]))


def test_the_step_says_how_a_network_cut_by_names_is_trained():
    network = cut(TRUNK, ["0", "2"], CLASSES, torch.randn(2, 8))
    with pytest.raises(
        TypeError, match=r"networks that are wrapped or cut by names train by network\(inputs, targets\)"
    ):
        sid_step(network, torch.randn(2, 8), torch.tensor([0, 1]))
