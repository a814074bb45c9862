"""Test the pipeline simulator against sums by hand and known formulas, its measured costs, and its command."""

import json
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.pipeline.costs import StageCost, StepSettings, measure_blocks, measure_stages
from bench.pipeline.simulate import Sweep, extrapolate, main, outlook
from bench.pipeline.simulator import SCHEDULES, NetworkLink, simulate
from sid_trainer import build_network
from sid_trainer.distributed.balance import balance_stages

DRAINED = SCHEDULES[1:]
ONE = StageCost(forward=1.0, backward=2.0, held=1, backward_input=1.0)


def even(ranks, cost=ONE, schedule="sid", batches=1, microbatches=1, **options):
    """Simulate equal stages, one per rank."""
    parts = [range(i, i + 1) for i in range(ranks)]
    return simulate([cost] * ranks, parts, schedule, batches, microbatches=microbatches, **options)


# ---------------------------------------------------------------- by hand


@pytest.mark.parametrize(("ranks", "batches"), [(1, 5), (2, 1), (2, 7), (4, 9), (64, 100)])
def test_equal_stages_leave_the_idle_share_of_the_formula(ranks, batches):
    simulation = even(ranks, StageCost(forward=3.0, backward=0.0), batches=batches)
    assert simulation.seconds == (batches + ranks - 1) * 3
    assert (
        simulation.idle_share == pytest.approx((ranks - 1) / (batches + ranks - 1))
        and simulation.ideal_idle_share == simulation.idle_share
    )
    assert simulation.imbalance == 0 and simulation.images_per_second(10) == pytest.approx(
        10 * batches / simulation.seconds
    )


def test_a_local_stage_hands_on_before_it_learns():
    simulation = even(3, StageCost(forward=1.0, backward=2.0, update=0.5, held=7), batches=10)
    assert simulation.seconds == 10 * 3.5 + 2 * 1.0 and simulation.idle_share < simulation.ideal_idle_share
    assert simulation.held == [7, 7, 7]
    first = [event for event in simulation.events if event.rank == 1][:3]
    assert first == [(1, 0, "forward", 1, 2), (1, 0, "backward", 2, 4), (1, 0, "update", 4, 4.5)]


def test_several_stages_on_a_rank_and_the_slowest_sets_the_pace():
    costs = [StageCost(1, 1, 1, held=2), StageCost(2, 0, 1, held=9), StageCost(1, 1, 0, held=4)]
    simulation = simulate(costs, [range(0, 2), range(2, 3)], "sid", 10)
    # stage 2 sends its features 3 + 2 after a batch begins, every 6 seconds; rank 1 then takes 2
    assert simulation.seconds == 9 * 6 + 5 + 2 and simulation.busy == [60, 20]
    assert simulation.imbalance == pytest.approx(1 - 40 / 60) and simulation.held == [9, 4]


@pytest.mark.parametrize(("ranks", "m"), [(1, 3), (2, 4), (4, 4), (4, 2), (8, 32)])
def test_microbatches_of_backpropagation_by_the_known_formulas(ranks, m):
    """Check GPipe, 1F1B and ZB-H1 against their known formulas.

    Sources: GPipe arXiv 1811.06965; 1F1B is PipeDream-Flush; ZB-H1 arXiv 2401.10241, whose bubble is (S - 1)(F + B -
    W).
    """
    gpipe, one, zero = (even(ranks, schedule=name, microbatches=m) for name in DRAINED)
    assert gpipe.seconds == one.seconds == (m + ranks - 1) * 3
    assert gpipe.idle_share == pytest.approx(gpipe.ideal_idle_share) and one.idle_share == pytest.approx(
        one.ideal_idle_share
    )
    assert gpipe.held == [m] * ranks
    assert one.held == [min(m, ranks - rank) for rank in range(ranks)]
    if m >= ranks:
        assert zero.seconds == m * 3 + (ranks - 1) * 1
        assert zero.held == [ranks] * ranks
    if ranks > 1:
        assert zero.idle_share < one.idle_share


def test_the_update_empties_the_pipeline_of_backpropagation():
    cost = StageCost(1.0, 2.0, update=0.5)
    simulation = even(4, cost, "1f1b", batches=3, microbatches=6)
    assert simulation.seconds == 3 * ((6 + 3) * 3 + 0.5)
    assert sum(event.kind == "update" for event in simulation.events) == 4 * 3


def test_links_take_time_and_carry_one_message_at_a_time():
    cost = StageCost(1.0, 1.0, sent=10)
    late = even(2, cost, batches=5, link=NetworkLink(latency_seconds=0.25, bytes_per_second=20))
    assert late.seconds == 5 * 2 + 1 + 10 / 20 + 0.25  # half a second per message: hidden, except for the first
    bound = even(2, cost, batches=5, link=NetworkLink(bytes_per_second=2))
    # five seconds per message; the first is sent at 1, and the last takes 2 to process
    assert bound.seconds == 1 + 5 * 5 + 2
    copied = even(2, cost, batches=5, link=NetworkLink(seconds_per_byte_on_rank=0.01))
    assert copied.busy == pytest.approx([5 * 2.1, 5 * 2.1]) and copied.seconds == pytest.approx(5 * 2.1 + 1 + 0.1)
    both = even(2, cost, "gpipe", microbatches=2, link=NetworkLink(latency_seconds=3.0))
    assert both.seconds == 1 + 3 + 2 + 2 + 3 + 1  # each way once


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_a_rank_runs_ahead_only_as_far_as_there_is_room(in_flight):
    """Check how far rank 0, which takes 1 second per batch, runs ahead of rank 1, which takes 10.

    When rank 1 takes a batch, in_flight - 1 more wait there, in_flight wait at the sender, and it works on one.
    """
    costs = [StageCost(1.0, 0.0), StageCost(10.0, 0.0)]
    simulation = simulate(costs, [range(1), range(1, 2)], "sid", 20, in_flight=in_flight)
    assert simulation.seconds == 1 + 20 * 10
    begun = [[event.start for event in simulation.events if event.rank == rank] for rank in (0, 1)]
    ahead = [sum(start < at for start in begun[0]) - taken for taken, at in enumerate(begun[1], 1)]
    assert max(ahead) == (in_flight - 1) + in_flight + 1
    flushed = even(2, StageCost(1.0, 1.0), "gpipe", microbatches=9, in_flight=in_flight)
    assert flushed.seconds == 10 * 2


def test_loading_and_what_a_rank_does_beside_its_stages():
    costs = [StageCost(1.0, 1.0, load=0.5), StageCost(1.0, 1.0)]
    simulation = simulate(costs, [range(1), range(1, 2)], batches=4, overhead=0.25)
    assert simulation.busy == pytest.approx([4 * 2.75, 4 * 2.25]) and simulation.seconds == pytest.approx(
        4 * 2.75 - 1 - 0.25 + 2.25
    )


# ---------------------------------------------------------------- drawn

seconds = st.floats(0.01, 10)
stage = st.builds(
    StageCost, forward=seconds, backward=seconds, update=seconds, sent=st.integers(1, 1000), held=st.integers(1, 1000)
)


@settings(max_examples=60, deadline=None)
@given(
    costs=st.lists(stage, min_size=1, max_size=7), data=st.data(), batches=st.integers(1, 5), m=st.integers(1, 6),
    in_flight=st.integers(1, 3),
    link=st.builds(NetworkLink, st.floats(0, 5), st.floats(50, 1e5), st.floats(0, 1e-3)),
)  # fmt: skip
def test_what_holds_for_every_schedule(costs, data, batches, m, in_flight, link):
    ranks = data.draw(st.integers(1, len(costs)))
    parts = balance_stages([cost.seconds for cost in costs], ranks)
    work = [batches * sum(costs[i].seconds for i in part) for part in parts]
    for schedule in SCHEDULES:
        per = [StageCost(c.forward / m, c.backward / m, c.update, c.sent, c.held) for c in costs]
        per = costs if schedule == "sid" else per
        simulation = simulate(per, parts, schedule, batches, microbatches=m, link=link, in_flight=in_flight)
        begins = {}
        for rank in range(ranks):
            own = [event for event in simulation.events if event.rank == rank]
            assert all(a.end <= b.start for a, b in zip(own, own[1:], strict=False))  # one thing at a time
            mine = [event for event in own if event.kind not in ("send", "receive")]
            assert sum(event.end - event.start for event in mine) == pytest.approx(work[rank])
            begins[rank] = [event for event in mine if event.kind == "forward"][
                :: len(parts[rank]) if schedule == "sid" else 1
            ]
        for rank in range(1, ranks):  # nothing is processed before it was computed and received
            step = 1 / link.bytes_per_second * costs[parts[rank].start - 1].sent + link.latency_seconds
            for before, after in zip(begins[rank - 1], begins[rank], strict=True):
                assert after.start >= before.end + step - 1e-9
        assert (
            simulation.seconds >= max(work) - 1e-9
            and -1e-9 <= simulation.idle_share < 1
            and 0 <= simulation.imbalance + 1e-9
        )


@given(st.lists(st.floats(0, 10), min_size=1, max_size=8), st.data())
def test_balanced_is_the_best_of_all_cuts(values, data):
    ranks = data.draw(st.integers(1, len(values)))
    parts = balance_stages(values, ranks)
    assert [i for part in parts for i in part] == list(range(len(values))) and len(parts) == ranks and all(parts)

    def largest(edges):
        return max(sum(values[a:b]) for a, b in zip((0, *edges), (*edges, len(values)), strict=True))

    best = min(map(largest, combinations(range(1, len(values)), ranks - 1)))
    assert largest([part.start for part in parts[1:]]) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("schedule", DRAINED)
@settings(max_examples=25, deadline=None)
@given(costs=st.lists(stage, min_size=3, max_size=6), m=st.integers(1, 6))
def test_few_drained_batches_predict_many(schedule, costs, m):
    link = NetworkLink(0.1, 500.0)
    run, seconds = extrapolate(costs, 3, schedule, m, Sweep([3], [schedule], 30, link=link))
    parts = balance_stages([cost.seconds + (m - 1) * (cost.forward + cost.backward) for cost in costs], 3)
    assert seconds == pytest.approx(simulate(costs, parts, schedule, 30, microbatches=m, link=link).seconds, rel=1e-6)
    assert run.batches == 5


# ---------------------------------------------------------------- measured


@pytest.mark.parametrize(
    ("arch", "size"),
    [("simple_cnn", 8), ("resnet18", 8), pytest.param("vit_tiny", 8, marks=pytest.mark.slow), ("mlp", 8)],
)
def test_measuring_changes_nothing_and_finds_every_stage(arch, size):
    torch.manual_seed(0)
    inputs, targets = torch.randn(4, 3, size, size), torch.randint(0, 10, (4,))
    for plain, measure in ((False, measure_stages), (True, measure_blocks)):
        network = build_network(arch, "stagewise", image_size=(size, size), plain=plain).eval()
        before = {name: value.clone() for name, value in network.state_dict().items()}
        random = torch.get_rng_state()
        costs = measure(network, inputs, targets, rounds=2)
        assert len(costs) == 4 and torch.equal(random, torch.get_rng_state())
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
        assert all(p.grad is None for p in network.parameters()) and not network.training
        for cost in costs:
            assert cost.forward > 0 and cost.backward > 0 and cost.update > 0 and cost.held > 0
        if plain:
            assert costs[0].backward_input == 0 and costs[1].backward_input > 0 and costs[-1].sent == 0
    features = network.extractor[0](inputs)
    assert costs[0].sent == features.nbytes
    assert (
        measure_stages(build_network(arch, "stagewise", image_size=(size, size)), inputs, targets, rounds=1)[0].sent
        == features.nbytes + 4 * 10 * 4
    )  # and the belief


def test_what_cannot_be_measured_says_so():
    x, y = torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)
    shared = build_network("simple_cnn", "shared", image_size=(8, 8))
    with pytest.raises(ValueError, match="network must be stagewise"):
        measure_stages(shared, x, y)
    with pytest.raises(ValueError, match="network must be a plain backbone"):
        measure_blocks(build_network("mlp", "stagewise", image_size=(8, 8)), x, y)
    with pytest.raises(ValueError, match="rounds must be at least 1, not 0"):
        measure_stages(build_network("mlp", "stagewise", image_size=(8, 8)), x, y, rounds=0)


def test_loading_belongs_to_the_first_stage_and_every_round_takes_a_new_batch(monkeypatch):
    clock, taken = [0.0], []
    monkeypatch.setattr("bench.pipeline.costs.time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def batches():
        while True:
            clock[0] += 0.25
            taken.append(2 + len(taken))
            yield torch.randn(taken[-1], 3, 8, 8), torch.zeros(taken[-1], dtype=torch.int64)

    network = build_network("mlp", "stagewise", image_size=(8, 8))
    costs = measure_stages(network, *next(batches()), rounds=5, feed=batches())
    assert len(taken) == 1 + 2 + 5 and [cost.load for cost in costs] == [0.25, 0.0, 0.0, 0.0]
    assert [cost.seconds for cost in costs] == [0.25, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: balance_stages([1.0, 2.0], 3), "ranks must be 1 to 2, the number of stages, not 3"),
        (lambda: even(2, schedule="ring"), "schedule must be one of sid, gpipe, 1f1b, zb, not 'ring'"),
        (lambda: even(2, batches=0), "batches must be at least 1, not 0"),
        (lambda: even(2, in_flight=0), "in_flight must be at least 1, not 0"),
        (lambda: simulate([ONE] * 3, [range(2)]), "parts must cut 3 stages"),
        (lambda: NetworkLink(bytes_per_second=0), "bytes_per_second must be above 0, not 0"),
        (lambda: NetworkLink(latency_seconds=-1), "latency_seconds must be 0 or more, not -1"),
    ],
)
def test_what_is_no_pipeline_is_refused(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


# ---------------------------------------------------------------- as a user asks

SMALL = ["--arch", "mlp", "--batch-size", "8", "--image-size", "4", "--rounds", "1"]


def test_simulate_end_to_end_and_again_from_its_costs(tmp_path, capsys):
    costs, out = tmp_path / "costs.json", tmp_path / "out"
    words = [*SMALL, "--depth", "16", "--ranks", "2", "16", "--costs", str(costs), "--out", str(out), "--batches", "40"]
    assert main([*words, "--bandwidth", "1", "--latency", "50"]) == 0
    table = capsys.readouterr().out
    assert table.startswith("| schedule | ranks | microbatches | images/s |") and table.count("\n| ") == 1 + 4 * 3
    assert (out / "simulate.png").read_bytes().startswith(b"\x89PNG")
    first = json.loads((out / "simulate.json").read_text())
    assert [(row["schedule"], row["ranks"]) for row in first["rows"]] == [(s, r) for s in SCHEDULES for r in (1, 2, 16)]
    assert first["link"]["bytes_per_second"] == 125e6 and first["link"]["latency_seconds"] == pytest.approx(50e-6)
    for row in first["rows"]:
        assert 0 <= row["idle"] + 1e-9 and 0 < row["images_per_second"] and row["microbatches"] in (1, 4)
        assert row["ranks"] > 1 or row["gain"] == 1
        # Smaller microbatches have measured costs of their own, so that their gain depends on the clock.
        assert row["ranks"] == 1 or row["microbatches"] > 1 or row["gain"] < row["ranks"]
    assert main([*words, "--bandwidth", "1", "--latency", "50"]) == 0
    assert json.loads((out / "simulate.json").read_text())["rows"] == first["rows"]  # nothing was measured again
    assert main([*words, "--latency", "5000", "--schedule", "sid"]) == 0
    slow = json.loads((out / "simulate.json").read_text())["rows"]
    assert [row["schedule"] for row in slow] == ["sid"] * 3 and slow[2]["gain"] < first["rows"][2]["gain"]


def test_rows_are_of_the_best_count_of_microbatches(tmp_path):
    cost = {"forward": 1.0, "backward": 2.0, "update": 0.0, "sent": 0, "held": 1, "backward_input": 1.0}
    measured, file = StepSettings(arch="mlp", batch_size=8, image_size=4), tmp_path / "costs.json"
    stages = {"sid": 1, "bp/1": 1, "bp/2": 2, "bp/8": 4}  # small microbatches take longer than their share

    def of(name):
        return [{key: value / stages[name] for key, value in cost.items()}] * 4

    known = {"of": measured.__dict__, "costs": {name: of(name) for name in stages}}
    file.write_text(json.dumps(known))
    rows = outlook(measured, Sweep([4], ["1f1b", "sid"], 10, [2, 8]), costs=file)
    assert [row["microbatches"] for row in rows] == [1, 2, 1, 1]
    assert rows[1]["images_per_second"] == pytest.approx(8 / ((2 + 3) * 1.5))
    assert rows[1]["idle"] == pytest.approx(rows[1]["formula"]) == pytest.approx(3 / 5)
    assert rows[3]["images_per_second"] == pytest.approx(80 / (10 * 3 + 3)) and rows[3]["gain"] == pytest.approx(
        30 / 11 * 4 / 3
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["costs.json"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "5"], "ranks must be 1 to 4, the number of stages, not 5"),
        (["--ranks", "0"], "ranks must be at least 1, not 0"),
        (["--schedule", "ring"], "invalid choice: 'ring'"),
        (["--batches", "0"], "batches must be at least 1, not 0"),
        (["--microbatches", "3"], "microbatches must divide the batch of 8 images, not be 3"),
        (["--in-flight", "0"], "in_flight must be at least 1, not 0"),
        (["--bandwidth", "0"], "bytes_per_second must be above 0, not 0.0"),
        (["--latency", "-1"], "latency_seconds must be 0 or more"),
        (["--depth", "999"], "depth must be 1..128 for a stagewise mlp, not 999"),
        (["--batch-size", "0"], "batch_size must be at least 1, not 0"),
        (["--rounds", "0"], "rounds must be at least 1, not 0"),
        (["--costs", "nowhere/costs.json"], "no such folder"),
        (["--out", "damaged", "--costs", "new"], "damaged: not a folder"),
        (["--costs", "damaged"], "damaged: not what `simulate.py --costs` writes"),
        (["--costs", "other"], "other: not what `simulate.py --costs` writes"),
        (["--costs", "deeper"], "deeper: was measured with depth 7, not None: choose another file"),
        (["--costs", "few"], "few: holds no costs for bp/1, only for sid"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    of = {**StepSettings(arch="mlp", batch_size=8, image_size=4).__dict__}
    files = {
        "damaged": "{", "other": "[]", "deeper": json.dumps({"of": {**of, "depth": 7}, "costs": {}}),
        "few": json.dumps({"of": of, "costs": {"sid": []}}),
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    status = main([*SMALL, "--ranks", "2", *words])
    printed = capsys.readouterr().err.strip()
    assert status == 2 and message in printed and printed.startswith("simulate.py: error: ") and "\n" not in printed, (
        printed
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)
