"""Test that `update` gives the bits and states of each optimizer's own `step`, and when it calls that."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from sid_trainer.methods.updates import run_together, update

MAKERS = {
    "adam": [lambda p: Adam(p, fused=True)] * 3,
    "adamw, another rate": [
        lambda p, lr=lr: AdamW(p, lr=lr, weight_decay=0.1, fused=True) for lr in (1e-3, 1e-2, 1e-3)
    ],
    "adam and adamw": [lambda p: Adam(p, fused=True), lambda p: AdamW(p, fused=True), lambda p: Adam(p, fused=True)],
    "amsgrad": [lambda p: Adam(p, amsgrad=True, maximize=True, fused=True)] * 3,
    "sgd": [lambda p: SGD(p, 0.1, momentum=0.9, nesterov=True, fused=True)] * 3,
    "sgd without momentum": [lambda p: SGD(p, 0.1, weight_decay=0.1, fused=True)] * 3,
    "two groups": [lambda p: Adam([{"params": p[:1], "lr": 0.1}, {"params": p[1:]}], fused=True)] * 3,
    "not fused": [lambda p: Adam(p), lambda p: SGD(p, 0.1), lambda p: Adam(p, fused=True)],
}


def make(kind):
    torch.manual_seed(0)
    modules = [nn.Linear(7, 5) for _ in range(3)]
    return modules, [maker(list(m.parameters())) for maker, m in zip(MAKERS[kind], modules, strict=True)]


def set_gradients(modules, step):
    torch.manual_seed(step)
    for parameter in nn.ModuleList(modules).parameters():
        parameter.grad = torch.randn_like(parameter)
    if step == 2:
        modules[1].bias.grad = None


@pytest.mark.parametrize("kind", MAKERS)
def test_bits_and_states_are_those_of_step(kind):
    (own, own_optimizers), (joint, joint_optimizers) = make(kind), make(kind)
    for step in range(4):
        set_gradients(own, step), set_gradients(joint, step)
        for optimizer in own_optimizers:
            optimizer.step()
        update([None, *joint_optimizers])
    for a, b in zip(own, joint, strict=True):
        assert torch.equal(a.weight, b.weight) and torch.equal(a.bias, b.bias)
    for a, b in zip(own_optimizers, joint_optimizers, strict=True):
        states = [optimizer.state_dict()["state"] for optimizer in (a, b)]
        assert str(states[0]) == str(states[1])


def count_calls(monkeypatch, name):
    calls, original = [], getattr(torch, name)
    monkeypatch.setattr(torch, name, lambda *args, **kwargs: calls.append(len(args[0])) or original(*args, **kwargs))
    return calls


def test_optimizers_of_equal_settings_share_a_call(monkeypatch):
    modules, optimizers = make("adam")
    set_gradients(modules, 0)
    update(optimizers)  # makes the states
    optimizers[2].param_groups[0]["lr"] = 0.5
    calls = count_calls(monkeypatch, "_fused_adam_")
    update(optimizers)
    assert calls == [4, 2]


def test_a_loaded_state_is_used(monkeypatch):
    modules, optimizers = make("adam")
    for step in range(2):
        set_gradients(modules, step)
        update(optimizers)
    saved, start = copy.deepcopy([o.state_dict() for o in optimizers]), copy.deepcopy(modules)
    update(optimizers)
    expected = [module.weight.detach().clone() for module in modules]
    for module, old in zip(modules, start, strict=True):
        module.load_state_dict(old.state_dict())
    for optimizer, state in zip(optimizers, saved, strict=True):
        optimizer.load_state_dict(state)
    update(optimizers)
    assert all(torch.equal(module.weight, value) for module, value in zip(modules, expected, strict=True))


def test_schedulers_see_the_update():
    modules, optimizers = make("adam")
    set_gradients(modules, 0)
    update(optimizers)
    schedulers = [CosineAnnealingLR(optimizer, 5) for optimizer in optimizers]
    assert run_together(optimizers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        update(optimizers)
        for scheduler in schedulers:
            scheduler.step()


def test_hooks_and_methods_of_ones_own_run(monkeypatch):
    modules, optimizers = make("adam")
    ran = []
    optimizers[0].register_step_pre_hook(lambda *_: ran.append("before"))
    optimizers[1].register_step_post_hook(lambda *_: ran.append("after"))
    step = optimizers[2].step
    optimizers[2].step = lambda: (ran.append("own"), step())
    assert not any(run_together([optimizer, *make("adam")[1]]) for optimizer in optimizers)
    for _ in range(2):
        set_gradients(modules, 0)
        update(optimizers)
    assert ran == ["before", "after", "own"] * 2


def test_a_tied_parameter_gets_one_update_after_the_other():
    modules, _ = make("adam")
    modules[1].weight = modules[0].weight
    optimizers = [Adam(module.parameters(), fused=True) for module in modules]
    assert not run_together(optimizers)
    copies = copy.deepcopy((modules, optimizers))
    for _ in range(3):
        for networks in (modules, copies[0]):
            set_gradients(networks, 0)
        update(optimizers)
        for optimizer in copies[1]:
            optimizer.step()
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(modules, copies[0], strict=True))
