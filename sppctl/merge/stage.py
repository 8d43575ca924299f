"""pruned + adapter -> merged: tensor by tensor in float32, rounded once, the pattern verified."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sppctl import console
from sppctl.adapters.masked import round_under_mask
from sppctl.config.settings import Config
from sppctl.errors import StageError, UserError
from sppctl.files import integrity
from sppctl.files.disk import demand_space
from sppctl.files.safe_files import OwnFiles, TensorFile, TensorFiles, adapter_file, adapter_settings
from sppctl.machine import dtype_name
from sppctl.merge.rules import MERGERS, check_mask, merged_weight, prove
from sppctl.model import checkpoint
from sppctl.model.blocks import Skeleton
from sppctl.model.refreshed import RefreshedFiles
from sppctl.model.targets import stored_name
from sppctl.model.weights import check_weights
from sppctl.pattern import Pattern
from sppctl.records import MatrixRecord, MergeRecord, PruneRecord, Settings, TrainRecord

PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """A saved PEFT adapter: its settings, its kind, and its tensors by module name."""

    kind: str
    settings: Settings
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
        files = TensorFile(adapter_file(directory))
        modules: dict[str, dict[str, str]] = {}
        parts = MERGERS[kind].shapes(settings, 0, 0).keys()
        for name in files.specs:
            # parts may have dots (lora_A.weight)
            part = next((part for part in parts if name.endswith(f".{part}")), name.rpartition(".")[2])
            modules.setdefault(name.removeprefix(PEFT_PREFIX).removesuffix(f".{part}"), {})[part] = name
        for module, names in modules.items():
            if names.keys() != parts:
                raise UserError(
                    f"{directory}: {module} has {', '.join(sorted(names))}, expected {', '.join(sorted(parts))}"
                )
        return cls(kind, settings, files, modules)


@dataclass(frozen=True)
class Prepared:
    """An adapter and the pruned checkpoint that it was checked to belong to."""

    pruned: Path  # directory of the checkpoint
    source: RefreshedFiles  # the checkpoint, with refreshed matrices instead of its own
    adapter: Adapter  # what to merge
    stored: dict[str, str]  # the checkpoint's name of each adapted module's weight
    masks: dict[str, str]  # recorded digest of each pruned matrix's mask by module; of refreshed ones the last
    work: None = None  # nothing that takes long
    # the checkpoint and the adapter are read again in every attempt
    sources: dict[str, str] = field(default_factory=dict)


def prepare(
    config: Config, pruned: Path, trained: Path, prune_record: PruneRecord, train_record: TrainRecord, out: Path
) -> Prepared:
    """Checks that an adapter can be merged into a checkpoint as ``merge.mask`` asks, and that both are as recorded.

    Args:
        config: the configuration.
        pruned, prune_record: the pruned checkpoint, and what was recorded of it.
        trained, train_record: directory of the adapter, and what was recorded of it.
        out: where the merged checkpoint will be written.

    Raises:
        UserError: the adapter belongs to another model, cannot be merged, or is not as recorded; or the disk is full.
        StageError: a refreshed matrix does not have the zeros of its pattern.
    """
    adapter = Adapter.open(trained)
    check_mask(adapter.kind, config.merge.mask)
    source = RefreshedFiles(pruned, trained)
    if missing := sorted(set(train_record.modules) - adapter.modules.keys()):
        raise UserError(
            f"{trained} lacks {len(missing)} of the {len(train_record.modules)} matrices that were trained, "
            f"{missing[0]} among them; train again (sppctl train --force)"
        )
    stored = _match(source, adapter, config, pruned)
    if source.refreshed:
        patterns = prune_record.patterns
        source.prove(TensorFiles(pruned), {stored[name]: patterns[name] for name in stored.keys() & patterns.keys()})
    needed = checkpoint.weight_bytes(pruned, config.merge.dtype)
    demand_space(out.parent, needed, "the merged checkpoint", f"{out.name}/*.safetensors")
    masks = prune_record.masks | (train_record.refresh.masks if train_record.refresh else {})
    return Prepared(pruned, source, adapter, stored, masks)


def execute(config: Config, prepared: Prepared, out: Path) -> MergeRecord:
    """Merges what :func:`prepare` returned into ``out``, an existing, empty directory: an ordinary checkpoint.

    Raises:
        UserError: a pruned matrix does not have the mask that was recorded.
        StageError: the pattern would not be what ``merge.mask`` promises, or a value is not finite.
    """
    mask, adapter = config.merge.mask, prepared.adapter
    convert = partial(_converted, set(prepared.stored.values()))
    with console.working(f"copying {prepared.pruned}"):
        files = checkpoint.copy_for_rewriting(prepared.pruned, out, config.merge.dtype, convert)
    records = []
    with console.Progress("merging", len(adapter.modules)) as bar:
        for module in adapter.modules:
            records.append(_merge_matrix(prepared, module, files, mask))
            bar.advance()
    totals = ("kept", "moved", "zeros", "filled", "lost")
    kept, moved, zeros, filled, lost = (sum(getattr(record, name) for record in records) for name in totals)
    if filled:
        console.note(f"merge: {filled:,} zeros were filled, {lost:,} other weights are zero now (merge.mask={mask})")
    return MergeRecord(
        method=adapter.kind.lower(),
        mask=mask,
        matrices=len(records),
        zeros=zeros,
        kept_weights=kept,
        moved_weights=moved,
        moved_share=moved / kept if kept else 0.0,
        sparsity=zeros / (zeros + kept),
        filled_zeros=filled,
        lost_weights=lost,
        pattern_unchanged=not filled and not lost,
        refreshed_matrices=len(prepared.source.refreshed),
        records=records,
    )


def _converted(adapted: set[str], name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype: finite where it was, and zero only where it was, so that masks are kept.

    Raises:
        StageError: the dtype cannot hold it.
    """
    if name in adapted:
        return tensor.to(dtype)  # to be overwritten, and verified then
    result = round_under_mask(tensor, tensor, dtype)
    if not torch.equal(result.isfinite(), tensor.isfinite()):
        raise StageError(
            f"merge.dtype: {dtype_name(dtype)} cannot hold {name}, whose largest value is "
            f"{tensor[tensor.isfinite()].abs().max().item():.3g}; nothing was published, merge.dtype=auto keeps "
            f"{dtype_name(tensor.dtype)}"
        )
    return result


def _match(source: TensorFiles, adapter: Adapter, config: Config, pruned: Path) -> dict[str, str]:
    """The checkpoint's tensor for each adapted module, with matching shapes."""
    trust = config.model.trust_remote_code
    skeleton = Skeleton(checkpoint.load_config(pruned, trust), trust_remote_code=trust)
    check_weights(TensorFiles(pruned), skeleton.model)
    prefix = skeleton.base_prefix
    stored = {}
    for module, parts in adapter.modules.items():
        try:
            name = stored_name(source, f"{module}.weight", prefix)
        except UserError as error:
            raise UserError(
                f"the adapter adapts {module}, which {pruned} does not have; is it another model's?"
            ) from error
        shape = source.spec(name).shape
        shapes = {part: adapter.files.specs[key].shape for part, key in parts.items()}
        if len(shape) != 2 or shapes != MERGERS[adapter.kind].shapes(adapter.settings, *shape):
            tensors = ", ".join(f"{part} {'x'.join(map(str, size))}" for part, size in sorted(shapes.items()))
            raise UserError(
                f"the adapter's {module} has {tensors}, which does not match the {'x'.join(map(str, shape))} weight of "
                f"{pruned}; is it another model's adapter?"
            )
        stored[module] = name
    return stored


@torch.no_grad()
def _merge_matrix(prepared: Prepared, module: str, out: OwnFiles, mask: str) -> MatrixRecord:
    """Merges one matrix into ``out``, which holds a copy of the pruned checkpoint, and verifies what was written."""
    source, adapter, name = prepared.source, prepared.adapter, prepared.stored[module]
    weight = source.read(name)
    if prepared.masks.get(module, digest := integrity.mask_digest(weight)) != digest:
        raise UserError(
            f"{source.files[source.home[name]].path}: {name} does not have the zeros that were recorded; nothing "
            "was published; prune again (sppctl prune --force)"
        )
    tensors = {part: adapter.files.read(key) for part, key in adapter.modules[module].items()}
    out.write(name, merged_weight(adapter.kind, mask, weight, tensors, adapter.settings, out.spec(name).dtype))
    promised = adapter.settings.get("patterns", {}).get(module, adapter.settings.get("pattern"))
    pattern = None if promised is None else Pattern.parse(promised)
    return prove(adapter.kind, mask, name, weight, out.read(name), pattern)
