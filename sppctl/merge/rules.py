"""What merging means for each type of adapter: the merged weight, and what must be true of its zeros."""

from __future__ import annotations

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
from sppctl.inspect.inspect import holds
from sppctl.pattern import Pattern

Tensors = Mapping[str, Tensor]
Settings = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Merger:
    """How adapters of one PEFT type are merged."""

    parts: Callable[[Settings], set[str]]  # the tensors that an adapted layer has under these settings
    # whether tensors of these shapes belong to a weight (rows, columns)
    fits: Callable[[Shapes, tuple[int, ...]], bool]
    # weight (m, n), tensors, settings and a dtype to the merged weight, rounded once to that dtype
    merge: Callable[[Tensor, Tensors, Settings, torch.dtype], Tensor]
    # where the merged zeros are: ``pruned``, where the pruned weight has them; ``filled``, nowhere; ``own``, where the
    # adapter's masks have them
    zeros: str = "pruned"


def check_mask(kind: str, mask: str) -> None:
    """Refuses what cannot end well, before anything is computed.

    Args:
        kind: PEFT type of the adapter.
        mask: ``merge.mask``.

    Raises:
        UserError: with the reason and the ways out.
    """
    zeros = MERGERS[kind].zeros
    if zeros == "filled" and mask == "keep":
        raise UserError(
            "merge.mask",
            f"keep is impossible with train.method {kind.lower()}, whose update fills the zeros",
            "merge.mask=reapply prunes the merged weights by the old mask again (the paper's LoRA*), "
            "merge.mask=dense gives up the sparsity, train.method=masked_lora trains under the mask",
        )
    if zeros == "own" and mask == "reapply":
        raise UserError(
            "merge.mask",
            f"reapply would undo the masks that train.method {kind.lower()} has chosen",
            "merge.mask=keep keeps them, and proves their pattern",
        )


def merged_weight(
    kind: str, mask: str, weight: Tensor, tensors: Tensors, settings: Settings, dtype: torch.dtype
) -> Tensor:
    """The merged weight (m, n) in ``dtype``: float32 arithmetic, rounded once; its zeros are all +0."""
    merged = MERGERS[kind].merge(weight, tensors, settings, dtype)
    if mask == "reapply":
        return round_under_mask(merged, weight, dtype)
    return merged.masked_fill_(merged == 0, 0)  # 0 x a negative factor is -0


def prove_zeros(kind: str, mask: str, name: str, weight: Tensor, written: Tensor, pattern: Pattern | None) -> None:
    """Proves what ``merge.mask`` promises of a merged matrix, read back from its file.

    Args:
        kind: PEFT type of the adapter.
        mask: ``merge.mask``; nothing is promised with ``dense``.
        name: of the matrix, for the error.
        weight: (m, n), before.
        written: (m, n), after.
        pattern: N:M that an adapter with masks of its own has promised; None: as many zeros in each row as before.

    Raises:
        StageError: it is not so.
    """
    if mask == "dense":
        return
    before, after = weight == 0, written == 0
    if MERGERS[kind].zeros == "own":
        if pattern is not None and not holds(written, pattern):
            raise StageError(f"merging {name} would not give {pattern}; nothing was published")
        if pattern is None and not torch.equal(before.sum(1), after.sum(1)):
            wrong = int((before.sum(1) != after.sum(1)).sum())
            raise StageError(
                f"merging {name} would change the number of zeros in {wrong} of its rows; nothing was published"
            )
    elif not torch.equal(before, after):
        filled, lost = int((before & ~after).sum()), int((~before & after).sum())
        raise StageError(
            f"merging {name} would change its pattern: {filled} zeros filled, {lost} kept weights zero; "
            "nothing was published"
        )


def promised_pattern(settings: Settings, module: str) -> Pattern | None:
    """The N:M that an adapter with masks of its own has promised for a layer."""
    text = settings.get("patterns", {}).get(module, settings.get("pattern"))
    return None if text is None else Pattern.parse(text)


# --- the types --------------------------------------------------------------------------------------------------------


def _spp_parts(settings: Settings) -> set[str]:
    return {"spp_alpha", "spp_beta"} if settings.get("beta", True) else {"spp_alpha"}


def _spp_fits(shapes: Shapes, shape: tuple[int, ...]) -> bool:
    return shapes["spp_alpha"][1] == shape[1] and shapes.get("spp_beta", (shape[0], 1)) == (shape[0], 1)


def _merge_spp(weight: Tensor, tensors: Tensors, settings: Settings, dtype: torch.dtype) -> Tensor:
    beta = tensors["spp_beta"] if "spp_beta" in tensors else torch.ones(len(weight), 1)
    return spp.effective_weight(weight, tensors["spp_alpha"], beta, settings["scale"], dtype)


def _low_rank(a: str, b: str, merge: Callable[..., Tensor], zeros: str = "pruned") -> Merger:
    """A (r, n) and B (m, r), under the names that the type stores them by."""
    return Merger(
        parts=lambda settings: {a, b},
        fits=lambda shapes, shape: (shapes[b][0], shapes[a][1]) == shape,
        merge=lambda weight, tensors, settings, dtype: merge(weight, tensors[a], tensors[b], settings, dtype),
        zeros=zeros,
    )


def _merge_lora(weight: Tensor, a: Tensor, b: Tensor, settings: Settings, dtype: torch.dtype) -> Tensor:
    return torch.addmm(weight.float(), b, a, alpha=settings["lora_alpha"] / settings["r"]).to(dtype)


def _merge_hira(weight: Tensor, a: Tensor, b: Tensor, settings: Settings, dtype: torch.dtype) -> Tensor:
    return round_under_mask(torch.addcmul(weight.float(), weight.float(), b @ a), weight, dtype)


def _merge_masked_lora(weight: Tensor, a: Tensor, b: Tensor, settings: Settings, dtype: torch.dtype) -> Tensor:
    return masked_lora.effective_weight(weight, [(a, b, settings["scale"])], dtype)


def _merge_masked_full(weight: Tensor, tensors: Tensors, settings: Settings, dtype: torch.dtype) -> Tensor:
    return masked_full.effective_weight(tensors["masked_full_weight"], weight, dtype)


def _merge_ste(weight: Tensor, tensors: Tensors, settings: Settings, dtype: torch.dtype) -> Tensor:
    return masked_full.effective_weight(tensors["ste_weight"], tensors["ste_mask"], dtype)


def _same_shape(shapes: Shapes, shape: tuple[int, ...]) -> bool:
    return set(shapes.values()) == {shape}


# the keys are PEFT types, and in lower case the names of the methods
MERGERS: dict[str, Merger] = {
    "SPP": Merger(_spp_parts, _spp_fits, _merge_spp),
    "LORA": _low_rank("lora_A.weight", "lora_B.weight", _merge_lora, zeros="filled"),
    "HIRA": _low_rank("hira_A", "hira_B", _merge_hira),
    "MASKED_LORA": _low_rank("masked_lora_A", "masked_lora_B", _merge_masked_lora),
    "MASKED_FULL": Merger(lambda settings: {"masked_full_weight"}, _same_shape, _merge_masked_full),
    "STE": Merger(lambda settings: {"ste_weight", "ste_mask"}, _same_shape, _merge_ste, zeros="own"),
}
