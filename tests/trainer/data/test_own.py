"""Test `OwnData`: the `Trainer` on your own tensors, data sets and data loaders."""

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

from sid_trainer import OwnData, StageLossOptions, TrainConfig, Trainer, cut
from sid_trainer.data.own import LoaderBatches
from sid_trainer.training.evaluation import evaluate

INPUTS = torch.randn(65, 6, generator=torch.Generator().manual_seed(0))
CLASSES = (INPUTS[:, 0] > 0).long() + (INPUTS[:, 1] > 0)
SOURCES = {
    "tensors": lambda: (INPUTS, CLASSES),
    "data set": lambda: TensorDataset(INPUTS, CLASSES),
    "arrays": lambda: (INPUTS.numpy(), CLASSES.numpy()),
    "batch sampler": lambda: DataLoader(
        TensorDataset(INPUTS, CLASSES), batch_sampler=BatchSampler(RandomSampler(CLASSES), 16, False)
    ),
    "items": lambda: list(zip(INPUTS, CLASSES, strict=True)),
    "loader": lambda: DataLoader(TensorDataset(INPUTS, CLASSES), 16, shuffle=True),
    "loader that drops": lambda: DataLoader(TensorDataset(INPUTS, CLASSES), 16, shuffle=True, drop_last=True),
    "sampler": lambda: DataLoader(TensorDataset(INPUTS, CLASSES), 8, sampler=RandomSampler(CLASSES, num_samples=40)),
}


def make_network():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 16), nn.ReLU()]
    return cut(nn.Sequential(*layers), ["2", "4"], 3, INPUTS[:2])


def make_trainer(source, folder=None, epochs=3):
    config = TrainConfig(epochs=epochs, batch_size=16, lr=1e-2, save_every=2)
    return Trainer(make_network(), OwnData(source, (INPUTS, CLASSES)), config, folder, quiet=True)


@pytest.mark.parametrize("name", SOURCES)
def test_a_network_learns_from(name):
    trainer = make_trainer(SOURCES[name](), epochs=12)
    rows = trainer.fit()
    assert rows[-1]["test_accuracy"] > 0.8
    images = {"loader that drops": 64, "sampler": 40}.get(name, 65)
    assert trainer.strategy.batches["train"].count == images == trainer.metadata["train_images"]
    assert rows[-1]["step"] == 12 * {"loader that drops": 4}.get(name, 5)


@pytest.mark.parametrize("name", ["tensors", "loader"])
def test_a_run_killed_within_an_epoch_ends_in_the_same_bits(name, tmp_path):
    whole = make_trainer(SOURCES[name]())
    whole.fit()
    killed = make_trainer(SOURCES[name](), tmp_path)
    train_step, steps = killed.train_step, iter(range(7))
    killed.train_step = lambda *batch: (next(steps), train_step(*batch))[1]
    with pytest.raises(RuntimeError):  # StopIteration within a generator's caller
        try:
            killed.fit()
        except StopIteration as error:
            raise RuntimeError from error
    resumed = make_trainer(SOURCES[name](), tmp_path)
    resumed.resume()
    assert (resumed.epoch, resumed.step) == (2, 2)
    resumed.fit()
    for own, its in zip(resumed.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(own, its)


def test_epochs_have_different_orders_that_depend_on_the_seed():
    batches = LoaderBatches((INPUTS, torch.arange(65)), 16, torch.device("cpu"), True)

    def order(seed, epoch, start=0):
        return torch.cat([classes for _, classes in batches.shuffle(seed, epoch, 0, False, start)]).tolist()

    state = torch.get_rng_state()
    assert order(0, 1) == order(0, 1) != order(0, 2) and order(0, 1) != order(1, 1)
    assert order(0, 1, start=2) == order(0, 1)[32:]
    assert torch.equal(state, torch.get_rng_state())  # dropout draws what it would have drawn


def test_class_weights_of_the_network_are_those_of_its_training():
    """Check class weights in networks of either class; other `loss_options` come from the configuration."""
    weight, losses = torch.tensor([1.0, 0.0, 5.0]), []
    for at in (["2", "4"], [3]):
        for class_weight in (None, weight):
            torch.manual_seed(0)
            layers = [nn.Linear(6, 16), nn.ReLU(), nn.Identity(), nn.Linear(16, 16), nn.ReLU()]
            network = cut(nn.Sequential(*layers), at, 3, INPUTS[:2])
            network.loss_options = StageLossOptions(class_weight=class_weight)
            data = OwnData((INPUTS, CLASSES), (INPUTS, CLASSES))
            losses.append(Trainer(network, data, TrainConfig(epochs=1), quiet=True).fit()[-1]["train_loss"])
    torch.testing.assert_close(losses[:2], losses[2:], rtol=1e-4, atol=0)
    assert losses[0] != losses[1]
    with pytest.raises(ValueError, match="class_weight must be None for method 'bp': it is for sid and greedy"):
        Trainer(network, data, TrainConfig(method="bp"))


@pytest.mark.parametrize("settings", [{"method": "bp-checkpoint"}, {"schedule": "two-phase"}])
def test_what_a_network_cut_by_names_cannot_is_refused(settings):
    with pytest.raises(ValueError, match=f"{[*settings.values()][0]}' is not for networks that are cut by names"):
        Trainer(make_network(), OwnData((INPUTS, CLASSES), (INPUTS, CLASSES)), TrainConfig(**settings))


@pytest.mark.parametrize(
    "network, data, message",
    [
        (
            nn.Linear(6, 3),
            OwnData((INPUTS, CLASSES), (INPUTS, CLASSES)),
            "network must be what `cut` or .* not a Linear",
        ),
        (make_network(), (INPUTS, CLASSES), r"data must be OwnData\(train, test\) or what `load_data` .* not a tuple"),
    ],
)
def test_what_is_no_network_and_no_data(network, data, message):
    with pytest.raises(ValueError, match=message):
        Trainer(network, data, TrainConfig())


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(INPUTS, CLASSES, strict=True)


REFUSED = {
    "a stream": (
        lambda: DataLoader(Stream(), 16),
        "data must be a DataLoader with a batch size and a data set of known",
    ),
    "no batches": (
        lambda: DataLoader(TensorDataset(INPUTS, CLASSES), None),
        "data must be a DataLoader with a batch size",
    ),
    "fewer classes": (
        lambda: (INPUTS, CLASSES[:-1]),
        r"data must have as many classes as inputs, not the lengths \[65, 64\]",
    ),
    "a number": (lambda: 3, "data must be .*, not int"),
    "soft targets": (
        lambda: (INPUTS, INPUTS.softmax(1)),
        r"data must give batches \(inputs, classes \(B,\) int64\), not",
    ),
    "three parts": (lambda: TensorDataset(INPUTS, INPUTS, CLASSES), "data must give batches"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as caught:
        make_trainer(make()).fit()
    assert "\n" not in str(caught.value)


def test_a_trained_network_is_measured_and_exported_from_python(tmp_path):
    trainer = make_trainer((INPUTS, CLASSES), tmp_path)
    row = trainer.fit()[-1]
    again = make_trainer((INPUTS, CLASSES))
    again.resume(tmp_path)
    batches = LoaderBatches((INPUTS, CLASSES), 65, torch.device("cpu"), False)
    measured = evaluate(again.network, batches.in_order(), again.strategy.options)
    assert measured["accuracy"] == row["stage_accuracy"]
    sizes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(again.network.eval(), (INPUTS[:2],), dynamic_shapes=sizes)
    torch.testing.assert_close(program.module()(INPUTS), trainer.network.eval()(INPUTS))
