"""The distance to a dense model, against the literal formula on whole logits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, SMALL
from torch import Tensor
from transformers import AutoModelForCausalLM, CohereConfig, FalconH1Config, GraniteConfig, HyperCLOVAXConfig

from sppctl.errors import StageError, UserError
from sppctl.evaluate import perplexity
from sppctl.evaluate.divergence import Reference
from sppctl.evaluate.perplexity import scored_tokens, summarise, window_sums
from sppctl.evaluate.results import TextNumbers

WINDOWS = torch.randint(0, 250, (5, 24), generator=torch.Generator().manual_seed(3))
FALCON_H1 = {"lm_head_multiplier": 0.25, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
CONFIGS: dict[str, Callable[[], Any]] = FAMILIES | {  # and others that scale their logits
    "granite": lambda: GraniteConfig(**SMALL, logits_scaling=8.0),
    "cohere": lambda: CohereConfig(**SMALL, logit_scale=0.25),
    "hyperclovax": lambda: HyperCLOVAXConfig(**SMALL, logits_scaling=0.25),
    "falcon_h1": lambda: FalconH1Config(**SMALL, **FALCON_H1, num_key_value_heads=4),
}
Models = tuple[Any, Any]


def dense_and_sparse(family: str) -> Models:
    """A tiny random model with sharp predictions, and one whose blocks are disturbed as by pruning."""
    torch.manual_seed(1)
    dense = AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
    dense.get_output_embeddings().weight.data.mul_(20)
    sparse = copy.deepcopy(dense)
    for parameter in sparse.base_model.parameters():
        if parameter.dim() > 1:
            parameter.data.add_(torch.randn_like(parameter) * parameter.std())
    return dense, sparse


@pytest.fixture(scope="module")
def models() -> Models:
    return dense_and_sparse("llama")


@torch.no_grad()
def literal(dense: Any, sparse: Any) -> tuple[Tensor, Tensor]:
    """KL and agreement at the positions that predict a token of their window, in float64."""
    p, q = (model(WINDOWS).logits[:, :-1].double().log_softmax(-1) for model in (dense, sparse))
    return (p.exp() * (p - q)).sum(-1), (p.argmax(-1) == q.argmax(-1)).double()


def compare(models: Models, folder: Path, stride: int | None = None, batch_size: int = 2) -> TextNumbers:
    reference = Reference(models[0], WINDOWS, batch_size, folder / "hidden.bin")
    scored = scored_tokens(*WINDOWS.shape, stride)
    sums = torch.cat(list(window_sums(models[1], WINDOWS, batch_size, scored, reference)))
    return summarise(sums, WINDOWS.shape[1], stride, compared=True)


@pytest.mark.parametrize("family", CONFIGS)
def test_equals_the_literal_formula(tmp_path: Path, family: str) -> None:
    models = dense_and_sparse(family)
    numbers = compare(models, tmp_path)
    kl, agreement = literal(*models)
    assert numbers.kl == pytest.approx(kl.mean().item(), rel=1e-4)
    assert numbers.kl > 1e-3
    assert numbers.top1_agreement == pytest.approx(agreement.mean().item())
    assert agreement.mean() < 1 or models[0].config.tie_word_embeddings  # tied, random models repeat the token before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_does_not_differ_from_itself(models: Models, tmp_path: Path, dtype: torch.dtype) -> None:
    model = copy.deepcopy(models[0]).to(dtype)
    numbers = compare((model, model), tmp_path)
    assert (numbers.kl, numbers.kl_stderr, numbers.top1_agreement) == (0, 0, 1)


def test_pieces_and_batches_do_not_matter(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compare(models, tmp_path)
    monkeypatch.setattr(perplexity, "LOGIT_ROWS", 7)
    pieces = compare(models, tmp_path, batch_size=4)
    assert (pieces.kl, pieces.nll) == pytest.approx((whole.kl, whole.nll), rel=1e-5)


def test_overlapping_windows_count_a_token_once(models: Models, tmp_path: Path) -> None:
    numbers = compare(models, tmp_path, stride=10)
    kl, _ = literal(*models)
    expected = torch.cat([kl[0], kl[1:, -10:].flatten()])
    assert numbers.kl == pytest.approx(expected.mean().item(), rel=1e-4)
    assert numbers.tokens == len(expected) == 23 + 4 * 10


def test_a_head_that_is_not_the_last_step_cannot_be_a_reference(models: Models, tmp_path: Path) -> None:
    dense = copy.deepcopy(models[0])
    dense.config.final_logit_softcapping = 5.0  # which a Llama does not apply
    with pytest.raises(UserError, match=r"eval\.divergence: llama changes its logits"):
        Reference(dense, WINDOWS, 2, tmp_path / "hidden.bin")


def test_a_full_disk_is_reported_before_the_windows_are_computed(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    problem = rf"need 15,360 bytes in {tmp_path}, where [\d,]+ are free \(No space left on device\)"  # 5 x 24 x 32 x 4
    with pytest.raises(StageError, match=problem):
        Reference(models[0], WINDOWS, 2, tmp_path / "hidden.bin", lambda _: pytest.fail("computed"))
    assert not list(tmp_path.iterdir())
