"""What training keeps in memory, from the shapes of a model without weights: activations, kernels, shares of a GPU.

Everything is in bytes. T is the number of tokens on a device, d the bytes of an element of the model's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from sppctl.model.blocks import Skeleton
from sppctl.model.targets import Target
from sppctl.packed.format import packed_bytes
from sppctl.pattern import Pattern

FLOAT = 4  # bytes of a float32
KERNEL_CHUNK = 1 << 24  # elements that the kernels on a GPU hold in float32 at a time
SMALLEST_8BIT, BLOCK_8BIT = 4096, 256  # bitsandbytes: elements of a matrix in 8 bits, and of a block with one scale
GPU_SIZES = (12, 16, 24, 40, 48, 80, 141)  # GB as sold; nearly as many GiB are available
RESERVED = 1 << 30  # for the CUDA context and the libraries' workspaces
USABLE = 0.95  # of the rest, what fragmentation leaves
# output projections of modules, whose other projections share one input; without such a name, the last one
_OUTPUTS = ("o_proj", "out_proj", "down_proj", "c_proj", "w2")
_STOCK = ("lora", "hira")  # PEFT's own layers, which convert their input to the adapter's float32


@dataclass(frozen=True)
class Batch:
    """The examples on a device at a time."""

    rows: int  # examples
    seq_len: int  # tokens of each, padding included
    itemsize: int  # d, bytes of an element of the activations
    masked: bool = True  # the rows are padded, so that attention is given a mask

    @property
    def tokens(self) -> int:
        """T."""
        return self.rows * self.seq_len


@dataclass(frozen=True)
class Activations:
    """Bytes kept for the backward pass."""

    blocks: int  # by all blocks together
    largest_block: int  # by the largest of them; gradient checkpointing recomputes one at a time
    inputs: int  # the hidden states before every block, all that checkpointing keeps of the blocks
    head: int  # norms after the blocks, and labels
    logits: int  # log-probabilities of the loss, float32

    def kept(self, checkpointing: bool) -> int:
        """At the end of the forward pass."""
        return (self.inputs if checkpointing else self.blocks) + self.head + self.logits

    def peak(self, checkpointing: bool, kernel: int, widest: int) -> int:
        """At the worst moment of a step.

        Either in the loss, when its two gradients, as large as the logits in float32, are added to all that is kept;
        or in a block's backward, when the logits are freed and a recomputed block, the kernel's buffers and a few
        gradients of the widest activation (``widest`` bytes each) are added.
        """
        kept = self.kept(checkpointing)
        in_loss = kept + 2 * self.logits
        in_block = kept - self.logits + (self.largest_block if checkpointing else 0) + kernel + 3 * widest
        return max(in_loss, in_block)


def num_parameters(skeleton: Skeleton) -> int:
    """Parameters of a model; on the meta device, an output head tied to the embeddings is a separate parameter."""
    total = sum(parameter.numel() for parameter in skeleton.model.parameters())
    head = skeleton.model.get_output_embeddings()
    tied = skeleton.config.get_text_config().tie_word_embeddings
    if tied and head is not None and head.weight is not skeleton.model.get_input_embeddings().weight:
        total -= head.weight.numel()
    return total


def mask_bytes(method: str, trainable: int) -> int:
    """Bytes of the masks that an adapter with so many trainable parameters holds: those of ste, a byte per weight."""
    return trainable if method == "ste" else 0


def projections(linears: Iterable[str]) -> list[tuple[list[str], str]]:
    """Linear layers by module, in the model's order: those that share the module's input, and its output projection."""
    modules: dict[str, list[str]] = {}
    for name in linears:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    outputs = [next((name for name in names if name.endswith(_OUTPUTS)), names[-1]) for names in modules.values()]
    return [([n for n in names if n != out], out) for names, out in zip(modules.values(), outputs, strict=True)]


def activations(
    skeleton: Skeleton, adapted: dict[str, Target], batch: Batch, method: str, dropout: float
) -> Activations:
    """What the blocks, the head and the loss keep for the backward pass.

    Per token, a block keeps (frozen weights need no input of their layer, adapted ones do):

    - d n for every distinct input (n features) of adapted layers: q, k, v share one, gate and up another; SPP, the
      masked methods and full tuning keep nothing else. PEFT's lora and hira keep copies for each
      layer.
    - attention (SDPA): d (H + 2 K) for queries, keys and values, H = heads x head_dim; K = H where a mask makes
      transformers repeat the keys and values of grouped heads, else their own width; d H for its output, which is the
      output projection's input; 4 heads for the log-sum-exp; with a mask d S, its row of S tokens.
    - MLP: d i each for the activation's input, its output and the factor that multiplies it, i the intermediate
      size; their product is the down projection's input. Without a gate, the first and the last only.
    - norms: RMSNorm 4 width + 4 (its input in float32), LayerNorm d width + 8. The first of all is not kept,
      because nothing before it is trained.

    The head keeps the last norm, 8 for the label, and 4 V: the log-probabilities, V the size of the vocabulary.
    Experts of a mixture and eager attention (soft-capping) keep more than this.
    """
    blocks = [_block(skeleton, index, adapted, batch, method, dropout) for index in range(len(skeleton.blocks))]
    config = skeleton.config.get_text_config()
    tokens, prefix = batch.tokens, f"{skeleton.blocks_name}."
    first = next((kept for _, _, kept in _norms(skeleton.blocks[0], batch)), 0)
    ends = [kept for name, _, kept in _norms(skeleton.model, batch) if not name.startswith(prefix)]
    return Activations(
        blocks=sum(blocks) - tokens * first,
        largest_block=max(blocks),
        inputs=len(blocks) * tokens * config.hidden_size * batch.itemsize,
        head=tokens * (sum(ends) + 8),
        logits=tokens * config.vocab_size * FLOAT,
    )


def _block(
    skeleton: Skeleton, index: int, adapted: dict[str, Target], batch: Batch, method: str, dropout: float
) -> int:
    block, prefix = skeleton.blocks[index], f"{skeleton.blocks_name}.{index}."
    config, d = skeleton.config.get_text_config(), batch.itemsize
    heads = config.num_attention_heads
    linears = {prefix + name: m for name, m in block.named_modules() if isinstance(m, nn.Linear) and m.out_features > 1}
    per_token = fixed = 0
    for inputs, out in projections(linears):
        for group in (inputs, [out]):
            if any(name in adapted for name in group):
                per_token += d * linears[group[0]].in_features
        inner = linears[out].in_features  # H of attention, i of the MLP
        if inputs and "att" in out.removeprefix(prefix):
            share = 1 if batch.masked else getattr(config, "num_key_value_heads", heads) / heads
            per_token += int(d * inner * (1 + 2 * share)) + FLOAT * heads
            per_token += d * batch.seq_len if batch.masked else 0
            per_token += 0 if out in adapted else d * inner  # attention keeps its output itself
        elif inputs:
            projected = sum(linears[name].out_features for name in inputs)
            per_token += d * (projected + inner if projected > inner else projected)
    for name, width, kept in _norms(block, batch):
        # applied once to a token, or to each head of the projection that it is named after (q_norm)
        kind = name.rpartition(".")[2].removesuffix("_norm").removesuffix("_layernorm")
        projection = next((m for linear_name, m in linears.items() if linear_name.endswith(f".{kind}_proj")), None)
        per_token += kept * (1 if projection is None else projection.out_features // width)
    # PEFT's own layers also keep their input in float32 where it is not that already, after dropout its mask (a byte)
    for name in linears.keys() & adapted.keys() if method in _STOCK else ():
        linear = linears[name]
        per_token += FLOAT * linear.in_features if dropout or d != FLOAT else 0
        per_token += linear.in_features if dropout else 0
        fixed += FLOAT * linear.weight.numel() if method == "hira" else 0  # W * (B A)
    return batch.tokens * per_token + fixed


def _norms(module: nn.Module, batch: Batch) -> Iterator[tuple[str, int, int]]:
    """The norms inside: name, width, and the bytes that each keeps of one vector."""
    for name, norm in module.named_modules():
        widths = [parameter.shape[0] for parameter in norm.parameters(recurse=False) if parameter.dim() == 1]
        if widths and type(norm).__name__.endswith("Norm"):
            layer_norm = isinstance(norm, nn.LayerNorm)
            yield name, widths[0], batch.itemsize * widths[0] + 2 * FLOAT if layer_norm else FLOAT * (widths[0] + 1)


def kernel_buffers(adapted: dict[str, Target], batch: Batch, method: str, dropout: float) -> int:
    """Bytes that the adapter's kernel holds while it works on the largest layer (m, n).

    spp and masked_lora: the effective weight, d m n, and at most ``KERNEL_CHUNK`` of its elements in float32; in the
    backward pass such a slice of dy^T x instead, in d and in float32; with dropout the dropped input (T, n) and its
    mask. hira: its matrix's gradient in float32, twice. masked_full and ste: the effective weight in d. lora:
    negligible.
    """
    sizes, d = [], batch.itemsize
    for target in adapted.values():
        elements = target.out_features * target.in_features
        chunk = min(KERNEL_CHUNK, elements)
        if method in ("spp", "masked_lora"):
            dropped = batch.tokens * target.in_features * (2 * d + 1) if dropout else 0
            sizes.append(max(d * elements + FLOAT * chunk, (d + 2 * FLOAT) * chunk) + dropped)
        else:
            sizes.append({"lora": 0, "hira": 2 * FLOAT}.get(method, d) * elements)
    return max(sizes)


def optimizer_state(optimizer: str, shapes: Iterable[tuple[int, int]]) -> int:
    """Bytes of an optimizer's state of float32 matrices (m, n).

    adamw: two moments, 8 m n. adafactor: the means of the second moment over rows and columns, 4 (m + n). adamw_8bit:
    two moments in a byte each with a float32 scale for every 256 values; as adamw for matrices of less than 4,096.
    """
    total = 0
    for m, n in shapes:
        if optimizer == "adafactor":
            total += FLOAT * (m + n)
        elif optimizer == "adamw_8bit" and m * n >= SMALLEST_8BIT:
            total += 2 * (m * n + FLOAT * math.ceil(m * n / BLOCK_8BIT))
        else:
            total += 2 * FLOAT * m * n
    return total


def packed_matrices(targets: dict[str, Target], patterns: dict[str, Pattern], d: int, stored: int) -> tuple[int, int]:
    """Bytes of the linear layers that become smaller by packing, dense and packed.

    Args:
        targets: the pruned matrices; experts and Conv1D stay dense.
        patterns: of each.
        d: bytes of an element that is computed with.
        stored: bytes of an element in the checkpoint, which a packed weight keeps if they are fewer.
    """
    dense = packed = 0
    for name, target in targets.items():
        m, n = target.out_features, target.in_features
        size = packed_bytes(m, n, m * (n - patterns[name].num_pruned(n)), min(d, stored))
        if target.is_linear and size < m * n * d:
            dense, packed = dense + m * n * d, packed + size
    return dense, packed


def fits(total: int) -> list[int]:
    """The sizes of GPU (in GB) with room for ``total`` bytes besides CUDA's context and some fragmentation."""
    return [size for size in GPU_SIZES if total <= (size * 2**30 - RESERVED) * USABLE]
