"""pruned + adapter -> merged: tensor by tensor in float32, rounded once, with proof of the pattern.

What merging is for a type of adapter, and what is proved, stands in ``merge_rules``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sppctl import console
from sppctl.adapters.masked import round_under_mask
from sppctl.config.settings import Config
from sppctl.errors import StageError, UserError
from sppctl.files import integrity
from sppctl.files.disk import demand_space
from sppctl.files.safe_files import OwnFiles, TensorFile, TensorFiles, adapter_file, adapter_settings
from sppctl.merge.rules import MERGERS, check_mask, merged_weight, promised_pattern, prove_zeros
from sppctl.model import checkpoint
from sppctl.model.blocks import Skeleton
from sppctl.model.refreshed import RefreshedFiles
from sppctl.model.targets import stored_name
from sppctl.model.weights import check_weights
from sppctl.pattern import Pattern
from sppctl.prune.choose import patterns_of

PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class MergeRecord:
    """What merging did to one matrix.

    Attributes:
        name: of the tensor in the checkpoint.
        zeros: weights that are zero after merging.
        kept: weights that are not.
        moved: of those, how many have another stored value than before.
        filled: zeros of the pruned weight that are zero no more.
        lost: weights that have become zero.
        relative_change: ||merged - pruned|| / ||pruned||.
    """

    name: str
    zeros: int
    kept: int
    moved: int
    filled: int
    lost: int
    relative_change: float


@dataclass(frozen=True)
class Recorded:
    """What the stages before have recorded, which merging is held to.

    Attributes:
        masks: digest of the mask of each pruned matrix by its name, of refreshed ones the last.
        modules: the names of the matrices that were trained.
    """

    masks: dict[str, str]
    modules: list[str]

    @classmethod
    def of(cls, pruned: dict[str, Any], trained: dict[str, Any]) -> Recorded:
        """From the metrics of pruning and training."""
        masks = {layer["name"]: layer["mask"] for layer in pruned["layers"]}
        return cls(masks | ((trained["refresh"] or {}).get("masks") or {}), trained["modules"])


@dataclass(frozen=True)
class Adapter:
    """A saved PEFT adapter: its settings, its kind, and its tensors by module name."""

    kind: str
    settings: dict[str, Any]
    files: TensorFile
    modules: dict[str, dict[str, str]]

    @classmethod
    def open(cls, directory: Path) -> Adapter:
        """Reads the settings and headers of an adapter directory.

        Raises:
            UserError: not an adapter, a kind that cannot be merged, or incomplete.
        """
        settings = adapter_settings(directory)
        kind = settings.get("peft_type")
        if kind not in MERGERS:
            raise UserError(f"{directory} is an adapter of type {kind}; sppctl merges {', '.join(MERGERS)}")
        files = TensorFile.open(adapter_file(directory))
        modules: dict[str, dict[str, str]] = {}
        parts = MERGERS[kind].parts(settings)
        for name in files.specs:
            module, part = _split(name.removeprefix(PEFT_PREFIX), parts)
            modules.setdefault(module, {})[part] = name
        for module, found in modules.items():
            if found.keys() != parts:
                raise UserError(
                    f"{directory}: {module} has {', '.join(sorted(found))}, expected {', '.join(sorted(parts))}"
                )
        return cls(kind, settings, files, modules)


def _split(name: str, parts: set[str]) -> tuple[str, str]:
    """The module and the part that a tensor is named after; parts may have dots (``lora_A.weight``)."""
    for part in parts:
        if name.endswith(f".{part}"):
            return name.removesuffix(f".{part}"), part
    module, _, part = name.rpartition(".")
    return module, part


def preflight(config: Config, skeleton: Skeleton | None = None) -> None:
    """Checks that the method's adapters can be merged as ``merge.mask`` says.

    Raises:
        UserError: they cannot.
    """
    check_mask(config.train.method.upper(), config.merge.mask)


def execute(
    config: Config, pruned: Path, adapter_directory: Path, out: Path, recorded: Recorded | None = None
) -> dict[str, Any]:
    """Merges an adapter into the checkpoint ``pruned``; the result goes to ``out``, an ordinary checkpoint.

    Args:
        config: the configuration.
        pruned: the pruned checkpoint.
        adapter_directory: of the adapter.
        out: existing, empty directory.
        recorded: what both are held to; None: they have no records.

    Returns:
        Metrics: the mask rule, matrices, zeros, kept weights and the share of them that moved, whether every zero and
        no other weight is zero still, one record per matrix. A matrix that training has refreshed stands for the pruned
        one.

    Raises:
        UserError: the adapter belongs to another model, or cannot be merged as ``merge.mask`` says; or a matrix is not
            as recorded.
        StageError: the pattern would not be what ``merge.mask`` promises, or a value is not finite.
    """
    mask = config.merge.mask
    adapter = Adapter.open(adapter_directory)
    check_mask(adapter.kind, mask)
    source = RefreshedFiles(pruned, adapter_directory)
    if recorded and (lost := sorted(set(recorded.modules) - adapter.modules.keys())):
        raise UserError(
            f"{adapter_directory} lacks {len(lost)} of the {len(recorded.modules)} matrices that were trained, "
            f"{lost[0]} among them; train again (sppctl train --force)"
        )
    masks = recorded.masks if recorded else {}
    stored = _match(source, adapter, config, pruned)
    _prove_refreshed(source, stored, config, pruned)
    needed = checkpoint.copy_size(TensorFiles(pruned), config.merge.dtype)
    demand_space(out.parent, needed, "the merged checkpoint", f"{out.name}/*.safetensors")
    convert = partial(_converted, set(stored.values()))
    with console.working(f"copying {pruned}"):
        files = checkpoint.copy_for_rewriting(pruned, out, config.merge.dtype, convert)
    records = []
    with console.Progress("merging", len(adapter.modules)) as bar:
        for record in merge_matrices(source, adapter, stored, files, mask, masks):
            records.append(record)
            bar.advance()
    kept, moved = sum(record.kept for record in records), sum(record.moved for record in records)
    zeros, filled, lost = (sum(getattr(record, what) for record in records) for what in ("zeros", "filled", "lost"))
    if filled:
        console.note(f"merge: {filled:,} zeros were filled, {lost:,} other weights are zero now (merge.mask {mask})")
    return {
        "method": adapter.kind.lower(),
        "mask": mask,
        "matrices": len(records),
        "zeros": zeros,
        "kept_weights": kept,
        "moved_weights": moved,
        "moved_share": moved / kept if kept else 0.0,
        "sparsity": zeros / (zeros + kept),
        "filled_zeros": filled,
        "lost_weights": lost,
        "pattern_unchanged": not filled and not lost,
        "refreshed_matrices": len(source.refreshed),
        "records": [asdict(record) for record in records],
    }


def _converted(adapted: set[str], name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype: finite where it was, and zero only where it was, so that pruned matrices keep masks.

    Raises:
        StageError: the dtype cannot hold it.
    """
    if name in adapted:
        return tensor.to(dtype)  # to be overwritten, and proved then
    result = round_under_mask(tensor, tensor, dtype)
    if not torch.equal(result.isfinite(), tensor.isfinite()):
        raise StageError(
            f"merge.dtype: {str(dtype).removeprefix('torch.')} cannot hold {name}, whose largest value is "
            f"{tensor[tensor.isfinite()].abs().max().item():.3g}; nothing was published, merge.dtype=auto keeps "
            f"{str(tensor.dtype).removeprefix('torch.')}"
        )
    return result


def _match(source: TensorFiles, adapter: Adapter, config: Config, pruned: Path) -> dict[str, str]:
    """The checkpoint's tensor for each adapted module, with shapes that fit."""
    trust = config.model.trust_remote_code
    skeleton = Skeleton(checkpoint.load_config(pruned, trust), trust_remote_code=trust)
    check_weights(TensorFiles(pruned), skeleton.model)
    prefix = skeleton.base_prefix
    stored = {}
    for module, parts in adapter.modules.items():
        try:
            name = stored_name(source, f"{module}.weight", prefix)
        except UserError as error:
            raise UserError(f"the adapter adapts {module}, which {pruned} does not have: another model's?") from error
        shape = source.spec(name).shape
        found = {part: adapter.files.specs[key].shape for part, key in parts.items()}
        if not MERGERS[adapter.kind].fits(found, shape):
            words = ", ".join(f"{part} {'x'.join(map(str, size))}" for part, size in sorted(found.items()))
            raise UserError(
                f"the adapter's {module} has {words}, which does not fit the {'x'.join(map(str, shape))} weight of "
                f"{pruned}: another model's adapter?"
            )
        stored[module] = name
    return stored


def _prove_refreshed(source: RefreshedFiles, stored: dict[str, str], config: Config, pruned: Path) -> None:
    """Shows that refreshed matrices have the zeros of their patterns, before they stand for the pruned ones."""
    if not source.refreshed:
        return
    trust = config.model.trust_remote_code
    skeleton = Skeleton(checkpoint.load_config(pruned, trust), trust_remote_code=trust)
    patterns = patterns_of(config.prune, skeleton)
    source.prove(TensorFiles(pruned), {stored[name]: patterns[name] for name in stored.keys() & patterns.keys()})


@torch.no_grad()
def merge_matrices(
    source: TensorFiles,
    adapter: Adapter,
    stored: dict[str, str],
    out: OwnFiles,
    mask: str,
    masks: Mapping[str, str],
) -> Iterator[MergeRecord]:
    """Merges and proves one matrix after the other.

    Args:
        source: the pruned checkpoint, with the refreshed matrices if there are any.
        adapter: what to merge.
        stored: the checkpoint's name of each adapted module's weight.
        out: files that already hold a copy of ``source``.
        mask: ``merge.mask``, which zeros are promised.
        masks: recorded digests of the masks, by module.

    Yields:
        One record per matrix.

    Raises:
        UserError: a pruned matrix does not have the mask that was recorded.
        StageError: the promise would not be kept, or a value is not finite; read back from the written file.
    """
    for module, parts in adapter.modules.items():
        name = stored[module]
        weight = source.read(name)
        if masks.get(module, digest := integrity.mask_digest(weight)) != digest:
            raise UserError(
                f"{source.files[source.home[name]].path}: {name} does not have the zeros that were recorded; nothing "
                "was published; prune again (sppctl prune --force)"
            )
        tensors = {part: adapter.files.read(key) for part, key in parts.items()}
        merged = merged_weight(adapter.kind, mask, weight, tensors, adapter.settings, out.spec(name).dtype)
        out.write(name, merged)
        pattern = promised_pattern(adapter.settings, module)
        yield _prove(adapter.kind, mask, name, weight, out.read(name), pattern)


def _prove(kind: str, mask: str, name: str, weight: Tensor, written: Tensor, pattern: Pattern | None) -> MergeRecord:
    if not torch.isfinite(written).all():
        raise StageError(
            f"merging {name} gives values that are not finite; the adapter is broken, or merge.dtype cannot hold them; "
            "nothing was published"
        )
    prove_zeros(kind, mask, name, weight, written, pattern)
    before, after = weight.float(), written.float()
    zero_before, zero_after = weight == 0, written == 0
    zeros = int(zero_after.sum())
    return MergeRecord(
        name=name,
        zeros=zeros,
        kept=weight.numel() - zeros,
        moved=int(((weight.to(written.dtype) != written) & ~zero_after).sum()),
        filled=int((zero_before & ~zero_after).sum()),
        lost=int((~zero_before & zero_after).sum()),
        relative_change=((after - before).norm() / before.norm().clamp_min(1e-30)).item(),
    )
