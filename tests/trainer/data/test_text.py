"""Text data: tokens, windows, held-out part, order by seed and epoch, and refusals."""

import tracemalloc

import numpy as np
import pytest
import torch

from sid_trainer.data import text as text_module
from sid_trainer.data.image_files import DataError
from sid_trainer.data.text import load_text

CPU = torch.device("cpu")


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_bytes_are_mapped_and_the_last_tenth_is_held_out(tmp_path):
    content = bytes(range(256)) * 4
    data = load_text(write(tmp_path / "a.txt", content), context=8)
    assert isinstance(data.train.tokens, np.memmap)
    assert bytes(data.train.tokens) + bytes(data.test.tokens) == content
    assert len(data.test.tokens) == len(content) // 10
    assert (len(data.classes), data.bytes_per_token) == (256, 1)


def test_bytes_are_not_copied(tmp_path):
    file = write(tmp_path / "a.txt", b"word " * 1_000_000)
    tracemalloc.start()
    load_text(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000


def test_characters_are_those_of_the_text(tmp_path):
    text = "añb€" * 60
    data = load_text(write(tmp_path / "a.txt", text), "characters", 4)
    assert data.classes == sorted(set(text))
    tokens = np.concatenate([data.train.tokens, data.test.tokens])
    assert "".join(data.classes[i] for i in tokens) == text
    assert data.bytes_per_token == (1 + 2 + 1 + 3) / 4


def test_the_text_files_of_a_folder_follow_each_other_by_name(tmp_path):
    write(tmp_path / "b.txt", b"b" * 100)
    write(tmp_path / "a.txt", b"a" * 100)
    write(tmp_path / ".hidden.txt", b"h" * 100)
    write(tmp_path / "notes.md", b"m" * 100)
    data = load_text(tmp_path, context=4)
    assert bytes(np.concatenate([data.train.tokens, data.test.tokens])) == b"a" * 100 + b"b" * 100


def test_targets_are_the_tokens_that_follow(tmp_path):
    data = load_text(write(tmp_path / "a.txt", bytes(i % 251 for i in range(2000))), context=16)
    batches = data.make_batches(data.train, 4, CPU, True)
    for order in (batches.in_order(), batches.shuffle(0, 1, 0, False)):
        sizes = []
        for inputs, targets in order:
            assert inputs.dtype == targets.dtype == torch.int64
            assert torch.equal((inputs.flatten() + 1) % 251, targets)
            sizes.append(len(targets))
        assert sizes == batches.sizes() and sum(sizes) == batches.count and len(sizes) == len(batches)


def test_every_epoch_has_its_own_order_and_goes_on_at_any_batch(tmp_path):
    data = load_text(write(tmp_path / "a.txt", bytes(i % 251 for i in range(2000))), context=16)
    batches = data.make_batches(data.train, 4, CPU, True)
    first, second, other = (
        [inputs for inputs, _ in batches.shuffle(seed, epoch, 0, False)] for seed, epoch in ((0, 1), (0, 2), (1, 1))
    )
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[0], other[0])
    later = [inputs for inputs, _ in batches.shuffle(0, 1, 0, False, start=3)]
    assert len(later) == len(first) - 3 and all(map(torch.equal, later, first[3:]))


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (b"a" * 100, {"context": 32}, "100 tokens are too few for a context of 32; 640 are needed"),
        (b"", {}, "0 tokens are too few"),
        (b"a" * 100, {"context": 0}, "context must be at least 1, not 0"),
        (b"a" * 50 + b"\xff" * 50, {"tokens": "characters", "context": 2}, "byte 50 is not UTF-8; use tokens 'bytes'"),
        (b"a" * 100, {"tokens": "words"}, "tokens must be one of bytes, characters, bpe, or a tokeni.*not 'words'"),
    ],
)
def test_refusals(tmp_path, content, arguments, message):
    with pytest.raises(DataError, match=message):
        load_text(write(tmp_path / "a.txt", content), **arguments)


def test_refused_paths(tmp_path):
    for path, message in (
        (None, "none was given"),
        (tmp_path / "no.txt", "neither a text"),
        (tmp_path, "neither a text"),
    ):
        with pytest.raises(DataError, match=message):
            load_text(path)
    with pytest.raises(ValueError, match="path must not be empty"):
        load_text("")


def test_byte_pairs_are_learned_from_the_training_part(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = "the cat sat on the mat, näive "
    text = words * 60 + "zyzzyva " * 40  # the last word is in the test part alone
    data = load_text(write(tmp_path / "a.txt", text), "bpe", 4, 270)
    tokenizer = tokenizers.Tokenizer.from_str(data.tokenizer)
    assert len(data.classes) == 270
    parts = [tokenizer.decode(part.tokens.tolist()) for part in (data.train, data.test)]
    assert "".join(parts) == text
    assert not any("zyz" in token for token in data.classes) and any("cat" in token for token in data.classes)
    assert data.bytes_per_token == pytest.approx(len(parts[1].encode()) / len(data.test.tokens))
    with pytest.raises(DataError, match="vocabulary must be more than the 256 bytes, not 256"):
        load_text(tmp_path / "a.txt", "bpe", 4, 256)


# ---------------------------------------------------------------- the cache of tokens


def tokens_of(data):
    return [part.tokens.tolist() for part in (data.train, data.test)]


@pytest.fixture
def encoded(monkeypatch):
    """Record the tokens of every text that is encoded."""
    made, encode = [], text_module.encode_text

    def recorded(text, tokens, vocabulary):
        made.append(tokens)
        return encode(text, tokens, vocabulary)

    monkeypatch.setattr(text_module, "encode_text", recorded)
    return made


@pytest.mark.parametrize("tokens", ["characters", "bpe"])
def test_tokens_are_encoded_once_and_mapped(tmp_path, encoded, tokens):
    pytest.importorskip("tokenizers")
    file, cache = write(tmp_path / "a.txt", "añb€ " * 100), tmp_path / "cache"
    plain = load_text(file, tokens, 4, 270)
    for _ in range(2):
        data = load_text(file, tokens, 4, 270, cache=cache)
        assert isinstance(data.train.tokens, np.memmap) and tokens_of(data) == tokens_of(plain)
        assert data.train.tokens.dtype == plain.train.tokens.dtype
        assert (data.classes, data.bytes_per_token, data.tokenizer) == (
            plain.classes,
            plain.bytes_per_token,
            plain.tokenizer,
        )
    assert encoded == [tokens] * 2  # without the cache, and into it
    load_text(file, tokens, 4, 271, cache=cache)
    assert len(encoded) == (3 if tokens == "bpe" else 2)  # another vocabulary matters to one only


def test_another_text_is_encoded_again_and_replaces_the_old_one(tmp_path, encoded):
    file, cache = write(tmp_path / "a.txt", "abcd " * 100), tmp_path / "cache"
    load_text(file, "characters", 4, cache=cache)
    write(file, "abcde" * 101)
    assert load_text(file, "characters", 4, cache=cache).classes == [*"abcde"]
    assert len(encoded) == len([*tmp_path.glob("cache/*")]) + 1 == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "token", "description"])
def test_damaged_tokens_are_encoded_again(tmp_path, encoded, damage):
    file, cache = write(tmp_path / "a.txt", "abcd " * 100), tmp_path / "cache"
    load_text(file, "characters", 4, cache=cache)
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    content = bytearray(whole)
    place = {"token": 7, "description": len(content) - 30}.get(damage)
    if place is not None:
        content[place] ^= 1
    kept.write_bytes(content[: {"cut": 99, "empty": 0}.get(damage)])
    data = load_text(file, "characters", 4, cache=cache)
    assert len(encoded) == 2 and tokens_of(data) == tokens_of(load_text(file, "characters", 4))
    assert kept.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_told(tmp_path, capsys):
    file, cache = write(tmp_path / "a.txt", "abcd " * 100), write(tmp_path / "file", "")
    data = load_text(file, "characters", 4, cache=cache)
    assert tokens_of(data) == tokens_of(load_text(file, "characters", 4))
    assert "the tokens were not cached" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "tokens must be a readable tokenizer file, not"),
        ("{}", "tokens must be a tokenizer file, not"),
        ("other", "tokens must be the file of a byte-level tokenizer, but"),
    ],
)
def test_refused_tokenizer_files(tmp_path, content, message):
    tokenizers = pytest.importorskip("tokenizers")
    file = tmp_path / "tokenizer.json"
    if content == "other":
        tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(str(file))
    elif content:
        write(file, content)
    with pytest.raises(DataError, match=message):
        load_text(write(tmp_path / "a.txt", "abcd " * 100), str(file), 4)
