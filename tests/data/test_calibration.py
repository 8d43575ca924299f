from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer
from tokenizers import normalizers, processors
from transformers import PreTrainedTokenizerFast

from sppctl.data.calibration import Windows, calibration_windows, draw_windows
from sppctl.data.texts import Text
from sppctl.errors import UserError


def documents(count: int, length: int) -> list[str]:
    """Texts of ASCII letters, so of as many tokens as letters, of which no piece occurs in two of them."""
    return ["".join(chr(65 + (i * 7 + j * (i + 1)) % 57) for j in range(length)) for i in range(count)]


def draw(tokenizer: Any, text: Text, samples: int, **options: Any) -> Windows:
    return draw_windows(tokenizer, text, samples=samples, **({"seq_len": 20, "seed": 0} | options))


def decode(windows: Windows) -> list[str]:
    """The inverse of the byte tokenizer: its alphabet is sorted, printable ASCII from ``!`` on comes first."""
    return ["".join(chr(token + 33) for token in row) for row in windows.tokens.tolist()]


def test_windows_are_pieces_of_random_documents(tokenizer: PreTrainedTokenizerFast) -> None:
    text = Text("mine", documents(10, 100))
    drawn = draw(tokenizer, text, 6)
    assert drawn.kind == "random-document"
    assert (drawn.tokens.shape, drawn.tokens.dtype) == ((6, 20), torch.int64)
    sources = [[i for i, document in enumerate(text.documents) if piece in document] for piece in decode(drawn)]
    assert all(len(found) == 1 for found in sources)
    assert len({found[0] for found in sources}) == 6  # six different documents
    assert sources != [[i] for i in range(6)]  # in random order
    assert text.documents == documents(10, 100)  # and the text is as before


def test_short_documents_are_passed_over(tokenizer: PreTrainedTokenizerFast) -> None:
    long = documents(3, 30)  # hardly longer than a window
    text = Text("mine", [*("x" * length for length in range(1, 20)), *long, "y" * 20])
    drawn = draw(tokenizer, text, 3, seed=5)
    assert drawn.kind == "random-document"
    assert all(any(piece in document for document in long) for piece in decode(drawn))


@pytest.mark.parametrize(
    ("texts", "samples", "windows"),
    [(["a" * 50, "b" * 9, " ", "c" * 30], 4, "auto"), (documents(6, 50), 15, "concatenate")],
    ids=["too few long ones", "as configured"],
)
def test_documents_are_joined_in_random_order(
    texts: list[str], samples: int, windows: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    drawn = draw(tokenizer, Text("mine", texts, joiner="--"), samples, windows=windows)
    assert drawn.kind == "concatenate"
    joined = "".join(decode(drawn))
    assert len(joined) == 20 * samples
    pieces = [document + "--" for document in texts if document.strip()]
    assert any("".join(order).startswith(joined) for order in itertools.permutations(pieces))  # none twice or left out


def test_one_long_document_is_cut_into_windows_of_which_some_are_chosen(tokenizer: PreTrainedTokenizerFast) -> None:
    text = Text("mine", ["".join(f"{index:05}" for index in range(200))])  # every piece of 20 is another
    drawn = draw(tokenizer, text, 6)
    assert drawn.kind == "concatenate"
    places = [text.documents[0].index(piece) for piece in decode(drawn)]
    assert all(place % 20 == 0 for place in places)
    assert len(set(places)) == 6
    assert places != [0, 20, 40, 60, 80, 100]


@pytest.mark.parametrize("length", [100, 15])
def test_the_seed_decides(length: int, tokenizer: PreTrainedTokenizerFast) -> None:
    text = Text("mine", documents(30, length))
    assert torch.equal(draw(tokenizer, text, 4, seed=1).tokens, draw(tokenizer, text, 4, seed=1).tokens)
    assert not torch.equal(draw(tokenizer, text, 4, seed=1).tokens, draw(tokenizer, text, 4, seed=2).tokens)


def test_too_little_text_says_how_much_is_missing(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError) as caught:
        draw(tokenizer, Text("mine", ["abc", "defgh"]), 3)
    assert "mine has 12 tokens, 3 windows of 20 need 60; 48 are missing" in str(caught.value)  # 3 + 5 + 2 * "\n\n"
    with pytest.raises(UserError, match=r"mine has 100 tokens, 6 windows of 20 need 120; 20 are missing"):
        draw(tokenizer, Text("mine", documents(2, 50), joiner=""), 6, windows="concatenate")


@pytest.mark.parametrize("windows", ["random-document", "concatenate"])
def test_there_is_no_padding(windows: Any) -> None:
    padding = byte_tokenizer()
    padding.backend_tokenizer.enable_padding(pad_id=258, pad_token="<pad>", length=500)
    padding.backend_tokenizer.enable_truncation(8)
    drawn = draw(padding, Text("mine", documents(10, 50)), 4, windows=windows)
    assert drawn.kind == windows
    assert padding.pad_token_id == 258
    assert not (drawn.tokens == 258).any()


def test_padding_that_a_tokenizer_insists_on_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    def insists(document: str, **_: Any) -> Any:
        return tokenizer(document, padding="max_length", max_length=500)

    with pytest.raises(AssertionError, match="padding"):
        draw(insists, Text("mine", documents(10, 50)), 4)


def test_random_documents_do_not_fall_back(tokenizer: PreTrainedTokenizerFast) -> None:
    text = Text("mine", [*documents(3, 100), "x" * 20, "y" * 19])
    drawn = draw(tokenizer, text, 3, windows="random-document")
    assert torch.equal(drawn.tokens, draw(tokenizer, text, 3).tokens)
    with pytest.raises(UserError) as caught:
        draw(tokenizer, text, 4, windows="random-document")
    assert str(caught.value).startswith(
        "prune.calibration.windows: mine has 3 documents longer than 20 tokens, random-document needs 4: "
    )


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
    drawn = draw(marks, text, 20, seq_len=30)
    assert drawn.kind == "random-offset"
    pieces = [whole[start : start + 30] for start in range(len(whole) - 29)]
    starts = [pieces.index(row) for row in drawn.tokens.tolist()]
    assert len(set(starts)) > 15
    assert starts != sorted(starts)
    assert any(start % 30 for start in starts)
    assert torch.equal(draw(marks, text, 20, seq_len=30, windows="concatenate").tokens, drawn.tokens)
    with pytest.raises(UserError, match="random-document needs 20"):
        draw(marks, text, 20, seq_len=30, windows="random-document")
    with pytest.raises(UserError, match=rf"mine has {len(whole)} tokens, 40 windows of 30 need 1200; "):
        draw(marks, text, 40, seq_len=30)


def test_windows_are_identified_by_their_tokens() -> None:
    tokens = torch.arange(12).view(3, 4)
    assert Windows(tokens, "random-document").hash == Windows(tokens.clone(), "concatenate").hash
    # the layout in memory does not count
    assert Windows(tokens.t().contiguous().t(), "").hash == Windows(tokens, "").hash
    assert len({Windows(other, "").hash for other in (tokens, tokens + 1, tokens.view(4, 3))}) == 3


TEXT = Text("mine", documents(10, 50))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPPCTL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "windows"


class Counting:
    """A tokenizer that counts how often it is called."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.backend_tokenizer, self.tokenizer, self.calls = tokenizer.backend_tokenizer, tokenizer, 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        return self.tokenizer(*args, **options)


@pytest.fixture
def counting(tokenizer: PreTrainedTokenizerFast) -> Counting:
    return Counting(tokenizer)


def windows_of(tokenizer: Any, text: Text = TEXT, **options: Any) -> tuple[str, str]:
    windows = calibration_windows(tokenizer, text, **({"samples": 4, "seq_len": 20, "seed": 0} | options))
    return windows.hash, windows.kind


@pytest.mark.parametrize("windows", ["auto", "random-document", "concatenate"])
def test_the_second_time_nothing_is_tokenised(counting: Counting, cache: Path, windows: str) -> None:
    first = windows_of(counting, windows=windows)
    calls = counting.calls
    assert calls > 0
    drawn = draw(counting.tokenizer, TEXT, 4, windows=windows)
    assert first == (drawn.hash, drawn.kind) == windows_of(counting, windows=windows)
    assert first == windows_of(counting, Text("another name", list(TEXT.documents)), windows=windows)
    assert counting.calls == calls
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-8])
    assert windows_of(counting, windows=windows) == first
    assert counting.calls == 2 * calls


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
    lowercase = byte_tokenizer()
    lowercase.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert windows_of(lowercase) != windows_of(counting)
    assert len(list(cache.iterdir())) == len(others) + 1


def test_errors_and_windows_of_unknown_tokenizers_are_not_cached(
    tokenizer: PreTrainedTokenizerFast, cache: Path
) -> None:
    for _ in range(2):
        with pytest.raises(UserError, match="are missing"):
            windows_of(tokenizer, samples=100)
    assert windows_of(tokenizer.__call__)[1] == "random-document"
    assert not cache.exists()
