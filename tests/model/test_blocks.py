from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, GROUPED, SMALL, VOCAB, stored_dtype
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    BertConfig,
    DeepseekV3Config,
    Gemma4TextConfig,
    Glm4MoeConfig,
    GptOssConfig,
    LlamaModel,
    LongcatFlashConfig,
    ModernBertDecoderConfig,
    T5Config,
)

from sppctl.errors import StageError, UserError
from sppctl.files.safe_files import OwnFiles
from sppctl.model import blocks
from sppctl.model.block_call import BlockCall
from sppctl.model.blocks import BlockStack, Skeleton
from sppctl.model.checkpoint import load_config
from sppctl.model.weights import empty_model

CPU = torch.device("cpu")
LENGTH = 40  # longer than Gemma 2's sliding window of 16


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


def rewritten(source: Path, out: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
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
    passed: list[int] = []
    stack.check_replay(ids(batch, 24), passed.append)  # another shape must not matter
    assert passed == [0, 1]
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
def test_buffers_of_a_checkpoint_are_loaded_and_missed(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
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
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    with pytest.raises(UserError, match=f"holds no tensor {name}"):
        BlockStack(rewritten(directory, tmp_path / "other", lambda tensors: tensors.pop(name)), CPU, "float32")


def test_blocks_return_as_many_things_as_their_model_unpacks(tmp_path: Path) -> None:
    """Bamba's return their attention weights too."""
    heads = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
    AutoModelForCausalLM.from_config(BambaConfig(**GROUPED, **heads, attn_layer_indices=[1])).save_pretrained(tmp_path)
    passed: list[int] = []
    open_stack(tmp_path).check_replay(ids(1), passed.append)
    assert passed == [0, 1]


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        (
            "per_layer_input",
            {"hidden_size_per_layer_input": 8, "layer_types": ["sliding_attention", "full_attention"]},
        ),
        # empty until the first block puts its keys and values in, which the second uses
        (
            "shared_kv_states",
            # without per-layer inputs, transformers 5.23 fails unless hidden states are asked for
            {"num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 2, "output_hidden_states": True},
        ),
    ],
)
def test_blocks_that_are_given_more_of_the_tokens_are_refused(
    argument: str, options: dict[str, Any], tmp_path: Path
) -> None:
    common = GROUPED | {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "sliding_window": 16}
    config = Gemma4TextConfig(**common | options, global_head_dim=8, vocab_size_per_layer_input=VOCAB)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(StageError, match=rf"block 0 of Gemma4ForCausalLM is given {argument}, .*magnitude"):
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
def test_replay_with_another_blocks_arguments_is_noticed_beyond_the_sliding_window(
    make_checkpoint: Callable[..., Path],
) -> None:
    passed: list[int] = []
    with pytest.raises(StageError, match=r"replaying block 1 of Gemma2ForCausalLM"):
        open_stack(make_checkpoint("gemma2")).check_replay(ids(1), passed.append)
    assert passed == [0]
    open_stack(make_checkpoint("gemma2")).check_replay(ids(1, 16), passed.append)
    assert passed == [0, 0, 1]


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


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_all_but_blocks_and_head(make_checkpoint: Callable[..., Path], family: str) -> None:
    assert all(p.is_meta for p in BlockStack(make_checkpoint(family), CPU, "float32").model.parameters())
    stack = open_stack(make_checkpoint(family))
    assert not blocks_in_memory(stack)
    assert len(stack) == 2
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


def test_only_one_block_is_in_memory_at_a_time(llama: Path) -> None:
    stack = open_stack(llama)
    running, passed = list[list[int]](), list[list[int]]()
    for block in stack.blocks:
        block.register_forward_hook(lambda *_: running.append(blocks_in_memory(stack)))
    stack.check_replay(ids(1), lambda _: passed.append(blocks_in_memory(stack)))
    assert {tuple(loaded) for loaded in running} == {(), (0,), (1,)}  # none where calls are only recorded
    assert passed == [[], []]


def test_a_headless_checkpoint_is_walked(llama: Path, tmp_path: Path) -> None:
    def headless(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    stack = open_stack(rewritten(llama, tmp_path / "headless", headless))
    assert stack.homes(stack.targets(["up_proj"])["model.layers.0.mlp.up_proj"]) == {"model.safetensors"}
    passed: list[int] = []
    stack.check_replay(ids(1), passed.append)
    assert passed == [0, 1]


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(llama: Path, tmp_path: Path, value: float) -> None:
    directory = rewritten(llama, tmp_path / "broken", lambda tensors: tensors[UP].view(-1)[5].fill_(value))
    with pytest.raises(StageError, match=f"{UP} holds NaN or infinite values"):
        open_stack(directory).check_replay(ids(1), lambda _: None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.update({UP: torch.zeros(40, 32)}), r"has shape \(40, 32\), the model's is \(48, 32\)"),
        (lambda tensors: tensors.pop(UP), f"holds no tensor {UP}, which config.json implies"),
        (lambda tensors: tensors.update({n: t.char() for n, t in tensors.items()}), "holds no floating-point weights"),
        (
            lambda tensors: tensors.update({UP: tensors[UP].to(torch.float8_e4m3fn)}),
            rf"{UP} is stored as float8_e4m3fn; .*use one in bfloat16",
        ),
    ],
    ids=["shape", "missing", "int8", "float8"],
)
def test_weights_of_another_form_are_refused(
    change: Callable[[dict[str, Tensor]], Any], message: str, llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        BlockStack(rewritten(llama, tmp_path / "other", change), CPU, "float32")


def test_a_model_that_generates_no_text_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.path: no causal language model can be built from its config"):
        Skeleton(T5Config(d_model=32, num_layers=2, num_heads=4, vocab_size=VOCAB))


def test_a_model_without_a_list_of_blocks_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_another_depth(config: Any, *_: Any) -> Any:
        model = empty_model(config)
        config.num_hidden_layers = 3  # no list of the model has that length
        return model

    monkeypatch.setattr(blocks, "empty_model", of_another_depth)
    with pytest.raises(UserError, match="LlamaForCausalLM has no list of 3 decoder blocks"):
        Skeleton(load_config(llama))


def test_the_blocks_are_in_no_list_of_other_modules(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_norms(config: Any, *_: Any) -> Any:
        model = empty_model(config)
        layers, model.model.layers = model.model.layers, nn.ModuleList(nn.LayerNorm(32) for _ in range(2))
        model.model.blocks = layers
        return model

    longcat = LongcatFlashConfig(hidden_size=32, ffn_hidden_size=48, num_layers=1, num_attention_heads=4)
    with pytest.raises(UserError, match="LongcatFlashForCausalLM has no list of 2 decoder blocks"):
        Skeleton(longcat)  # each block has two of each sublayer
    monkeypatch.setattr(blocks, "empty_model", with_norms)
    assert Skeleton(load_config(llama)).blocks_name == "model.blocks"


def test_a_head_that_is_called_decoder_does_not_hide_the_blocks() -> None:
    assert Skeleton(ModernBertDecoderConfig(**SMALL)).blocks_name == "model.layers"


def test_another_head_does_not_hide_the_blocks() -> None:
    config = BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB
    )
    config.is_decoder = True
    assert Skeleton(config).blocks_name == "bert.encoder.layer"


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


def test_modules_that_stay_in_float32_are_those_of_transformers(tmp_path: Path) -> None:
    """GPT-OSS keeps its norms in float32 if all else is float16, but not if it is bfloat16."""
    config = GptOssConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2, sliding_window=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for dtype, of_norms in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        own = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        stack = BlockStack(tmp_path, CPU, str(dtype).removeprefix("torch."))
        stack.load_embeddings()
        loaded = {name: parameter.dtype for name, parameter in stack.load_block(0).named_parameters()}
        assert loaded == {name: parameter.dtype for name, parameter in own.model.layers[0].named_parameters()}
        assert loaded["input_layernorm.weight"] == stack.base.norm.weight.dtype == of_norms
        assert loaded["self_attn.q_proj.weight"] == dtype


@pytest.mark.parametrize("in_place", [False, True])
def test_hidden_states_that_change_between_blocks_are_noticed(
    in_place: bool, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a model may do that adds something to them after some blocks."""
    stack = open_stack(llama)
    passed: list[int] = []
    own = LlamaModel.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        def between(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (args[0].add_(1) if in_place else args[0] + 1, *args[1:])

        handle = self.layers[1].register_forward_pre_hook(between, prepend=True)
        try:
            return own(self, *args, **kwargs)
        finally:
            handle.remove()

    monkeypatch.setattr(LlamaModel, "forward", forward)
    with pytest.raises(StageError, match=r"block 1 of LlamaForCausalLM is not given .* that block 0 returns"):
        stack.check_replay(ids(1), passed.append)
    assert passed == [0]


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
