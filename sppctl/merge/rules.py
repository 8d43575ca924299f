"""What merging means for each type of adapter: the merged weight, and what must be true of its zeros."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sppctl.adapters.masked import round_under_mask
from sppctl.adapters.masked_full import kernel as masked_full
from sppctl.adapters.masked_lora import kernel as masked_lora
from sppctl.adapters.spp import kernel as spp
from sppctl.errors import StageError, UserError
from sppctl.pattern import Pattern
from sppctl.pruners.masks import holds
from sppctl.records import MatrixRecord

Tensors = Mapping[str, Tensor]
Settings = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]
DORA = "lora_magnitude_vector"


@dataclass(frozen=True)
class Merger:
    """How adapters of one PEFT type are merged."""

    shapes: Callable[[Settings, int, int], Shapes]  # of the tensors of a weight (m, n), under settings
    # weight (m, n), tensors, settings and a dtype to the merged weight, rounded once to that dtype
    merge: Callable[[Tensor, Tensors, Settings, torch.dtype], Tensor]
    # where the merged zeros are: where the pruned weight has them (``pruned``), nowhere (``filled``), or where the
    # adapter's masks have them (``chosen``)
    zeros: str = "pruned"


def check_mask(kind: str, mask: str) -> None:
    """Refuses a ``merge.mask`` that cannot be kept with this PEFT type, before anything is computed.

    Raises:
        UserError: with the reason and the alternatives.
    """
    zeros = MERGERS[kind].zeros
    if zeros == "filled" and mask == "keep":
        raise UserError(
            "merge.mask",
            f"keep is impossible with an adapter of type {kind.lower()}, whose update fills the zeros",
            "merge.mask=reapply prunes the merged weights by the old mask again (the paper's LoRA*), "
            "merge.mask=dense gives up the sparsity, train.method=masked_lora trains under the mask",
        )
    if zeros == "chosen" and mask == "reapply":
        raise UserError(
            "merge.mask",
            f"reapply would undo the masks that an adapter of type {kind.lower()} has chosen",
            "merge.mask=keep keeps them and verifies their pattern",
        )


def merged_weight(
    kind: str, mask: str, weight: Tensor, tensors: Tensors, settings: Settings, dtype: torch.dtype
) -> Tensor:
    """The merged weight (m, n) in ``dtype``: float32 arithmetic, rounded once; its zeros are all +0."""
    merged = MERGERS[kind].merge(weight, tensors, settings, dtype)
    if mask == "reapply":
        return round_under_mask(merged, weight, dtype)
    return merged.masked_fill_(merged == 0, 0)  # 0 x a negative factor is -0


def prove(kind: str, mask: str, name: str, weight: Tensor, written: Tensor, pattern: Pattern | None) -> MatrixRecord:
    """Verifies what ``merge.mask`` promises about a merged matrix, read back from its file.

    Args:
        kind: PEFT type of the adapter.
        mask: ``merge.mask``; ``dense`` promises nothing about the zeros.
        name: of the matrix.
        weight: (m, n), before.
        written: (m, n), after.
        pattern: N:M of an adapter with masks of its own; None: as many zeros in each row as before.

    Raises:
        StageError: the promise is broken, or a value is not finite.
    """
    if not torch.isfinite(written).all():
        raise StageError(
            f"merging {name} gives values that are not finite; the adapter is broken, or merge.dtype cannot hold them; "
            "nothing was published"
        )
    before, after = weight == 0, written == 0
    filled, lost = int((before & ~after).sum()), int((~before & after).sum())
    problem = ""
    if mask != "dense" and MERGERS[kind].zeros != "chosen":
        if filled or lost:
            problem = f"would change its pattern: {filled} zeros filled, {lost} kept weights zero"
    elif mask != "dense" and pattern is not None:
        if not holds(written, pattern):
            problem = f"would not give {pattern}"
    elif mask != "dense" and (rows := int((before.sum(1) != after.sum(1)).sum())):
        problem = f"would change the number of zeros in {rows} of its rows"
    if problem:
        raise StageError(f"merging {name} {problem}; nothing was published")
    zeros, start = int(after.sum()), weight.float()
    return MatrixRecord(
        name=name,
        zeros=zeros,
        kept=weight.numel() - zeros,
        moved=int(((weight.to(written.dtype) != written) & ~after).sum()),
        filled=filled,
        lost=lost,
        relative_change=((written.float() - start).norm() / start.norm().clamp_min(1e-30)).item(),
    )


# --- the types --------------------------------------------------------------------------------------------------------


def _low_rank(a: str, b: str, merge: Callable[..., Tensor]) -> Merger:
    """A (r, n) and B (m, r), under the names that the type stores them by."""
    return Merger(
        lambda settings, m, n: {a: (settings["r"], n), b: (m, settings["r"])},
        lambda weight, tensors, settings, dtype: merge(weight, tensors[a], tensors[b], settings, dtype),
    )


def _merge_spp(weight: Tensor, tensors: Tensors, settings: Settings, dtype: torch.dtype) -> Tensor:
    beta = tensors["spp_beta"] if "spp_beta" in tensors else torch.ones(len(weight), 1)
    return spp.effective_weight(weight, tensors["spp_alpha"], beta, settings["scale"], dtype)


def _lora_shapes(settings: Settings, m: int, n: int) -> Shapes:
    shapes: dict[str, tuple[int, ...]] = {"lora_A.weight": (settings["r"], n), "lora_B.weight": (m, settings["r"])}
    return shapes | ({DORA: (m,)} if settings.get("use_dora") else {})


def _merge_lora(weight: Tensor, tensors: Tensors, settings: Settings, dtype: torch.dtype) -> Tensor:
    """W + s B A, s = alpha / r or, for rsLoRA, alpha / sqrt(r); DoRA scales its rows to the norms that it has learned.

    rsLoRA: arXiv 2312.03732; DoRA: arXiv 2402.09353, Eq. 5.
    """
    rank = settings["r"]
    scale = settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    a, b = tensors["lora_A.weight"].float(), tensors["lora_B.weight"].float()
    merged = torch.addmm(weight.float(), b, a, alpha=scale)
    if settings.get("use_dora"):
        merged *= (tensors[DORA].float() / torch.linalg.vector_norm(merged, dim=1)).unsqueeze(1)
    return merged.to(dtype)


def _merge_hira(weight: Tensor, a: Tensor, b: Tensor, settings: Settings, dtype: torch.dtype) -> Tensor:
    return round_under_mask(torch.addcmul(weight.float(), weight.float(), b.float() @ a.float()), weight, dtype)


def _merge_masked_lora(weight: Tensor, a: Tensor, b: Tensor, settings: Settings, dtype: torch.dtype) -> Tensor:
    return masked_lora.effective_weight(weight, [(a, b, settings["scale"])], dtype)


# the keys are PEFT types, and in lower case the names of the methods
MERGERS: dict[str, Merger] = {
    "SPP": Merger(
        lambda settings, m, n: {"spp_alpha": (settings["r"], n)} | ({"spp_beta": (m, 1)} if settings["beta"] else {}),
        _merge_spp,
    ),
    "LORA": Merger(_lora_shapes, _merge_lora, zeros="filled"),
    "HIRA": _low_rank("hira_A", "hira_B", _merge_hira),
    "MASKED_LORA": _low_rank("masked_lora_A", "masked_lora_B", _merge_masked_lora),
    "MASKED_FULL": Merger(
        lambda settings, m, n: {"masked_full_weight": (m, n)},
        lambda weight, parts, _, dtype: masked_full.effective_weight(parts["masked_full_weight"], weight, dtype),
    ),
    "STE": Merger(
        lambda settings, m, n: {"ste_weight": (m, n), "ste_mask": (m, n)},
        lambda weight, parts, _, dtype: masked_full.effective_weight(parts["ste_weight"], parts["ste_mask"], dtype),
        zeros="chosen",
    ),
}
