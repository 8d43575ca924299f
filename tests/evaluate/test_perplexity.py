from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES, VOCAB
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from sppctl import machine
from sppctl.data.texts import Text
from sppctl.errors import UserError
from sppctl.evaluate import perplexity
from sppctl.evaluate.perplexity import (
    scored_tokens,
    summarise,
    text_windows,
    window_losses,
    window_sums,
    windows_of_text,
)
from sppctl.evaluate.results import TextNumbers
from sppctl.model.checkpoint import load_model

CPU = torch.device("cpu")
SEQ_LEN = 32
PROBE = torch.arange(8)[None]


@pytest.fixture(scope="module")
def tokens(text_file: Path, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    return torch.tensor(tokenizer(text_file.read_text()).input_ids)[:200]


@pytest.fixture(scope="module")
def windows(tokens: Tensor) -> Tensor:
    return tokens.unfold(0, SEQ_LEN, SEQ_LEN)


def load_sharp(directory: Path) -> Any:
    """A tiny random model whose logits are far from uniform (and, for Gemma 2, beyond the soft cap)."""
    model = load_model(directory, CPU, "float32")
    with torch.no_grad():
        model.get_output_embeddings().weight *= 40
    return model


@pytest.fixture
def sharp(llama: Path) -> Any:
    return load_sharp(llama)


@torch.no_grad()
def literal(model: Any, windows: Tensor) -> float:
    """Perplexity as the literature's code computes it, from the whole logits."""
    losses = []
    for window in windows:
        logits = model(window[None]).logits.float()
        losses.append(F.cross_entropy(logits[0, :-1], window[1:]) * len(window))
    return torch.exp(torch.stack(losses).sum() / windows.numel()).item()


def measure(model: Any, windows: Tensor, batch_size: int = 4) -> TextNumbers:
    return summarise(torch.cat(list(window_losses(model, windows, batch_size))), SEQ_LEN)


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_tokens", "count"), [(None, 2), (100, 2), (8, 2), (7, 1), (4, 1)])
def test_windows_do_not_overlap_and_the_rest_is_dropped(
    tokenizer: PreTrainedTokenizerFast, max_tokens: int | None, count: int
) -> None:
    windows = text_windows(tokenizer, "abcdefghij!", 4, max_tokens, "text")
    assert [tokenizer.decode(row) for row in windows] == ["abcd", "efgh"][:count]


@pytest.mark.parametrize(("limit", "max_tokens", "count"), [(None, None, 3), (2, None, 2), (2, 4, 1), (9, 8, 2)])
def test_a_text_may_have_a_number_of_windows(
    tokenizer: PreTrainedTokenizerFast, limit: int | None, max_tokens: int | None, count: int
) -> None:
    text = Text("c4", ["abcd", "fghi", "klm"], joiner="!", windows=limit)
    windows = windows_of_text(tokenizer, text, 4, max_tokens)
    assert [tokenizer.decode(row) for row in windows] == ["abcd", "!fgh", "i!kl"][:count]


@pytest.mark.parametrize(
    ("text", "max_tokens", "problem"),
    [
        ("abc", None, r"eval\.perplexity: mine has 3 tokens, less than one window of 4"),
        ("abc", 5, r"eval\.perplexity: mine has 3 tokens, less than one window of 4"),
        ("", None, r"eval\.perplexity: mine has 0 tokens, less than one window of 4"),
        ("abcdef", 2, r"eval\.max_tokens: 2 is less than one window of 4; raise it"),  # not the text's fault
    ],
)
def test_less_than_one_window(
    tokenizer: PreTrainedTokenizerFast, text: str, max_tokens: int | None, problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        text_windows(tokenizer, text, 4, max_tokens, "mine")


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_literal_computation_without_all_logits_at_once(
    make_checkpoint: Callable[..., Path], windows: Tensor, family: str
) -> None:
    model = load_sharp(make_checkpoint(family))
    assert perplexity.head_is_last_step(model, PROBE)
    numbers = measure(model, windows)
    assert numbers.value == pytest.approx(literal(model, windows), rel=1e-5)
    assert (numbers.windows, numbers.tokens, numbers.seq_len) == (6, 6 * 31, 32)
    assert abs(math.log(numbers.value) - math.log(VOCAB)) > 0.1  # no model that knows nothing at all


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_pieces_of_any_size_give_the_same(
    make_checkpoint: Callable[..., Path], windows: Tensor, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    model = load_sharp(make_checkpoint(family))
    expected = measure(model, windows).nll
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda _, __, logits: sizes.append(logits[..., 0].numel()))
    monkeypatch.setattr(perplexity, "CPU_LOSS", 5 * VOCAB)  # five rows of logits at a time
    for rows in (8, 1, 7, 30, 31, 32):
        sizes.clear()
        monkeypatch.setattr(perplexity, "LOGIT_ROWS", rows)
        assert measure(model, windows).nll == pytest.approx(expected, rel=1e-6)
        assert max(sizes) == min(max(rows, PROBE.numel()), 31)


def test_the_batch_size_does_not_matter(sharp: Any, windows: Tensor) -> None:
    expected = torch.cat(list(window_losses(sharp, windows, 4)))
    for batch_size in (1, 2, 100):
        batches = list(window_losses(sharp, windows, batch_size))
        assert [len(batch) for batch in batches] == [len(part) for part in windows.split(batch_size)]
        assert torch.allclose(torch.cat(batches), expected, rtol=1e-5)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(sharp: Any, windows: Tensor) -> None:
    nn.init.zeros_(sharp.lm_head.weight)
    numbers = measure(sharp, windows)
    assert (numbers.value, numbers.stderr) == (pytest.approx(VOCAB, rel=1e-6), pytest.approx(0, abs=1e-6))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close(llama: Path, windows: Tensor, dtype: str) -> None:
    expected = measure(load_model(llama, CPU, "float32"), windows).value
    assert measure(load_model(llama, CPU, dtype), windows).value == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_a_head_that_is_not_the_last_step_is_noticed(
    sharp: Any, windows: Tensor, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, forward = measure(sharp, windows).value, sharp.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits * factor
        return output

    monkeypatch.setattr(sharp, "forward", scaled)
    assert not perplexity.head_is_last_step(sharp, PROBE)
    value = measure(sharp, windows).value
    assert value == pytest.approx(literal(sharp, windows), rel=1e-5)
    assert value != pytest.approx(plain, rel=1e-3)


def test_a_head_of_another_size_is_noticed(sharp: Any) -> None:
    logits = sharp(PROBE).logits
    sharp.forward = lambda *_, **__: SimpleNamespace(logits=logits[..., :200])
    assert not perplexity.head_is_last_step(sharp, PROBE)


# --- overlapping windows ----------------------------------------------------------------------------------------------


@torch.no_grad()
def literal_sliding(model: Any, tokens: Tensor, stride: int) -> tuple[float, int]:
    """Each token predicted once, from as much of its window as is before it; one forward per token."""
    total, count, done = 0.0, 0, 1
    for start in range(0, len(tokens) - SEQ_LEN + 1, stride):
        for position in range(max(done, start + 1), start + SEQ_LEN):
            logits = model(tokens[None, start:position]).logits[0, -1].double()
            total -= logits.log_softmax(-1)[tokens[position]].item()
            count += 1
        done = start + SEQ_LEN
    return total / count, count


@pytest.mark.parametrize("stride", [1, 5, 16, 31, 32])
def test_a_stride_scores_every_token_once_with_more_before_it(
    sharp: Any, tokens: Tensor, tokenizer: PreTrainedTokenizerFast, stride: int
) -> None:
    windows = text_windows(tokenizer, tokenizer.decode(tokens[:80]), SEQ_LEN, None, "text", stride)
    scored = scored_tokens(len(windows), SEQ_LEN, stride)
    numbers = summarise(torch.cat(list(window_sums(sharp, windows, 3, scored))), SEQ_LEN, stride)
    expected, count = literal_sliding(sharp, tokens[:80], stride)
    assert numbers.nll == pytest.approx(expected, rel=1e-5)
    assert (numbers.tokens, numbers.stride) == (count, stride)


# --- summary ----------------------------------------------------------------------------------------------------------


def test_summary_by_hand() -> None:
    # two windows of 5 tokens, 4 predicted each: mean losses 1 and 2
    numbers = summarise(torch.tensor([4.0, 8.0], dtype=torch.float64), 5)
    assert (numbers.nll, numbers.value) == (1.5, pytest.approx(math.exp(1.5)))
    assert numbers.stderr == pytest.approx(math.sqrt(0.5) / math.sqrt(2))  # standard deviation of (1, 2) over sqrt 2
    assert (numbers.tokens, numbers.windows, numbers.seq_len, numbers.kl) == (8, 2, 5, None)
    assert summarise(torch.tensor([4.0]), 5).stderr is None  # of one window; not NaN, which is no JSON
    assert summarise(torch.tensor([4e6]), 5).value == math.inf


# --- memory -----------------------------------------------------------------------------------------------------------


def test_on_a_cpu_fewer_logits_are_made_for_a_large_vocabulary(sharp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert perplexity.logit_rows(sharp, torch.float32) == 512
    monkeypatch.setattr(perplexity, "CPU_LOGITS", 12 * VOCAB + 1)
    assert [perplexity.logit_rows(sharp, dtype) for dtype in (torch.float32, torch.bfloat16)] == [3, 6]
    monkeypatch.setattr(perplexity, "CPU_LOGITS", VOCAB - 1)
    assert perplexity.logit_rows(sharp, torch.bfloat16) == 1


def test_a_batch_that_does_not_fit_is_halved(sharp: Any, windows: Tensor) -> None:
    expected = torch.cat(list(window_losses(sharp, windows, 1)))
    forward, refused = sharp.base_model.forward, []

    def small_device(input_ids: Tensor, **options: Any) -> Any:
        if len(input_ids) > 2:
            refused.append(len(input_ids))
            raise torch.OutOfMemoryError
        return forward(input_ids=input_ids, **options)

    sharp.base_model.forward = small_device
    assert torch.cat(list(window_losses(sharp, windows, 6))) == pytest.approx(expected, rel=1e-6)
    assert refused == [6, 3, 3]


def test_whole_logits_come_for_as_many_windows_as_fit(
    sharp: Any, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexity, "head_is_last_step", lambda *_: False)
    monkeypatch.setattr(machine, "free_memory", lambda _: 2 * 5 * SEQ_LEN * VOCAB * 4 * 2)
    assert [len(losses) for losses in window_losses(sharp, windows, 6)] == [5, 1]


def test_no_windows(sharp: Any) -> None:
    assert not list(window_sums(sharp, torch.zeros(0, SEQ_LEN, dtype=torch.int64), 4))
