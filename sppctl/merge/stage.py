"""pruned + adapter -> merged: tensor by tensor in float32, rounded once, the pattern verified."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sppctl import console, records
from sppctl.adapters.masked import round_under_mask
from sppctl.adapters.tuner import DENSE
from sppctl.config.settings import Config
from sppctl.errors import StageError, UserError
from sppctl.files import integrity
from sppctl.files.disk import demand_space
from sppctl.files.names import RECORD
from sppctl.files.safe_files import OwnFiles, TensorFiles
from sppctl.machine import dtype_name
from sppctl.merge.adapter import Adapter
from sppctl.merge.rules import MERGERS, check_mask, merged_weight, prove
from sppctl.model import channel_order, checkpoint
from sppctl.model.blocks import Skeleton
from sppctl.model.refreshed import REFRESHED, RefreshedFiles
from sppctl.model.targets import stored_name
from sppctl.model.weights import check_weights
from sppctl.pattern import Pattern
from sppctl.records import MatrixRecord, MergeRecord, PruneRecord, StageRecord, TrainRecord

TIED = "which the model ties to another matrix; untie them before pruning"


@dataclass(frozen=True)
class Prepared:
    """An adapter and the pruned checkpoint that it was checked to belong to."""

    pruned: Path  # directory of the checkpoint
    source: RefreshedFiles  # the checkpoint, with refreshed matrices instead of its own
    adapter: Adapter  # what to merge
    stored: dict[str, str]  # the checkpoint's name of each adapted module's weight
    masks: dict[str, str]  # recorded digest of each pruned matrix's mask by module; of refreshed ones the last
    replaced: dict[str, str] = field(default_factory=dict)  # name in the adapter, by the checkpoint's name of a tensor
    work: None = None  # nothing that takes long
    # the checkpoint and the adapter are read again in every attempt
    sources: dict[str, str] = field(default_factory=dict)


def prepare(
    config: Config,
    pruned: Path,
    trained: Path,
    prune_record: PruneRecord | None,
    train_record: TrainRecord | None,
    out: Path,
) -> Prepared:
    """Checks that an adapter can be merged into a checkpoint as ``merge.mask`` asks, and that both are as recorded.

    Args:
        config: the configuration.
        pruned, prune_record: the pruned checkpoint, and what was recorded of it; None: pruned elsewhere.
        trained, train_record: directory of the adapter, and what was recorded of it; None: trained elsewhere.
        out: where the merged checkpoint will be written.

    Raises:
        UserError: the adapter belongs to another model, cannot be merged, or is not as recorded; or the disk is full.
        StageError: a refreshed matrix does not have the zeros of its pattern.
    """
    adapter = Adapter.open(trained)
    check_mask(adapter.kind, config.merge.mask)
    source = RefreshedFiles(pruned, trained)
    trained_modules = set() if train_record is None else set(train_record.modules)
    if missing := sorted(trained_modules - adapter.modules.keys()):
        raise UserError(
            f"{trained} lacks {len(missing)} of the {len(trained_modules)} matrices that were trained, "
            f"{missing[0]} among them; train again ({console.command('train', '--force', run=trained.parent)})"
        )
    skeleton = _skeleton(config, pruned)
    stored = _match(source, adapter, skeleton, pruned)
    replaced = _match_replaced(source, adapter, skeleton)
    _check_base(source, adapter, skeleton, pruned)
    if source.refreshed:
        if prune_record is None:
            raise UserError(f"{trained} has weights of its own ({REFRESHED}), which need the record of {pruned}")
        patterns = prune_record.patterns
        source.prove(TensorFiles(pruned), {stored[name]: patterns[name] for name in stored.keys() & patterns.keys()})
    needed = checkpoint.weight_bytes(pruned, config.merge.dtype)
    demand_space(out.parent, needed, "the merged checkpoint", f"{out.name}/*.safetensors")
    refreshed = {} if train_record is None or train_record.refresh is None else train_record.refresh.masks
    masks = ({} if prune_record is None else prune_record.masks) | refreshed
    _check_digest(trained, adapter, source, stored)
    if train_record is None:
        _check_order(trained, adapter, pruned)
    return Prepared(pruned, source, adapter, stored, masks, replaced)


def training_of(adapter: Path, pruned: Path) -> TrainRecord | None:
    """What the record in an adapter's directory says of its training; None without a record.

    Raises:
        UserError: files differ from the record, or it was trained on other weights than those in ``pruned``.
    """
    if integrity.check_record(adapter) is None:
        return None
    record = records.read(adapter / RECORD, "train")
    check_trained_on(record, adapter, pruned, checkpoint.fingerprint(pruned))
    metrics: TrainRecord = record.metrics
    return metrics


def check_trained_on(record: StageRecord[TrainRecord], adapter: Path, pruned: Path, fingerprint: str) -> None:
    """Raises UserError if an adapter was trained on other weights than those of this fingerprint, in ``pruned``."""
    if record.inputs["pruned"] != fingerprint:
        problem = f"{adapter} was trained on other weights than {pruned} holds now"
        raise UserError(f"{problem}; train again ({console.command('train', '--force', run=adapter.parent)})")


def execute(config: Config, prepared: Prepared, out: Path) -> MergeRecord:
    """Merges what :func:`prepare` returned into ``out``, an existing, empty directory: an ordinary checkpoint.

    Raises:
        UserError: a pruned matrix does not have the mask that was recorded.
        StageError: the pattern would not be what ``merge.mask`` promises, or a value is not finite.
    """
    mask, adapter = config.merge.mask, prepared.adapter
    convert = partial(_converted, {*prepared.stored.values(), *prepared.replaced})
    with console.working(f"copying {prepared.pruned}"):
        files = checkpoint.copy_for_rewriting(prepared.pruned, out, config.merge.dtype, convert)
    matrices = []
    with console.Progress("merging", len(adapter.modules)) as bar:
        for module in adapter.modules:
            matrices.append(_merge_matrix(prepared, module, files, mask))
            bar.advance()
    for name, key in prepared.replaced.items():
        _replace(name, adapter.files.read(key), files)
    totals = ("kept", "moved", "zeros", "filled", "lost")
    kept, moved, zeros, filled, lost = (sum(getattr(record, name) for record in matrices) for name in totals)
    if filled:
        console.note(f"merge: {filled:,} zeros were filled, {lost:,} other weights are zero now (merge.mask={mask})")
    return MergeRecord(
        method=adapter.kind.lower(),
        mask=mask,
        matrices=len(matrices),
        zeros=zeros,
        kept_weights=kept,
        moved_weights=moved,
        moved_share=moved / kept if kept else 0.0,
        sparsity=zeros / (zeros + kept),
        filled_zeros=filled,
        lost_weights=lost,
        pattern_unchanged=not filled and not lost,
        refreshed_matrices=len(prepared.source.refreshed),
        records=matrices,
        replaced_tensors=sorted(prepared.replaced),
        dtype=" and ".join(sorted({dtype_name(files.spec(name).dtype) for name in prepared.stored.values()})),
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


def _replace(name: str, tensor: Tensor, out: OwnFiles) -> None:
    """Writes a tensor that an adapter stores in full; StageError if the checkpoint's dtype cannot hold it."""
    converted = tensor.to(out.spec(name).dtype)
    if not converted.isfinite().all():
        dtype = dtype_name(converted.dtype)
        raise StageError(f"the adapter's {name} is not finite in {dtype}; nothing was published")
    out.write(name, converted)


def _check_digest(trained: Path, adapter: Adapter, source: TensorFiles, stored: dict[str, str]) -> None:
    """Raises UserError if an adapter names the zeros that it was trained on, and they are not those of the weights."""
    expected = adapter.settings.get("mask_digest")
    if expected is None:
        return
    digests = {module: integrity.mask_digest(source.read(name)) for module, name in stored.items()}
    if integrity.masks_digest(digests) != expected:
        raise UserError(
            f"{trained} was trained on weights with other zeros than these (mask_digest in adapter_config.json); "
            "merge it into the pruned weights that it was trained on, or train it again"
        )


def _check_order(trained: Path, adapter: Adapter, pruned: Path) -> None:
    """Raises UserError if channels were reordered in pruning, and an adapter is not known to be trained after it."""
    order, base = channel_order.order_of(pruned), str(adapter.settings.get("base_model_name_or_path") or "")
    if order is None or "mask_digest" in adapter.settings or channel_order.order_of(base) == order:
        return
    raise UserError(
        f"{trained} was trained on {base or 'a model that it does not name'}, and {pruned} has its channels in another "
        "order (prune.permute_channels); if it was trained on these weights, set base_model_name_or_path in its "
        f"adapter_config.json to {pruned}; otherwise prune without that key"
    )


def _skeleton(config: Config, pruned: Path) -> Skeleton:
    """The pruned checkpoint's model without weights, after comparing the checkpoint with it."""
    trust = config.model.trust_remote_code
    skeleton = Skeleton(checkpoint.load_config(pruned, trust), trust_remote_code=trust)
    check_weights(TensorFiles(pruned), skeleton.model)
    return skeleton


def _match_replaced(source: TensorFiles, adapter: Adapter, skeleton: Skeleton) -> dict[str, str]:
    """The adapter's name of each tensor that it stores in full, by the checkpoint's name.

    Raises:
        UserError: one has no place in the checkpoint, is a pruned matrix, or would change what is tied to it.
    """
    replaced, tied = {}, _tied(skeleton)
    for name, key in adapter.replaced.items():
        where = f"the adapter stores {name} in full (modules_to_save, bias or embeddings)"
        if name.removesuffix(".weight") in tied:
            raise UserError(f"{where}, {TIED}")
        stored = stored_name(source, name, skeleton.base_prefix)
        shapes = [tuple(specs.shape) for specs in (adapter.files.specs[key], source.spec(stored))]
        if shapes[0] != shapes[1]:
            raise UserError(f"{where} as {shapes[0]}, but the checkpoint has {shapes[1]}; was the vocabulary resized?")
        if len(shapes[1]) == 2 and (weight := source.read(stored)).count_nonzero() < (1 - DENSE) * weight.numel():
            raise UserError(f"{where}, which was pruned: its zeros would be lost; train it without modules_to_save")
        replaced[stored] = key
    return replaced


def _tied(skeleton: Skeleton) -> set[str]:
    """The names of the embeddings and of the output head, with and without the model's prefix, if they are tied."""
    model, prefix = skeleton.model, f"{skeleton.base_prefix}."
    if not getattr(skeleton.config.get_text_config(), "tie_word_embeddings", False):
        return set()
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if any(module is end for end in ends)]
    return {*names, *(name.removeprefix(prefix) for name in names)}


def _check_base(source: TensorFiles, adapter: Adapter, skeleton: Skeleton, pruned: Path) -> None:
    """Raises UserError if a base weight that an adapter stores is not the checkpoint's in the adapter's dtype."""
    for name, key in adapter.base.items():
        trained_on = adapter.files.read(key)
        weight = source.read(stored_name(source, name, skeleton.base_prefix))
        if not torch.equal(weight.to(trained_on.dtype), trained_on):
            raise UserError(
                f"the adapter's {key} differs from {name} of {pruned}: it was trained on other base weights; merge it "
                "into the checkpoint that it was trained on, or train it again on this one"
            )


def _match(source: TensorFiles, adapter: Adapter, skeleton: Skeleton, pruned: Path) -> dict[str, str]:
    """The checkpoint's tensor for each adapted module, with matching shapes."""
    prefix, tied = skeleton.base_prefix, _tied(skeleton)
    layers = dict(skeleton.model.named_modules())
    stored = {}
    for module, parts in adapter.modules.items():
        if module in tied:
            raise UserError(f"the adapter adapts {module}, {TIED}")
        if module in layers and not isinstance(layers[module], nn.Linear):
            kind = type(layers[module]).__name__
            raise UserError(f"the adapter adapts {module}, a {kind}; sppctl merges adapters of nn.Linear layers")
        try:
            name = stored_name(source, f"{module}.weight", prefix)
        except UserError as error:
            raise UserError(
                f"the adapter adapts {module}, which {pruned} does not have; is it another model's?"
            ) from error
        shape = source.spec(name).shape
        shapes = {part: adapter.files.specs[key].shape for part, key in parts.items()}
        if len(shape) != 2 or shapes != MERGERS[adapter.kind].shapes(adapter.settings_of(module), *shape):
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
            str(source.files[source.home[name]].path),
            f"{name} does not have the zeros that were recorded; nothing was published",
            f"prune again ({console.command('prune', '--force', run=prepared.pruned.parent)})",
        )
    tensors = {part: adapter.files.read(key) for part, key in adapter.modules[module].items()}
    settings = adapter.settings_of(module)
    out.write(name, merged_weight(adapter.kind, mask, weight, tensors, settings, out.spec(name).dtype))
    promised = adapter.settings.get("patterns", {}).get(module, adapter.settings.get("pattern"))
    pattern = None if promised is None else Pattern.parse(promised)
    return prove(adapter.kind, mask, name, weight, out.read(name), pattern)
