"""The distance to a dense model, against the literal formula on whole logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES
from torch import Tensor
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig

from sppctl.errors import StageError, UserError
from sppctl.evaluate import perplexity
from sppctl.evaluate.divergence import Reference, divergence
from sppctl.evaluate.perplexity import scored_tokens, summarise, window_sums
from sppctl.evaluate.results import Perplexity
from sppctl.model.checkpoint import load_model

CPU = torch.device("cpu")
WINDOWS = torch.randint(0, 250, (5, 24), generator=torch.Generator().manual_seed(3))


def load(directory: Path, change: float = 0.0) -> Any:
    """A tiny random model with sharp predictions; ``change`` disturbs its blocks as pruning does."""
    model = load_model(directory, CPU, "float32")
    torch.manual_seed(1)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(5)
        for parameter in model.base_model.parameters():
            if parameter.dim() > 1 and change:
                parameter.add_(torch.randn_like(parameter) * parameter.std() * change)
    return model


@torch.no_grad()
def literal(dense: Any, sparse: Any, windows: Tensor) -> tuple[float, float]:
    """Mean KL and agreement over the positions that predict a token of their window, in float64."""
    p = dense(windows).logits[:, :-1].double().log_softmax(-1)
    q = sparse(windows).logits[:, :-1].double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    return kl.mean().item(), (p.argmax(-1) == q.argmax(-1)).double().mean().item()


def compare(dense: Any, sparse: Any, file: Path, stride: int | None = None, batch_size: int = 2) -> Perplexity:
    reference = Reference(dense, WINDOWS, batch_size, file)

    def against(window: int, start: int, stop: int, logits: Tensor) -> tuple[float, int]:
        return divergence(reference.log_probs(window, start, stop), logits)

    scored = scored_tokens(len(WINDOWS), WINDOWS.shape[1], stride)
    sums = torch.cat(list(window_sums(sparse, WINDOWS, batch_size, scored, against)))
    return summarise(sums, WINDOWS.shape[1], stride, compared=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_literal_formula(make_checkpoint: Callable[..., Path], tmp_path: Path, family: str) -> None:
    dense, sparse = load(make_checkpoint(family)), load(make_checkpoint(family), change=1.0)
    found = compare(dense, sparse, tmp_path / "hidden.bin")
    kl, agreement = literal(dense, sparse, WINDOWS)
    assert found.kl == pytest.approx(kl, rel=1e-4)
    assert found.kl > 1e-3
    assert found.top1_agreement == pytest.approx(agreement)
    assert agreement < 1 or dense.config.tie_word_embeddings  # tied, random models repeat the token before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_does_not_differ_from_itself(llama: Path, tmp_path: Path, dtype: str) -> None:
    model = load_model(llama, CPU, dtype)
    found = compare(model, model, tmp_path / "hidden.bin")
    assert (found.kl, found.kl_stderr, found.top1_agreement) == (0, 0, 1)


def test_pieces_and_batches_do_not_matter(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, sparse = load(llama), load(llama, change=0.3)
    whole = compare(dense, sparse, tmp_path / "one.bin")
    monkeypatch.setattr(perplexity, "LOGIT_ROWS", 7)
    pieces = compare(dense, sparse, tmp_path / "two.bin", batch_size=4)
    assert (pieces.kl, pieces.nll) == pytest.approx((whole.kl, whole.nll), rel=1e-5)


def test_overlapping_windows_count_a_token_once(llama: Path, tmp_path: Path) -> None:
    dense, sparse = load(llama), load(llama, change=0.3)
    found = compare(dense, sparse, tmp_path / "hidden.bin", stride=10)
    p, q = (model(WINDOWS).logits.detach().double().log_softmax(-1) for model in (dense, sparse))
    kl = (p.exp() * (p - q)).sum(-1)
    expected = torch.cat([kl[0, :-1], kl[1:, -11:-1].flatten()])
    assert found.kl == pytest.approx(expected.mean().item(), rel=1e-4)
    assert found.tokens == len(expected) == 23 + 4 * 10


def test_without_a_reference_there_is_no_divergence(llama: Path) -> None:
    found = summarise(torch.cat(list(window_sums(load(llama), WINDOWS, 2))), 24)
    assert (found.kl, found.top1_agreement) == (None, None)


def test_a_head_that_is_not_the_last_step_cannot_be_a_reference(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(llama)
    forward = model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(model, "forward", scaled)
    with pytest.raises(UserError, match=r"eval\.divergence: llama changes its logits"):
        Reference(model, WINDOWS, 2, tmp_path / "hidden.bin")


SIZES = {
    "vocab_size": 250,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize(
    "config", [GraniteConfig(**SIZES, logits_scaling=8.0), CohereConfig(**SIZES, logit_scale=0.25)]
)
def test_scaled_logits(config: Any, tmp_path: Path) -> None:
    dense, sparse = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    for model in (dense, sparse):
        model.get_output_embeddings().weight.data *= 100
    found = compare(dense, sparse, tmp_path / "hidden.bin")
    kl, agreement = literal(dense, sparse, WINDOWS)
    assert found.kl == pytest.approx(kl, rel=1e-4)
    assert found.top1_agreement == pytest.approx(agreement)


def test_a_full_disk_is_said_before_anything_is_computed(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    model = load(llama)
    monkeypatch.setattr(model.base_model, "forward", lambda *_, **__: pytest.fail("computed"))
    monkeypatch.setattr("sppctl.evaluate.divergence.head_is_last_step", lambda *_: True)
    words = rf"take 15,360 bytes in {tmp_path}, where [\d,]+ are free \(No space left on device\)"  # 5 x 24 x 32 x 4
    with pytest.raises(StageError, match=words):
        Reference(model, WINDOWS, 2, tmp_path / "hidden.bin")
    assert not list(tmp_path.iterdir())
