from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import normalizers, processors
from transformers import PreTrainedTokenizerFast

from sppctl.data.calibration import Windows, calibration_windows, draw_windows
from sppctl.data.texts import Text
from sppctl.errors import UserError
from sppctl.files import cache as cache_files
from sppctl.files.cache import tokenizer_identity


def documents(count: int, length: int) -> list[str]:
    """Texts of ASCII letters, so of as many tokens as letters, of which no piece occurs in two of them."""
    return ["".join(chr(65 + (i * 7 + j * (i + 1)) % 57) for j in range(length)) for i in range(count)]


def test_windows_are_pieces_of_random_documents(tokenizer: PreTrainedTokenizerFast) -> None:
    text = Text("mine", documents(10, 100))
    drawn = draw_windows(tokenizer, text, samples=6, seq_len=20, seed=0)
    assert drawn.made == "random-document"
    assert drawn.tokens.shape == (6, 20)
    sources = [[i for i, document in enumerate(text.documents) if piece in document] for piece in decode(drawn.tokens)]
    assert all(len(found) == 1 for found in sources)
    assert len({found[0] for found in sources}) == 6  # six different documents
    assert sources != [[i] for i in range(6)]  # in random order


def decode(windows: Any) -> list[str]:
    return ["".join(map(chr, bytes_of(row))) for row in windows.tolist()]


def bytes_of(tokens: list[int]) -> list[int]:
    """The inverse of the byte tokenizer: its alphabet is sorted, printable ASCII from ``!`` on comes first."""
    return [token + 33 for token in tokens]


def test_a_document_may_be_hardly_longer_than_a_window(tokenizer: PreTrainedTokenizerFast) -> None:
    drawn = draw_windows(tokenizer, Text("mine", documents(4, 30)), samples=4, seq_len=20, seed=0)
    assert drawn.made == "random-document"
    assert drawn.tokens.shape == (4, 20)


def test_short_documents_are_passed_over(tokenizer: PreTrainedTokenizerFast) -> None:
    long = documents(3, 100)
    text = Text("mine", [*("x" * length for length in range(1, 20)), *long, "y" * 20])
    drawn = draw_windows(tokenizer, text, samples=3, seq_len=20, seed=5)
    assert drawn.made == "random-document"
    assert all(any(piece in document for document in long) for piece in decode(drawn.tokens))


def test_too_few_long_documents_are_joined(tokenizer: PreTrainedTokenizerFast) -> None:
    text = Text("mine", ["a" * 50, "b" * 9, " ", "c" * 30], joiner="--")
    drawn = draw_windows(tokenizer, text, samples=4, seq_len=20, seed=0)
    assert drawn.made == "concatenate"
    joined = "".join(decode(drawn.tokens))
    assert len(joined) == 80
    pieces = [document + "--" for document in text.documents if document.strip()]
    orders = [[a, b, c] for a in pieces for b in pieces for c in pieces if len({a, b, c}) == 3]
    assert any("".join(order).startswith(joined) for order in orders)  # none twice, none left out


def test_one_long_document_is_cut_into_windows_of_which_some_are_chosen(tokenizer: PreTrainedTokenizerFast) -> None:
    text = Text("mine", ["".join(f"{index:05}" for index in range(200))])  # every piece of 20 is another
    drawn = draw_windows(tokenizer, text, samples=6, seq_len=20, seed=0)
    assert drawn.made == "concatenate"
    places = [text.documents[0].index(piece) for piece in decode(drawn.tokens)]
    assert all(place % 20 == 0 for place in places)
    assert len(set(places)) == 6
    assert places != [0, 20, 40, 60, 80, 100]


def test_the_seed_decides(tokenizer: PreTrainedTokenizerFast) -> None:
    def windows(seed: int, text: Text) -> list[list[int]]:
        return draw_windows(tokenizer, text, samples=4, seq_len=20, seed=seed).tokens.tolist()

    for text in (Text("long", documents(30, 100)), Text("short", documents(30, 15))):
        assert windows(1, text) == windows(1, text)
        assert windows(1, text) != windows(2, text)


def test_choosing_windows_leaves_the_text_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    text = Text("mine", documents(10, 100))
    before = list(text.documents)
    draw_windows(tokenizer, text, samples=4, seq_len=20, seed=0)
    assert text.documents == before


def test_too_little_text_says_how_much_is_missing(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError) as caught:
        draw_windows(tokenizer, Text("mine", ["abc", "defgh"]), samples=3, seq_len=20, seed=0)
    assert "mine has 12 tokens, 3 windows of 20 need 60; 48 are missing" in str(caught.value)  # 3 + 5 + 2 * "\n\n"


PAD = 258


@pytest.mark.parametrize("windows", ["random-document", "concatenate"])
def test_there_is_no_padding(windows: Any) -> None:
    padding = byte_tokenizer()
    assert padding.pad_token_id == PAD
    padding.backend_tokenizer.enable_padding(pad_id=PAD, pad_token="<pad>", length=500)
    padding.backend_tokenizer.enable_truncation(8)
    text = Text("mine", documents(10, 50))
    drawn = draw_windows(padding, text, samples=4, seq_len=20, seed=0, windows=windows)
    assert drawn.made == windows
    assert drawn.tokens.dtype == torch.int64
    assert not (drawn.tokens == PAD).any()


def test_padding_that_a_tokenizer_insists_on_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    def insists(document: str, **_: Any) -> Any:
        return tokenizer(document, padding="max_length", max_length=500)

    with pytest.raises(AssertionError, match="padding"):
        draw_windows(insists, Text("mine", documents(10, 50)), samples=4, seq_len=20, seed=0)


# --- how windows are made ---------------------------------------------------------------------------------------------


def test_random_documents_do_not_fall_back(tokenizer: PreTrainedTokenizerFast) -> None:
    text = Text("mine", [*documents(3, 100), "x" * 20, "y" * 19])
    options: dict[str, Any] = {"seq_len": 20, "seed": 0, "windows": "random-document"}
    drawn = draw_windows(tokenizer, text, samples=3, **options)
    assert torch.equal(drawn.tokens, draw_windows(tokenizer, text, samples=3, seq_len=20, seed=0).tokens)
    with pytest.raises(UserError) as caught:
        draw_windows(tokenizer, text, samples=4, **options)
    assert str(caught.value).startswith(
        "prune.calibration.windows: mine has 3 documents longer than 20 tokens, random-document needs 4: "
    )


def test_concatenate_joins_long_documents_too(tokenizer: PreTrainedTokenizerFast) -> None:
    text = Text("mine", documents(6, 50), joiner="--")
    drawn = draw_windows(tokenizer, text, samples=15, seq_len=20, seed=0, windows="concatenate")
    assert drawn.made == "concatenate"
    joined = "".join(decode(drawn.tokens))
    pieces = [document + "--" for document in text.documents]
    assert any("".join(order).startswith(joined) for order in itertools.permutations(pieces))


def test_concatenate_with_too_little_text(tokenizer: PreTrainedTokenizerFast) -> None:
    text = Text("mine", documents(2, 50), joiner="")
    with pytest.raises(UserError, match=r"mine has 100 tokens, 6 windows of 20 need 120; 20 are missing"):
        draw_windows(tokenizer, text, samples=6, seq_len=20, seed=0, windows="concatenate")


def test_a_running_text_is_joined_in_its_order_and_tokenised_once() -> None:
    marks = byte_tokenizer()
    marks.add_special_tokens({"bos_token": "<s>"})
    marks._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", marks.bos_token_id)]
    )
    paragraphs = ["", " = Title = \n", *documents(40, 15)]
    text = Text("mine", paragraphs, joiner="\n\n", running=True)
    whole = marks("\n\n".join(paragraphs))["input_ids"]
    assert whole.count(marks.bos_token_id) == 1
    drawn = draw_windows(marks, text, samples=20, seq_len=30, seed=0)
    assert drawn.made == "random-offset"
    pieces = [whole[start : start + 30] for start in range(len(whole) - 29)]
    starts = [pieces.index(row) for row in drawn.tokens.tolist()]
    assert len(set(starts)) > 15
    assert starts != sorted(starts)
    assert any(start % 30 for start in starts)
    assert torch.equal(draw_windows(marks, text, samples=20, seq_len=30, seed=0).tokens, drawn.tokens)
    concatenated = draw_windows(marks, text, samples=20, seq_len=30, seed=0, windows="concatenate")
    assert torch.equal(concatenated.tokens, drawn.tokens)
    with pytest.raises(UserError, match="random-document needs 20"):
        draw_windows(marks, text, samples=20, seq_len=30, seed=0, windows="random-document")
    with pytest.raises(UserError, match=rf"mine has {len(whole)} tokens, 40 windows of 30 need 1200; "):
        draw_windows(marks, text, samples=40, seq_len=30, seed=0)


def test_windows_are_identified_by_their_tokens() -> None:
    tokens = torch.arange(12).view(3, 4)
    assert Windows(tokens, "random-document").hash == Windows(tokens.clone(), "concatenate").hash
    # the layout in memory does not count
    assert Windows(tokens.t().contiguous().t(), "").hash == Windows(tokens, "").hash
    assert len({Windows(other, "").hash for other in (tokens, tokens + 1, tokens.view(4, 3))}) == 3


# --- the cache --------------------------------------------------------------------------------------------------------


class Counting:
    """A tokenizer that counts how often it is called."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.backend_tokenizer = tokenizer.backend_tokenizer
        self.tokenizer = tokenizer
        self.calls = 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        return self.tokenizer(*args, **options)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPPCTL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "windows"


@pytest.fixture
def counting(tokenizer: PreTrainedTokenizerFast) -> Counting:
    return Counting(tokenizer)


TEXT = Text("mine", documents(10, 50))


def windows_of(tokenizer: Any, text: Text = TEXT, **options: Any) -> Windows:
    return calibration_windows(tokenizer, text, **({"samples": 4, "seq_len": 20, "seed": 0} | options))


def equal(a: Windows, b: Windows) -> bool:
    return torch.equal(a.tokens, b.tokens) and a.made == b.made and a.hash == b.hash


@pytest.mark.parametrize("windows", ["auto", "random-document", "concatenate"])
def test_the_second_time_nothing_is_tokenised(counting: Counting, cache: Path, windows: str) -> None:
    first = windows_of(counting, windows=windows)
    calls = counting.calls
    assert calls > 0
    assert equal(first, draw_windows(counting.tokenizer, TEXT, samples=4, seq_len=20, seed=0, windows=windows))
    assert equal(first, windows_of(counting, windows=windows))
    assert equal(first, windows_of(counting, Text("another name", list(TEXT.documents)), windows=windows))
    assert counting.calls == calls
    (file,) = cache.iterdir()
    assert torch.equal(load_file(file)["windows"], first.tokens)


def test_whatever_matters_makes_other_windows(counting: Counting, cache: Path) -> None:
    others: list[tuple[Text, dict[str, Any]]] = [
        (TEXT, {}),
        (Text("mine", TEXT.documents[::-1]), {}),
        (Text("mine", TEXT.documents, joiner="--"), {}),
        (Text("mine", TEXT.documents, running=True), {}),
        (TEXT, {"samples": 5}),
        (TEXT, {"seq_len": 21}),
        (TEXT, {"seed": 1}),
        (TEXT, {"windows": "concatenate"}),
    ]
    for number, (text, options) in enumerate(others, start=1):
        before = counting.calls
        windows_of(counting, text, **options)
        assert counting.calls > before
        assert len(list(cache.iterdir())) == number


def test_another_tokenizer_makes_other_windows(tokenizer: PreTrainedTokenizerFast, cache: Path) -> None:
    lowercase = byte_tokenizer()
    lowercase.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert windows_of(tokenizer).hash != windows_of(lowercase).hash
    assert len(list(cache.iterdir())) == 2


def test_a_tokenizer_is_identified_by_what_it_does() -> None:
    one, other = byte_tokenizer(), byte_tokenizer()
    identity = tokenizer_identity(one)
    assert identity == tokenizer_identity(other)
    other(["a", "bc"], padding=True, truncation=True, max_length=2)  # how it was called before does not count
    assert identity == tokenizer_identity(other)
    other.add_tokens(["bc"])
    assert identity != tokenizer_identity(other)


class Slow:
    """A tokenizer in Python: letters by their numbers."""

    special_tokens_map = {"eos_token": "</s>"}

    def __init__(self, first: int = 0, lowercase: bool = False) -> None:
        self.vocabulary = {chr(first + i): i for i in range(128)}
        self.lowercase = lowercase

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [self.vocabulary[c] for c in (text.lower() if self.lowercase else text)]}


def test_slow_tokenizers_are_identified_by_vocabulary_and_settings(cache: Path) -> None:
    assert tokenizer_identity(Slow()) == tokenizer_identity(Slow())
    assert len({tokenizer_identity(each) for each in (Slow(), Slow(1), Slow(lowercase=True))}) == 3
    assert equal(windows_of(Slow()), windows_of(Slow()))
    assert len(list(cache.iterdir())) == 1


def test_nothing_is_cached_for_a_tokenizer_that_cannot_be_identified(cache: Path) -> None:
    class NoVocabulary(Slow):
        def get_vocab(self) -> dict[str, int]:
            raise NotImplementedError

    for unknown in (NoVocabulary(), Slow().__call__):
        assert tokenizer_identity(unknown) is None
        assert equal(windows_of(unknown), draw_windows(Slow(), TEXT, samples=4, seq_len=20, seed=0))
    assert not cache.exists()


def test_errors_are_not_cached(tokenizer: PreTrainedTokenizerFast, cache: Path) -> None:
    for _ in range(2):
        with pytest.raises(UserError, match="are missing"):
            windows_of(tokenizer, samples=100)
    assert not cache.exists()


def rewrite(file: Path, **changes: Any) -> None:
    kept: dict[str, Any] = {"tokens": load_file(file)["windows"].clone(), "name": "windows"}
    kept |= {"made": "random-document"} | changes
    tensors = {kept["name"]: kept["tokens"]}
    save_file(tensors, file, {"made": kept["made"], "hash": cache_files.seal(file, tensors, {"made": kept["made"]})})


DAMAGES = {
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-8]),
    "no safetensors": lambda file: file.write_text("nothing of the kind"),
    "other tokens": lambda file: file.write_bytes(file.read_bytes()[:-8] + b"\1\0\0\0\0\0\0\0"),
    "other shape": lambda file: rewrite(file, tokens=torch.zeros(3, 20, dtype=torch.int64)),
    "other dtype": lambda file: rewrite(file, tokens=torch.zeros(4, 20, dtype=torch.int32)),
    "other name": lambda file: rewrite(file, name="tokens"),
    "nothing about it": lambda file: save_file(load_file(file), file),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_made_anew(counting: Counting, cache: Path, damage: str) -> None:
    first = windows_of(counting)
    (file,) = cache.iterdir()
    calls = counting.calls
    DAMAGES[damage](file)
    assert equal(windows_of(counting), first)
    assert counting.calls == 2 * calls
    assert list(cache.iterdir()) == [file]
    assert torch.equal(load_file(file)["windows"], first.tokens)
    assert equal(windows_of(counting), first)
    assert counting.calls == 2 * calls


def test_a_cache_that_cannot_be_written_costs_nothing(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPPCTL_CACHE", str(tmp_path / "file"))
    expected = draw_windows(tokenizer, TEXT, samples=4, seq_len=20, seed=0)
    assert equal(windows_of(tokenizer), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_costs_nothing_and_leaves_nothing(
    counting: Counting, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        first = windows_of(counting)
    assert list(cache.iterdir()) == []
    assert equal(windows_of(counting), first)


def test_the_cache_lies_in_the_home_directory_unless_told(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SPPCTL_CACHE", "")
    windows_of(tokenizer)
    assert len(list((tmp_path / ".cache" / "sppctl" / "windows").iterdir())) == 1


def test_no_home_directory_no_cache(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SPPCTL_CACHE")
    monkeypatch.setattr(Path, "expanduser", homeless)
    assert windows_of(tokenizer).tokens.shape == (4, 20)
