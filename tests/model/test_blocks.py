from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, GROUPED, VOCAB, stored_dtype
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    DeepseekV3Config,
    Gemma4TextConfig,
    Glm4MoeConfig,
    T5Config,
)

from sppctl.errors import StageError, UserError
from sppctl.files.safe_files import OwnFiles
from sppctl.model.block_call import BlockCall
from sppctl.model.blocks import BlockStack, Skeleton
from sppctl.model.checkpoint import load_config

CPU = torch.device("cpu")
LENGTH = 40  # longer than Gemma 2's sliding window of 16
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def ids(batch: int, length: int = LENGTH) -> Tensor:
    return torch.randint(0, VOCAB - 4, (batch, length), generator=torch.Generator().manual_seed(batch))


MIXTURE = GROUPED | {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
BIASED = {  # routers with a bias that is a buffer, not a parameter
    "glm4_moe": lambda: Glm4MoeConfig(**MIXTURE),
    "deepseek_v3": lambda: DeepseekV3Config(**MIXTURE | LATENT | {"num_key_value_heads": 4, "head_dim": 4}),
}


def biased(family: str, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint whose router sends tokens elsewhere than it would without its bias."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(BIASED[family](), dtype=dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = torch.tensor([0.6, 1e-5, 0.0, 0.3003])  # not exact in bfloat16
    model.save_pretrained(directory)
    return directory


def open_stack(directory: Path) -> BlockStack:
    stack = BlockStack(directory, CPU, stored_dtype(directory))
    stack.load_embeddings()
    return stack


def blocks_in_memory(stack: BlockStack) -> list[int]:
    return [i for i, block in enumerate(stack.blocks) if any(not p.is_meta for p in block.parameters())]


def rewritten(source: Path, out: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a checkpoint with other tensors."""
    shutil.copytree(source, out)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


@torch.no_grad()
def own_hidden_states(directory: Path, input_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What goes into and comes out of each block of the real model."""
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    (blocks,) = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
    seen = []

    def look(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        seen.append((before.clone(), (output if isinstance(output, Tensor) else output[0]).clone()))

    for block in blocks:
        block.register_forward_hook(look, with_kwargs=True)
    model(input_ids=input_ids, use_cache=False)
    return seen


# --- replay -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 3])
def test_check_replay_passes(make_checkpoint: Callable[..., Path], family: str, batch: int) -> None:
    passed: list[int] = []
    open_stack(make_checkpoint(family)).check_replay(ids(batch), passed.append)
    assert passed == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_walking_the_blocks_gives_the_models_own_hidden_states(
    make_checkpoint: Callable[..., Path], family: str, batch: int, dtype: torch.dtype
) -> None:
    directory = make_checkpoint(family, dtype=dtype)
    expected = own_hidden_states(directory, ids(batch))
    stack = open_stack(directory)
    stack.check_replay(ids(1, 24), lambda _: None)  # another shape must not matter
    hidden, calls = stack.record(ids(batch))
    assert len(calls) == len(expected) == 2
    for index, (before, after) in enumerate(expected):
        assert torch.equal(hidden, before), f"input of block {index}"
        block = stack.load_block(index)
        hidden = calls[index](block, hidden)
        assert hidden.dtype == dtype
        assert torch.equal(hidden, after), f"output of block {index}"
        stack.release_block(index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", BIASED)
@torch.no_grad()
def test_buffers_of_a_checkpoint_are_loaded(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    directory = biased(family, tmp_path / family, dtype)
    own = AutoModelForCausalLM.from_pretrained(directory).eval()
    expected = own_hidden_states(directory, ids(1))
    stack = open_stack(directory)
    hidden, calls = stack.record(ids(1))
    for index, (_, after) in enumerate(expected):
        block = stack.load_block(index)
        bias, wanted = (blocks[index].mlp.gate.e_score_correction_bias for blocks in (stack.blocks, own.model.layers))
        assert bias.dtype == wanted.dtype == torch.float32
        assert torch.equal(bias, wanted)
        hidden = calls[index](block, hidden)
        assert torch.equal(hidden, after), f"output of block {index}"


def test_a_buffer_that_is_missing(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.gate.e_score_correction_bias"

    def remove(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    directory = rewritten(biased("glm4_moe", tmp_path / "whole"), tmp_path / "other", remove)
    with pytest.raises(UserError, match=f"holds no tensor {name}"):
        BlockStack(directory, CPU, "float32")


def test_blocks_that_are_given_more_of_the_tokens_are_refused(tmp_path: Path) -> None:
    config = Gemma4TextConfig(
        **GROUPED,
        global_head_dim=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=16,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(StageError, match=r"block 0 of Gemma4ForCausalLM is given per_layer_input, .*magnitude"):
        open_stack(tmp_path).check_replay(ids(1), lambda _: None)


@pytest.mark.parametrize(("dtype", "advice"), [(torch.bfloat16, "float32"), (torch.float32, None)], ids=str)
def test_hidden_states_that_overflow_are_no_fault_of_the_architecture(
    dtype: torch.dtype, advice: str | None, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    def enlarge(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.input_layernorm.weight"].fill_(1e38)
        tensors["model.layers.0.self_attn.v_proj.weight"].fill_(1e20)

    directory = rewritten(make_checkpoint("llama", dtype=dtype), tmp_path / "large", enlarge)
    overflow = rf"most likely they overflow bfloat16; set model\.compute_dtype={advice}$"
    fix = overflow if advice else "the checkpoint is broken"
    with pytest.raises(StageError, match=rf"block 0 of LlamaForCausalLM gives .* not finite: .*{fix}"):
        open_stack(directory).check_replay(ids(1), lambda _: None)


def test_the_arguments_are_each_blocks_own(make_checkpoint: Callable[..., Path]) -> None:
    _, (sliding, full) = open_stack(make_checkpoint("gemma2")).record(ids(1))

    def allowed(call: BlockCall) -> list[int]:
        mask = call.kwargs["attention_mask"]
        if mask is None:  # of some versions of transformers: causal, and nothing else
            return list(range(1, LENGTH + 1))
        return (mask if mask.dtype == torch.bool else mask == 0)[0, 0].sum(-1).tolist()

    assert allowed(sliding) == [min(position + 1, 16) for position in range(LENGTH)]
    assert allowed(full) == list(range(1, LENGTH + 1))


@pytest.fixture
def first_blocks_arguments_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake that is exact for most families."""
    record = BlockStack.record

    def mistaken(self: BlockStack, input_ids: Tensor) -> tuple[Tensor, list[BlockCall]]:
        hidden, calls = record(self, input_ids)
        return hidden, [calls[0]] * len(calls)

    monkeypatch.setattr(BlockStack, "record", mistaken)


@pytest.mark.usefixtures("first_blocks_arguments_for_all")
def test_replay_with_another_blocks_arguments_is_noticed(make_checkpoint: Callable[..., Path]) -> None:
    stack = open_stack(make_checkpoint("gemma2"))
    passed: list[int] = []
    with pytest.raises(StageError, match=r"replaying block 1 of Gemma2ForCausalLM"):
        stack.check_replay(ids(1), passed.append)
    assert passed == [0]


@pytest.mark.usefixtures("first_blocks_arguments_for_all")
def test_the_mistake_shows_only_beyond_the_sliding_window(make_checkpoint: Callable[..., Path]) -> None:
    stack = open_stack(make_checkpoint("gemma2"))
    stack.check_replay(ids(1, 16), lambda _: None)


def test_recording_runs_no_block_and_leaves_the_model_as_it_was(llama: Path) -> None:
    stack = open_stack(llama)
    first, _ = stack.record(ids(1))  # would fail on weights that are not there
    assert not blocks_in_memory(stack)
    assert all("forward" not in vars(block) for block in stack.blocks)
    assert torch.equal(stack.record(ids(1))[0], first)


@pytest.mark.parametrize("form", ["position", "name"])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, "cache")], ids=["tensor", "tuple"])
def test_a_call_is_repeated_in_its_own_form(form: str, wrap: Callable[[Tensor], Any]) -> None:
    seen: list[tuple[Any, ...]] = []

    def block(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return wrap((args[0] if args else kwargs["hidden_states"]) + 1)

    one, two = torch.tensor([1.0]), torch.tensor([2.0])
    before: tuple[tuple[Any, ...], dict[str, Any]] = (
        ((one, "mask"), {"k": 1}) if form == "position" else ((), {"hidden_states": one, "k": 1})
    )
    call, hidden = BlockCall.of(*before)
    assert hidden is one
    assert call(block, two).tolist() == [3.0]
    assert seen == [((two, "mask"), {"k": 1}) if form == "position" else ((), {"hidden_states": two, "k": 1})]


# --- memory -----------------------------------------------------------------------------------------------------------


def test_nothing_is_loaded_at_first(llama: Path) -> None:
    stack = BlockStack(llama, CPU, "float32")
    assert all(parameter.is_meta for parameter in stack.model.parameters())
    assert len(stack) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_all_but_blocks_and_head(make_checkpoint: Callable[..., Path], family: str) -> None:
    stack = open_stack(make_checkpoint(family))
    assert not blocks_in_memory(stack)
    base = getattr(stack.model, stack.base_prefix)
    inside = stack.blocks_name.removeprefix(f"{stack.base_prefix}.") + "."
    outside = {name for name, _ in base.named_parameters() if not name.startswith(inside)}
    assert outside == {name for name, p in base.named_parameters() if not p.is_meta}
    assert not any(buffer.is_meta for buffer in base.buffers())


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_come_from_the_file_and_go(make_checkpoint: Callable[..., Path], family: str) -> None:
    directory = make_checkpoint(family)
    own = AutoModelForCausalLM.from_pretrained(directory)
    stack = BlockStack(directory, CPU, "float32")
    block = stack.load_block(1)
    assert blocks_in_memory(stack) == [1]
    expected = dict(own.get_submodule(f"{stack.blocks_name}.1").named_parameters())
    assert {name for name, _ in block.named_parameters()} == expected.keys()
    assert all(torch.equal(parameter, expected[name]) for name, parameter in block.named_parameters())
    stack.release_block(1)
    assert blocks_in_memory(stack) == []


def test_only_one_block_is_in_memory_at_a_time(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = open_stack(llama)
    loaded: list[int] = []
    most: list[int] = []
    load = BlockStack._load

    def count(self: BlockStack, parameter: str, files: object = None) -> None:
        load(self, parameter)
        most.append(len(blocks_in_memory(self)))

    monkeypatch.setattr(BlockStack, "_load", count)
    for block in stack.blocks:
        block.register_forward_hook(lambda *_: loaded.append(len(blocks_in_memory(stack))))
    stack.check_replay(ids(1), lambda _: loaded.append(len(blocks_in_memory(stack))))
    assert set(most) == {1}
    assert set(loaded) == {0, 1}  # 1 while a block runs, 0 once it has passed
    assert blocks_in_memory(stack) == []


# --- targets ----------------------------------------------------------------------------------------------------------


def test_targets_by_the_last_part(llama: Path) -> None:
    found = BlockStack(llama, CPU, "float32").targets(["down_proj", "q_proj"])
    assert list(found) == [  # in the model's order
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert (found["model.layers.0.mlp.down_proj"].in_features, found["model.layers.0.mlp.down_proj"].out_features) == (
        48,
        32,
    )


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["mlp.down_proj"], ["0.mlp.down_proj", "1.mlp.down_proj"]),
        (["1.mlp.down_proj"], ["1.mlp.down_proj"]),
        (["model.layers.0.mlp.up_proj"], ["0.mlp.up_proj"]),
        (["*.0.mlp.*"], ["0.mlp.gate_proj", "0.mlp.up_proj", "0.mlp.down_proj"]),
        (["model.layers.1.self_attn.[kv]_proj"], ["1.self_attn.k_proj", "1.self_attn.v_proj"]),
        (["up_proj", "*.up_proj", "mlp.up_proj"], ["0.mlp.up_proj", "1.mlp.up_proj"]),
    ],
)
def test_targets_by_dotted_ends_and_patterns(llama: Path, names: list[str], expected: list[str]) -> None:
    assert list(BlockStack(llama, CPU, "float32").targets(names)) == [f"model.layers.{name}" for name in expected]


def test_a_target_is_a_whole_part_of_a_name(llama: Path) -> None:
    with pytest.raises(UserError, match="'proj' matches no linear layer"):
        BlockStack(llama, CPU, "float32").targets(["proj"])


@pytest.mark.parametrize(
    ("family", "count"),
    [
        ("llama", 14),
        ("qwen3", 14),
        ("gemma2", 14),
        ("opt", 12),
        ("gpt_neox", 8),
        ("gpt2", 8),
        ("phi3", 8),
        ("qwen3_moe", 32),
    ],
)
def test_all_linear_means_those_of_the_blocks(make_checkpoint: Callable[..., Path], family: str, count: int) -> None:
    stack = BlockStack(make_checkpoint(family), CPU, "float32")
    found = stack.targets("all-linear")
    assert len(found) == count
    assert all(name.startswith(f"{stack.blocks_name}.") for name in found)  # not the output head


def test_an_unknown_target_is_told_what_there_is(make_checkpoint: Callable[..., Path]) -> None:
    stack = BlockStack(make_checkpoint("opt"), CPU, "float32")
    with pytest.raises(UserError) as caught:
        stack.targets([*PROJECTIONS[:3], "gate_proj"], key="train.targets")
    assert str(caught.value) == (
        "train.targets: 'gate_proj' matches no linear layer; "
        "this model has fc1, fc2, k_proj, out_proj, q_proj, v_proj (or all-linear)"
    )


def test_a_headless_checkpoint_is_walked(llama: Path, tmp_path: Path) -> None:
    def headless(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    stack = open_stack(rewritten(llama, tmp_path / "headless", headless))
    assert stack.homes(stack.targets(["up_proj"])["model.layers.0.mlp.up_proj"]) == {"model.safetensors"}
    passed: list[int] = []
    stack.check_replay(ids(1), passed.append)
    assert passed == [0, 1]


# --- models that cannot be walked -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(llama: Path, tmp_path: Path, value: float) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    directory = rewritten(llama, tmp_path / "broken", lambda tensors: tensors[name].view(-1)[5].fill_(value))
    with pytest.raises(StageError, match=f"{name} holds NaN or infinite values"):
        open_stack(directory).check_replay(ids(1), lambda _: None)


def test_a_shape_that_the_configuration_does_not_imply(llama: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    directory = rewritten(llama, tmp_path / "other", lambda tensors: tensors.update({name: torch.zeros(40, 32)}))
    with pytest.raises(UserError, match=rf"{name} has shape \(40, 32\), the model's is \(48, 32\)"):
        BlockStack(directory, CPU, "float32").load_block(1)


def test_a_tensor_that_is_missing(llama: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def remove(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    with pytest.raises(UserError, match=f"holds no tensor {name}, which config.json implies"):
        BlockStack(rewritten(llama, tmp_path / "other", remove), CPU, "float32")


def test_quantised_weights_are_refused(llama: Path, tmp_path: Path) -> None:
    def quantise(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(torch.int8)

    with pytest.raises(UserError, match="holds no floating-point weights"):
        BlockStack(rewritten(llama, tmp_path / "other", quantise), CPU, "float32")


def test_single_bytes_are_refused(llama: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def quantise(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    with pytest.raises(UserError, match=rf"{name} is stored as float8_e4m3fn; .*use one in bfloat16"):
        BlockStack(rewritten(llama, tmp_path / "other", quantise), CPU, "float32")


def test_a_model_that_generates_no_text_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.path: no causal language model can be built from its config"):
        Skeleton(T5Config(d_model=32, num_layers=2, num_heads=4, vocab_size=VOCAB))


def test_a_model_without_a_list_of_blocks_is_refused(llama: Path) -> None:
    config = load_config(llama)
    skeleton = Skeleton(config)
    config.num_hidden_layers = 3  # no list of the model has that length
    with pytest.raises(UserError, match="LlamaForCausalLM has no list of 3 decoder blocks"):
        skeleton._find_blocks()


def test_another_head_does_not_hide_the_blocks() -> None:
    config = BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB
    )
    config.is_decoder = True
    assert Skeleton(config).blocks_name == "bert.encoder.layer"


# --- dtypes -----------------------------------------------------------------------------------------------------------


def test_float16_computed_in_float32_is_exact(make_checkpoint: Callable[..., Path]) -> None:
    directory = make_checkpoint("llama", dtype=torch.float16)
    stack = BlockStack(directory, CPU, "float32")
    stack.load_embeddings()
    assert stack.record(ids(1))[0].dtype == torch.float32
    block = stack.load_block(0)
    assert {parameter.dtype for parameter in block.parameters()} == {torch.float32}
    stored = load_file(directory / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert stored.dtype == torch.float16
    assert torch.equal(block.mlp.up_proj.weight, stored.float())
    stack.release_block(0)
    passed: list[int] = []
    stack.check_replay(ids(1), passed.append)
    assert passed == [0, 1]


@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_computes_in_the_dtype_that_is_asked_for(wanted: str, make_checkpoint: Callable[..., Path]) -> None:
    stack = BlockStack(make_checkpoint("llama", dtype=torch.float16), CPU, dtype=wanted)
    stack.load_embeddings()
    assert stack.record(ids(1))[0].dtype == stack.load_block(0).mlp.up_proj.weight.dtype == getattr(torch, wanted)


def test_kept_weights_are_written_as_they_are_stored(llama: Path, tmp_path: Path) -> None:
    """Although they were rounded to compute with them; those that were changed are what was computed."""
    shutil.copytree(llama, tmp_path / "copy")
    stack, copy = BlockStack(llama, CPU, "bfloat16"), OwnFiles(tmp_path / "copy")
    target = stack.targets(["up_proj"])["model.layers.0.mlp.up_proj"]
    stack.load_block(0)
    weight = target.view(stack.model)
    weight[:, ::2] = 0
    weight[0, 1] = 3.0
    stack.write(target, copy)
    before, after = stack.files.read(f"{target.name}.weight"), copy.read(f"{target.name}.weight")
    assert not torch.equal(before, before.bfloat16().float())
    assert after[0, 1] == 3.0
    before[:, ::2] = 0
    before[0, 1] = 3.0
    assert torch.equal(before, after)
