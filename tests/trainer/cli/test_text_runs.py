"""`sid` with a text: train, resume, eval, sample, export, report, and refusals."""

import json
import random

import pytest
import torch

from sid_trainer import cli, load_text
from sid_trainer.data.datasets import default_cache
from sid_trainer.runs.build import load_network, make_trainer
from sid_trainer.runs.sample import token_bytes
from sid_trainer.training.config import run_config

SMALL = "--tokens characters --context 16 --layers 3 --width 16 --attention-heads 2 --batch-size 8 --epochs 2".split()


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Keep tokens out of the user's cache folder; return the folder in which they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield default_cache()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text of random words, so that there is something to learn."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=4)) for _ in range(12)]
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(" ".join(draw.choices(words, k=900)))
    return file


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "lm"
    words = [*SMALL, "--depth", "3", "--readout", "shared", "--tail", "1", "--alpha", "0.7", "--out", str(folder)]
    assert cli.main(["train", "--data", str(text), *words]) == 0
    return folder


def test_a_run_is_measured_continued_and_exported(run, capsys):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["stage_kl"][-1] < rows[0]["stage_kl"][-1] < 2.3  # log of the 9 characters is 2.2
    assert cli.main(["eval", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "test tokens" in printed and "perplexity" in printed and "bits/byte" in printed
    assert f"{rows[1]['stage_kl'][-1]:.4f}" in printed
    assert cli.main(["sample", str(run), "--prompt", "abc", "--tokens", "20", "--exit", "0.2"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("abc") and "stages per token" in printed
    assert len(printed.split("\n\n")[0].rstrip("\n")) == 23
    assert cli.main(["sample", str(run), "--prompt", "abc", "--tokens", "20", "--temperature", "0"]) == 0
    greedy = capsys.readouterr().out
    assert cli.main(["sample", str(run), "--prompt", "abc", "--tokens", "20", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == greedy
    assert cli.main(["sample", str(run), "--prompt", "abc", "--tokens", "20", "--temperature", "1e-320"]) == 0
    assert capsys.readouterr().out == greedy
    assert cli.main(["export", str(run)]) == 0
    network, _, _ = load_network(run)
    program, inputs = torch.export.load(run / "network.pt2").module(), torch.randint(9, (3, 7))
    torch.testing.assert_close(program(inputs), network(inputs))
    assert cli.main(["export", str(run), "--plain", "--out", str(run / "plain.pt2")]) == 0
    torch.testing.assert_close(torch.export.load(run / "plain.pt2").module()(inputs), network(inputs))
    assert rows[0]["tokens_per_second"] > 0 and "images_per_second" not in rows[0]
    assert cli.main(["report", str(run), "--out", str(run.parent / "report")]) == 0
    page = (run.parent / "report" / "report.html").read_text()
    assert "tokens/s" in page and "images/s" not in page


@pytest.mark.parametrize("method", ["sid", "bp"])
def test_a_stopped_run_resumes_to_the_same_bits(text, tmp_path, method):
    flags = {"dataset": "text", "data": str(text), "tokens": "characters", "context": 16, "layers": 2, "width": 16}
    run = run_config(**flags, attention_heads=2, epochs=2, depth=2, readout="shared", readout_refresh=4, method=method)
    whole = make_trainer(run, tmp_path / "whole", quiet=True)
    whole.fit()
    (tmp_path / "stopped").mkdir()
    stopped = make_trainer(run, tmp_path / "stopped", quiet=True)
    for inputs, targets in stopped.strategy.train_batches(1, 0):
        result = stopped.train_step(inputs, targets)
        stopped.step += 1
        right = (result.logits.argmax(1) == targets).sum()
        stopped.add_losses(result.stage_loss.detach()[None] * len(targets), int(right), 0.1)
        if stopped.step == 5:
            break
    stopped.save()
    resumed = make_trainer(run, tmp_path / "stopped", quiet=True)
    resumed.resume()
    resumed.fit()
    for a, b in zip(whole.network.state_dict().values(), resumed.network.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert whole.metrics[-1]["stage_kl"] == resumed.metrics[-1]["stage_kl"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "text"], "path must be a text file or a folder of .txt files; none was given"),
        (["--data", "TEXT", "--flip"], "flip must be left out for text, not True"),
        (["--data", "TEXT", "--no-prior-input"], "prior_input must be left out for text, not False"),
        (["--data", "TEXT", "--tokens", "words"], "tokens must be one of bytes, characters, bpe, or a tokenizer file"),
        (
            ["--data", "TEXT", "--arch", "mlp"],
            "arch must be gpt for dataset text, and for no other, not 'mlp' for 'text'",
        ),
        (["--arch", "gpt"], "arch must be gpt for dataset text, and for no other, not 'gpt' for 'digits'"),
        (["--context", "3"], "context must be left out for images, not 3"),
        (["--data", "TEXT", "--depth", "7"], "depth must be at most the number of layers, 6, for gpt, not 7"),
        (["--data", "TEXT", "--layout", "shared"], "layout must be 'stagewise' for gpt, not 'shared'"),
        (["--data", "TEXT", "--graph", "--readout-refresh", "2"], "readout_refresh must be 1 with graph"),
        (["--data", "TEXT", "--context", "4000"], "tokens are too few for a context of 4000"),
    ],
)
def test_refusals(text, tmp_path, capsys, words, message):
    words = [str(text) if word == "TEXT" else word for word in words]
    assert cli.main(["train", *words, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "xyz"], "prompt must have characters of the training text only, not 'x'"),
        (["--prompt", ""], "prompt must be a text of at least one character, not ''"),
        (["--exit", "2"], "exit must be in [0, 1], not 2.0"),
        (["--temperature", "-1"], "temperature must be at least 0, not -1.0"),
        (["--seed", str(2**64)], "seed must be a number of 64 bits, not"),
    ],
)
def test_refused_samples(run, capsys, words, message):
    assert cli.main(["sample", str(run), *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("method", ["bp", "bp-accumulate"])
def test_a_run_by_backpropagation(text, tmp_path, method, capsys):
    words = [*SMALL, "--method", method, "--batch-size", "6", "--epochs", "1", "--out", str(tmp_path)]
    assert cli.main(["train", "--data", str(text), *words]) == 0
    assert cli.main(["export", str(tmp_path)]) == 0
    network, _, _ = load_network(tmp_path)
    program, inputs = torch.export.load(tmp_path / "network.pt2").module(), torch.randint(9, (3, 7))
    torch.testing.assert_close(program(inputs), network(inputs))


def test_a_perplexity_beyond_floating_point_is_infinite(capsys):
    cli.print_perplexity([800.0], 1.0)
    assert " inf " in capsys.readouterr().out


def test_byte_pairs(text, tmp_path, capsys):
    pytest.importorskip("tokenizers")
    small = "--tokens bpe --vocab 280 --context 16 --layers 2 --width 16 --attention-heads 2 --epochs 1".split()
    assert cli.main(["train", "--data", str(text), *small, "--out", str(tmp_path)]) == 0
    assert cli.main(["eval", str(tmp_path)]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert cli.main(["sample", str(tmp_path), "--prompt", "é ab", "--tokens", "30"]) == 0
    assert capsys.readouterr().out.startswith("é ab")
    meanings = token_bytes("bpe", json.loads((tmp_path / "config.json").read_text()))
    assert sorted(meaning for meaning in meanings if len(meaning) == 1) == [bytes([i]) for i in range(256)]


def test_a_tokenizer_from_a_file(text, tmp_path, capsys, cache):
    tokenizers = pytest.importorskip("tokenizers")
    model = load_text(text, "bpe", 16, 280).tokenizer
    tokenizer = tokenizers.Tokenizer.from_str(model)
    tokenizer.add_special_tokens(["<｜end｜>"])
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    small = "--context 16 --layers 2 --width 16 --attention-heads 2 --epochs 1".split()
    assert cli.main(["train", "--data", str(text), "--tokens", str(file), *small, "--out", str(tmp_path / "run")]) == 0
    metadata = json.loads((tmp_path / "run" / "config.json").read_text())
    assert metadata["classes"][-1] == "<｜end｜>" and any(cache.glob("*.tokens"))
    assert token_bytes(str(file), metadata)[-1] == "<｜end｜>".encode()
    assert cli.main(["sample", str(tmp_path / "run"), "--prompt", "é ab", "--tokens", "30"]) == 0
    assert capsys.readouterr().out.count("é ab") == 1


def test_an_image_run_has_no_samples(tmp_path, capsys):
    out = tmp_path / "digits"
    words = "train --arch mlp --layout stagewise --depth 1 --epochs 1 --train-images 100 --out".split()
    assert cli.main([*words, str(out)]) == 0
    assert cli.main(["sample", str(out)]) == 2
    assert "holds no language model" in capsys.readouterr().err
