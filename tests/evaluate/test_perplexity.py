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
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from sppctl import machine
from sppctl.errors import UserError
from sppctl.evaluate import perplexity
from sppctl.evaluate.perplexity import scored_tokens, summarise, text_windows, window_losses, window_sums
from sppctl.evaluate.results import Perplexity
from sppctl.model.checkpoint import load_model

CPU = torch.device("cpu")
SEQ_LEN = 32


@pytest.fixture(scope="module")
def text(text_file: Path) -> str:
    return text_file.read_text()[:200]


def load_sharp(directory: Path) -> Any:
    """A tiny random model whose logits are far from uniform (and, for Gemma 2, beyond the soft cap)."""
    model = load_model(directory, CPU, "float32")
    with torch.no_grad():
        model.get_output_embeddings().weight *= 40
    return model


@torch.no_grad()
def literal(model: Any, tokenizer: PreTrainedTokenizerFast, text: str, seq_len: int) -> float:
    """Perplexity as the literature's code computes it, from the whole logits."""
    tokens = torch.tensor([tokenizer(text).input_ids])
    count = tokens.shape[1] // seq_len
    losses = []
    for index in range(count):
        window = tokens[:, index * seq_len : (index + 1) * seq_len]
        logits = model(window).logits.float()
        loss = F.cross_entropy(logits[0, :-1], window[0, 1:])
        losses.append(loss * seq_len)
    return torch.exp(torch.stack(losses).sum() / (count * seq_len)).item()


def measure(model: Any, tokenizer: PreTrainedTokenizerFast, text: str, batch_size: int = 4) -> Perplexity:
    windows = text_windows(tokenizer, text, SEQ_LEN, None, "text")
    return summarise(torch.cat(list(window_losses(model, windows, batch_size))), SEQ_LEN)


# --- windows ----------------------------------------------------------------------------------------------------------


def test_windows_do_not_overlap_and_the_rest_is_dropped(tokenizer: PreTrainedTokenizerFast) -> None:
    windows = text_windows(tokenizer, "abcdefghij!", 4, None, "text")
    assert [tokenizer.decode(row) for row in windows] == ["abcd", "efgh"]


@pytest.mark.parametrize(("max_tokens", "count"), [(None, 2), (100, 2), (8, 2), (7, 1), (4, 1)])
def test_max_tokens_cuts_the_text(tokenizer: PreTrainedTokenizerFast, max_tokens: int | None, count: int) -> None:
    assert text_windows(tokenizer, "abcdefghij!", 4, max_tokens, "text").shape == (count, 4)


@pytest.mark.parametrize(("text", "max_tokens", "found"), [("abc", None, 3), ("abc", 5, 3), ("", None, 0)])
def test_less_than_one_window(
    tokenizer: PreTrainedTokenizerFast, text: str, max_tokens: int | None, found: int
) -> None:
    with pytest.raises(UserError, match=rf"eval\.perplexity: mine has {found} tokens, less than one window of 4"):
        text_windows(tokenizer, text, 4, max_tokens, "mine")


def test_a_limit_below_one_window_is_not_blamed_on_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"eval\.max_tokens: 2 is less than one window of 4; raise it"):
        text_windows(tokenizer, "abcdef", 4, 2, "mine")


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_literal_computation(
    make_checkpoint: Callable[..., Path], tokenizer: PreTrainedTokenizerFast, text: str, family: str
) -> None:
    model = load_sharp(make_checkpoint(family))
    found = measure(model, tokenizer, text)
    assert found.value == pytest.approx(literal(model, tokenizer, text, SEQ_LEN), rel=1e-5)
    assert (found.windows, found.tokens, found.seq_len) == (6, 6 * 31, 32)  # 200 tokens
    assert abs(math.log(found.value) - math.log(VOCAB)) > 0.1  # no model that knows nothing at all


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_is_run_in_pieces_for_every_family(make_checkpoint: Callable[..., Path], family: str) -> None:
    model = load_sharp(make_checkpoint(family))
    assert perplexity.head_is_last_step(model, torch.arange(8)[None])


def test_a_soft_cap_counts(make_checkpoint: Callable[..., Path], tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    model = load_sharp(make_checkpoint("gemma2"))
    assert model.config.final_logit_softcapping == 30
    capped = measure(model, tokenizer, text).nll
    model.config.final_logit_softcapping = None
    assert measure(model, tokenizer, text).nll != pytest.approx(capped, rel=1e-3)


@pytest.mark.parametrize("rows", [1, 7, 30, 31, 32])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_pieces_of_any_size_give_the_same(
    make_checkpoint: Callable[..., Path],
    tokenizer: PreTrainedTokenizerFast,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    rows: int,
) -> None:
    model = load_sharp(make_checkpoint(family))
    expected = measure(model, tokenizer, text).nll
    monkeypatch.setattr(perplexity, "LOGIT_ROWS", rows)
    monkeypatch.setattr(perplexity, "CPU_LOSS", 5 * VOCAB)  # five rows of them at a time
    assert measure(model, tokenizer, text).nll == pytest.approx(expected, rel=1e-6)


def test_logits_are_never_made_for_more_rows_than_set(
    llama: Path, tokenizer: PreTrainedTokenizerFast, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_sharp(llama)
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda _, __, logits: sizes.append(logits[..., 0].numel()))
    monkeypatch.setattr(perplexity, "LOGIT_ROWS", 8)
    measure(model, tokenizer, text)
    assert max(sizes) == 8


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_the_batch_size_does_not_matter(
    llama: Path, tokenizer: PreTrainedTokenizerFast, text: str, batch_size: int
) -> None:
    model = load_sharp(llama)
    windows = text_windows(tokenizer, text, SEQ_LEN, None, "text")
    batches = list(window_losses(model, windows, batch_size))
    assert [len(batch) for batch in batches] == [len(part) for part in windows.split(batch_size)]
    assert torch.allclose(torch.cat(batches), torch.cat(list(window_losses(model, windows, 4))), rtol=1e-5)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(
    llama: Path, tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    model = load_model(llama, CPU, "float32")
    nn.init.zeros_(model.lm_head.weight)
    found = measure(model, tokenizer, text)
    assert found.value == pytest.approx(VOCAB, rel=1e-6)
    assert found.stderr == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close(llama: Path, tokenizer: PreTrainedTokenizerFast, text: str, dtype: str) -> None:
    expected = measure(load_model(llama, CPU, "float32"), tokenizer, text).value
    assert measure(load_model(llama, CPU, dtype), tokenizer, text).value == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_a_head_that_is_not_the_last_step_is_noticed(
    llama: Path, tokenizer: PreTrainedTokenizerFast, text: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_sharp(llama)
    plain = measure(model, tokenizer, text).value
    forward = model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits * factor
        return output

    monkeypatch.setattr(model, "forward", scaled)
    assert not perplexity.head_is_last_step(model, torch.arange(8)[None])
    found = measure(model, tokenizer, text).value
    assert found == pytest.approx(literal(model, tokenizer, text, SEQ_LEN), rel=1e-5)
    assert found != pytest.approx(plain, rel=1e-3)


def test_a_head_of_another_size_is_noticed(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    own = model(torch.arange(8)[None]).logits

    def cut(input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=own[..., :200])

    model.forward = cut
    assert not perplexity.head_is_last_step(model, torch.arange(8)[None])


# --- overlapping windows ----------------------------------------------------------------------------------------------


@torch.no_grad()
def literal_sliding(model: Any, tokens: Tensor, seq_len: int, stride: int) -> tuple[float, int]:
    """Each token predicted once, from as much of its window as lies before it; one forward per token."""
    total, count, done = 0.0, 0, 1
    for start in range(0, len(tokens) - seq_len + 1, stride):
        for position in range(max(done, start + 1), start + seq_len):
            logits = model(tokens[None, start:position]).logits[0, -1].double()
            total -= logits.log_softmax(-1)[tokens[position]].item()
            count += 1
        done = start + seq_len
    return total / count, count


@pytest.mark.parametrize("stride", [1, 5, 16, 31])
def test_a_stride_scores_every_token_once_with_more_before_it(
    llama: Path, tokenizer: PreTrainedTokenizerFast, text: str, stride: int
) -> None:
    model = load_sharp(llama)
    windows = text_windows(tokenizer, text[:80], SEQ_LEN, None, "text", stride)
    found = summarise(
        torch.cat(list(window_sums(model, windows, 3, scored_tokens(len(windows), SEQ_LEN, stride)))), SEQ_LEN, stride
    )
    expected, count = literal_sliding(model, torch.tensor(tokenizer(text[:80]).input_ids), SEQ_LEN, stride)
    assert found.nll == pytest.approx(expected, rel=1e-5)
    assert (found.tokens, found.stride) == (count, stride)


def test_a_stride_of_a_window_is_no_overlap(llama: Path, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    model = load_sharp(llama)
    windows = text_windows(tokenizer, text, SEQ_LEN, None, "text", SEQ_LEN)
    assert torch.equal(windows, text_windows(tokenizer, text, SEQ_LEN, None, "text"))
    found = summarise(
        torch.cat(list(window_sums(model, windows, 4, scored_tokens(len(windows), SEQ_LEN, SEQ_LEN)))), SEQ_LEN, SEQ_LEN
    )
    assert found == measure(model, tokenizer, text)


# --- summary ----------------------------------------------------------------------------------------------------------


def test_summary_by_hand() -> None:
    # two windows of 5 tokens, 4 predicted each: mean losses 1 and 2
    found = summarise(torch.tensor([4.0, 8.0], dtype=torch.float64), 5)
    assert found.nll == 1.5
    assert found.value == pytest.approx(math.exp(1.5))
    assert found.stderr == pytest.approx(math.sqrt(0.5) / math.sqrt(2))  # standard deviation of (1, 2) over sqrt 2
    assert (found.tokens, found.windows, found.seq_len) == (8, 2, 5)


def test_one_window_has_no_standard_error() -> None:
    assert summarise(torch.tensor([4.0]), 5).stderr is None  # not NaN, which is no JSON


def test_a_hopeless_model_has_infinite_perplexity() -> None:
    assert summarise(torch.tensor([4e6]), 5).value == math.inf


def test_on_a_cpu_fewer_logits_are_made_for_a_large_vocabulary(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(llama, CPU, "float32")
    assert perplexity.logit_rows(model, torch.float32) == 512
    monkeypatch.setattr(perplexity, "CPU_LOGITS", 12 * VOCAB + 1)
    assert perplexity.logit_rows(model, torch.float32) == 3
    assert perplexity.logit_rows(model, torch.bfloat16) == 6
    monkeypatch.setattr(perplexity, "CPU_LOGITS", VOCAB - 1)
    assert perplexity.logit_rows(model, torch.bfloat16) == 1


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_batch_that_does_not_fit_is_halved(llama: Path, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    model = load_sharp(llama)
    windows = text_windows(tokenizer, text, SEQ_LEN, None, "text")
    expected = torch.cat(list(window_losses(model, windows, 1)))
    forward, refused = model.base_model.forward, []

    def small_device(input_ids: Tensor, **options: Any) -> Any:
        if len(input_ids) > 2:
            refused.append(len(input_ids))
            raise torch.OutOfMemoryError
        return forward(input_ids=input_ids, **options)

    model.base_model.forward = small_device
    assert torch.cat(list(window_losses(model, windows, 6))) == pytest.approx(expected, rel=1e-6)
    assert refused == [6, 3, 3]


def test_whole_logits_come_for_as_many_windows_as_fit(
    llama: Path, tokenizer: PreTrainedTokenizerFast, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_sharp(llama)
    windows = text_windows(tokenizer, text, SEQ_LEN, None, "text")
    monkeypatch.setattr(perplexity, "head_is_last_step", lambda *_: False)
    monkeypatch.setattr(machine, "free_memory", lambda _: 2 * 5 * SEQ_LEN * VOCAB * 4 * 2)
    assert [len(losses) for losses in window_losses(model, windows, 6)] == [5, 1]


def test_no_windows(llama: Path) -> None:
    assert not list(window_sums(load_model(llama, CPU, "float32"), torch.zeros(0, SEQ_LEN, dtype=torch.int64), 4))
