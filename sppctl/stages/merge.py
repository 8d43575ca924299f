"""pruned + adapter -> merged: tensor by tensor in float32, rounded once, with proof that every zero stayed zero."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sppctl import console
from sppctl.adapters.spp.kernel import effective_weight
from sppctl.errors import StageError, UserError
from sppctl.lm import checkpoint
from sppctl.lm.blocks import Skeleton
from sppctl.lm.safe_files import TensorFiles
from sppctl.lm.targets import stored_name
from sppctl.settings import Config
from sppctl.stages import refresh

PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class MergeRecord:
    """What merging did to one matrix.

    Attributes:
        name: of the tensor in the checkpoint.
        zeros: weights that are zero, before and after.
        kept: weights that are not.
        moved: kept weights whose stored value changed.
        relative_change: ||merged - pruned|| / ||pruned||.
    """

    name: str
    zeros: int
    kept: int
    moved: int
    relative_change: float


def _merge_spp(weight: Tensor, tensors: dict[str, Tensor], settings: dict[str, Any], dtype: torch.dtype) -> Tensor:
    alpha, beta = tensors["spp_alpha"], tensors["spp_beta"]
    return effective_weight(weight, alpha, beta, settings["scale"], dtype)


# per PEFT type: the parts an adapted layer must have, and how they and the weight make the merged weight
MERGERS: dict[str, tuple[set[str], Callable[..., Tensor]]] = {"SPP": ({"spp_alpha", "spp_beta"}, _merge_spp)}


@dataclass(frozen=True)
class Adapter:
    """A saved PEFT adapter: its settings, its kind, and its tensors by module name."""

    kind: str
    settings: dict[str, Any]
    files: TensorFiles
    modules: dict[str, dict[str, str]]

    @classmethod
    def open(cls, directory: Path) -> Adapter:
        """Reads the settings and headers of an adapter directory.

        Raises:
            UserError: not an adapter, a kind that cannot be merged, or incomplete.
        """
        try:
            settings = json.loads((directory / "adapter_config.json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{directory} is no PEFT adapter: {error}") from error
        kind = settings.get("peft_type")
        if kind not in MERGERS:
            raise UserError(f"{directory} is an adapter of type {kind}; sppctl merges {', '.join(MERGERS)}")
        files = TensorFiles(directory)
        modules: dict[str, dict[str, str]] = {}
        for name in (name for name, file in files.home.items() if file != refresh.REFRESHED):
            module, _, part = name.removeprefix(PEFT_PREFIX).rpartition(".")
            modules.setdefault(module, {})[part] = name
        parts = MERGERS[kind][0]
        for module, found in modules.items():
            if found.keys() != parts:
                raise UserError(
                    f"{directory}: {module} has {', '.join(sorted(found))}, expected {', '.join(sorted(parts))}"
                )
        return cls(kind, settings, files, modules)


def execute(config: Config, pruned: Path, adapter_directory: Path, out: Path) -> dict[str, Any]:
    """Merges an adapter into the checkpoint ``pruned``; the result goes to ``out``, an ordinary checkpoint.

    Returns:
        Metrics: matrices, zeros, kept weights and the share of them that moved, one record per matrix.

    Raises:
        UserError: the adapter belongs to another model.
        StageError: a zero would not stay zero, or a kept weight would become zero.
    """
    adapter = Adapter.open(adapter_directory)
    source = refresh.RefreshedFiles(pruned, adapter_directory)
    stored = _match(source, adapter, config, pruned)
    if source.refreshed:
        patterns = refresh.patterns(config, Skeleton(checkpoint.load_config(pruned, config.model.trust_remote_code)))
        source.prove(TensorFiles(pruned), {stored[name]: patterns[name] for name in stored.keys() & patterns.keys()})
    files = checkpoint.copy_for_rewriting(pruned, out, config.merge.dtype)
    records = []
    with console.Progress("merging", len(adapter.modules)) as bar:
        for record in merge_matrices(source, adapter, stored, files):
            records.append(record)
            bar.advance()
    for file in files.files.values():
        file.sync()
    kept, moved = sum(record.kept for record in records), sum(record.moved for record in records)
    return {
        "matrices": len(records),
        "zeros": sum(record.zeros for record in records),
        "kept_weights": kept,
        "moved_weights": moved,
        "moved_share": moved / kept if kept else 0.0,
        "pattern_unchanged": True,
        "refreshed_matrices": len(source.refreshed),
        "records": [asdict(record) for record in records],
    }


def _match(source: TensorFiles, adapter: Adapter, config: Config, pruned: Path) -> dict[str, str]:
    """The checkpoint's tensor for each adapted module, with shapes that fit."""
    trust = config.model.trust_remote_code
    prefix = Skeleton(checkpoint.load_config(pruned, trust), trust_remote_code=trust).base_prefix
    stored = {}
    for module, parts in adapter.modules.items():
        try:
            name = stored_name(source, f"{module}.weight", prefix)
        except UserError as error:
            raise UserError(f"the adapter adapts {module}, which {pruned} does not have: another model's?") from error
        rows, columns = source.spec(name).shape
        alpha, beta = adapter.files.spec(parts["spp_alpha"]).shape, adapter.files.spec(parts["spp_beta"]).shape
        if alpha[1] != columns or beta != (rows, 1):
            raise UserError(
                f"the adapter's {module} is for a ({beta[0]}, {alpha[1]}) weight, {pruned} has ({rows}, {columns}): "
                "another model's adapter?"
            )
        stored[module] = name
    return stored


@torch.no_grad()
def merge_matrices(
    source: TensorFiles, adapter: Adapter, stored: dict[str, str], out: TensorFiles
) -> Iterator[MergeRecord]:
    """Merges and proves one matrix after the other.

    Args:
        source: the pruned checkpoint, with the refreshed matrices if there are any.
        adapter: what to merge.
        stored: the checkpoint's name of each adapted module's weight.
        out: files that already hold a copy of ``source``.

    Yields:
        One record per matrix.

    Raises:
        StageError: the pattern would change, or a value is not finite; read back from the written file.
    """
    merge = MERGERS[adapter.kind][1]
    for module, parts in adapter.modules.items():
        name = stored[module]
        weight = source.read(name)
        tensors = {part: adapter.files.read(key) for part, key in parts.items()}
        merged = merge(weight, tensors, adapter.settings, out.spec(name).dtype)
        out.write(name, merged.masked_fill_(weight == 0, 0))  # 0 x a negative factor is -0: keep the bytes of zero too
        yield _prove(name, weight, out.read(name))


def _prove(name: str, weight: Tensor, written: Tensor) -> MergeRecord:
    if not torch.isfinite(written).all():
        raise StageError(
            f"merging {name} gives values that are not finite; the adapter is broken, nothing was published"
        )
    zero_before, zero_after = weight == 0, written == 0
    if not torch.equal(zero_before, zero_after):
        filled, lost = int((zero_before & ~zero_after).sum()), int((~zero_before & zero_after).sum())
        raise StageError(
            f"merging {name} would change its pattern: {filled} zeros filled, {lost} kept weights zero; "
            "nothing was published"
        )
    before, after = weight.float(), written.float()
    zeros = int(zero_before.sum())
    return MergeRecord(
        name=name,
        zeros=zeros,
        kept=weight.numel() - zeros,
        moved=int((before.to(written.dtype) != written).sum()),
        relative_change=((after - before).norm() / before.norm().clamp_min(1e-30)).item(),
    )
