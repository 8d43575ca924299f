"""Which matrices there are, what a configuration means by a name, and where models and checkpoints keep them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, GROUPED
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AfmoeConfig,
    AutoModelForCausalLM,
    Ernie4_5_MoeConfig,
    Gemma3Config,
    GraniteMoeConfig,
    HunYuanMoEV1Config,
)
from transformers.pytorch_utils import Conv1D

from sppctl.errors import UserError
from sppctl.files.safe_files import OwnFiles, TensorFiles
from sppctl.model.blocks import BlockStack, Skeleton
from sppctl.model.targets import (
    Part,
    Target,
    find_targets,
    gated,
    is_fused_experts,
    matches,
    select,
    stored_name,
    stored_parts,
    tensor_names,
    unsupported_experts,
)

CPU = torch.device("cpu")
GATED = "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"
KINDS = {  # matrices in a block, and what they are called
    "llama": (7, GATED),
    "qwen3": (7, GATED),
    "gemma2": (7, GATED),
    "opt": (6, "fc1 fc2 k_proj out_proj q_proj v_proj"),
    "gpt_neox": (4, "dense dense_4h_to_h dense_h_to_4h query_key_value"),
    "phi3": (4, "down_proj gate_up_proj o_proj qkv_proj"),
    "gpt2": (4, "c_attn c_fc c_proj"),
    "mixtral": (4 + 4 * 3, GATED),
    "qwen3_moe": (4 + 4 * 3, GATED),
    "hunyuan_v1_moe": (4 + 3 + 4 * 3, GATED),  # a shared expert too
    "afmoe": (5 + 3 + 4 * 3, GATED),
}
ROUTED = GROUPED | {"num_experts": 4, "moe_intermediate_size": 16}
MIXTURES = {  # whose routers are linear layers
    "hunyuan_v1_moe": lambda: HunYuanMoEV1Config(**ROUTED, moe_topk=2),
    "afmoe": lambda: AfmoeConfig(
        **ROUTED, num_experts_per_tok=2, num_dense_layers=0, layer_types=["full_attention"] * 2
    ),
}
WITHOUT_HEAD_DIM = {key: value for key, value in GROUPED.items() if key != "head_dim"}
RENAMED = {  # whose checkpoints have other names than the models: of routers, of buffers, of everything
    "granitemoe": lambda: GraniteMoeConfig(**WITHOUT_HEAD_DIM, num_local_experts=4, num_experts_per_tok=2),
    "ernie4_5_moe": lambda: Ernie4_5_MoeConfig(
        **GROUPED, moe_num_experts=4, moe_k=2, moe_intermediate_size=16, moe_layer_start_index=1
    ),
    "gemma3": lambda: Gemma3Config(
        text_config=GROUPED | {"sliding_window": 16},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        image_token_index=3,
    ),
}


class Experts(nn.Module):
    """Three experts, as transformers fuses them."""

    def __init__(self, hidden: int = 6, intermediate: int = 4) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.arange(3 * 2 * intermediate * hidden).view(3, -1, hidden).float())
        self.down_proj = nn.Parameter(torch.arange(3 * hidden * intermediate).view(3, hidden, -1).float())
        self.act_fn = nn.SiLU()


def block() -> nn.Module:
    made = nn.Module()
    made.norm = nn.LayerNorm(6)
    made.lin = nn.Linear(6, 4)
    made.conv = Conv1D(8, 6)
    made.experts = Experts()
    return made


@pytest.fixture
def model() -> nn.Module:
    made = nn.Module()
    made.h = nn.ModuleList([block(), block()])
    return made


@pytest.fixture
def found(model: nn.Module) -> dict[str, Target]:
    return find_targets(model.h, "h")


def files_with(directory: Path, *names: str) -> TensorFiles:
    directory.mkdir(exist_ok=True)
    save_file({name: torch.zeros(1) for name in names}, directory / "model.safetensors")
    return TensorFiles(directory)


@pytest.mark.parametrize(
    "change",
    [
        lambda experts: delattr(experts, "down_proj"),
        lambda experts: setattr(experts, "down_proj", nn.Parameter(torch.zeros(6, 4))),
        lambda experts: delattr(experts, "act_fn"),
        lambda experts: setattr(experts, "gate_up_proj", nn.Parameter(experts.gate_up_proj.data.transpose(1, 2))),
        lambda experts: setattr(experts, "gate_up_proj_bias", nn.Parameter(torch.zeros(3, 8))),
        lambda experts: setattr(experts, "is_concatenated", False),
    ],
    ids=["no down", "flat", "no activation", "transposed", "biased", "alternating gate and up"],
)
def test_other_modules_are_no_experts(change: Callable[[nn.Module], None]) -> None:
    experts = Experts()
    assert is_fused_experts(experts)
    change(experts)
    assert not is_fused_experts(experts)


def test_the_gate_is_the_models_own() -> None:
    inputs = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    experts = Experts()
    assert torch.equal(gated(experts, inputs), nn.functional.silu(inputs[:, :4]) * inputs[:, 4:])
    experts._apply_gate = lambda product: product[:, :4] * 3
    assert torch.equal(gated(experts, inputs), inputs[:, :4] * 3)


def test_experts_of_another_form_are_told_of(model: nn.Module) -> None:
    assert unsupported_experts(model.h, "h") == ([], 0)
    model.h[1].convolution = nn.Conv1d(6, 6, 4, groups=6)
    assert unsupported_experts(model.h, "h") == ([], 0)
    model.h[1].experts.is_concatenated = False
    names, share = unsupported_experts(model.h, "h")
    assert names == ["h.1.experts.gate_up_proj", "h.1.experts.down_proj"]
    assert share == 216 / (2 * (24 + 48 + 216))  # of lin, conv and experts, twice


def test_experts_of_two_dimensions_are_told_of_too(model: nn.Module) -> None:
    """As DBRX stores them, all in one matrix; its biases and routers are none."""
    made = nn.Module()
    made.w1, made.w1_bias = nn.Parameter(torch.zeros(3 * 4, 6)), nn.Parameter(torch.zeros(3, 4))
    made.router, made.single = nn.Linear(6, 3), nn.Linear(6, 4)  # the latter is one that can be pruned
    model.h[0].experts = made
    names, share = unsupported_experts(model.h, "h")
    assert names == ["h.0.experts.w1"]
    assert share == 72 / (2 * (24 + 48) + 216 + 72 + 12 + 18 + 24)


@pytest.mark.parametrize(
    ("path", "is_router"),
    [
        ("mlp.router", True),
        ("mlp.router.gate", True),
        ("mlp.gate.wg", True),
        ("mlp.gate", True),
        ("gate", False),  # of a dense block
        ("mlp.gate_proj", False),
        ("mlp.shared_expert_gate", False),
    ],
)
def test_linear_layers_of_routers_are_no_targets(path: str, is_router: bool, model: nn.Module) -> None:
    model.h[0].mlp = nn.Module()
    model.h[0].mlp.experts = model.h[0].experts
    del model.h[0].experts
    owner, (*above, leaf) = model.h[0], path.split(".")
    for part in above:
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    owner.add_module(leaf, nn.Linear(6, 3))
    assert (f"h.0.{path}" not in find_targets(model.h, "h")) == is_router
    assert "h.0.mlp.experts.2.up_proj" in find_targets(model.h, "h")


def test_every_form_is_found_in_the_models_order(found: dict[str, Target]) -> None:
    experts = [f"experts.{expert}.{part}" for expert in range(3) for part in ("gate_proj", "up_proj", "down_proj")]
    assert list(found) == [f"h.{index}.{name}" for index in (0, 1) for name in ("lin", "conv", *experts)]
    assert all(target.name == name for name, target in found.items())
    assert {name for name, target in found.items() if target.is_linear} == {"h.0.lin", "h.1.lin"}


def test_what_is_known_of_each_form(found: dict[str, Target]) -> None:
    assert found["h.0.lin"] == Target("h.0.lin", "h.0.lin", "weight", 4, 6)
    assert found["h.0.conv"] == Target("h.0.conv", "h.0.conv", "weight", 8, 6, transposed=True)
    owner, parts = "h.1.experts", ("gate_proj", "up_proj", "down_proj")
    gate, up, down = (found[f"{owner}.2.{part}"] for part in parts)
    assert gate == Target(f"{owner}.2.gate_proj", owner, "gate_up_proj", 4, 6, expert=2)
    assert up == Target(f"{owner}.2.up_proj", owner, "gate_up_proj", 4, 6, expert=2, first_row=4)
    assert down == Target(f"{owner}.2.down_proj", owner, "down_proj", 6, 4, expert=2)


@pytest.mark.parametrize("family", KINDS)
def test_all_linear_means_the_matrices_of_the_blocks(family: str) -> None:
    """Not the output head, and no routers: in two blocks each."""
    count, kinds = KINDS[family]
    skeleton = Skeleton((FAMILIES | MIXTURES)[family]())
    targets = skeleton.targets("all-linear")
    assert sorted({name.rpartition(".")[2] for name in targets}) == kinds.split()
    assert len(targets) == 2 * count
    assert all(name.startswith(f"{skeleton.blocks_name}.") for name in targets)


def test_a_view_is_out_by_in_and_writes_into_the_model(model: nn.Module, found: dict[str, Target]) -> None:
    for target in found.values():
        view = target.view(model)
        assert view.shape == (target.out_features, target.in_features)
        view.fill_(7)
    for module in model.h:
        for parameter in (module.lin.weight, module.conv.weight, module.experts.gate_up_proj, module.experts.down_proj):
            assert (parameter == 7).all()


def test_a_view_is_that_part_of_the_parameter(model: nn.Module, found: dict[str, Target]) -> None:
    inputs, conv, experts = torch.randn(5, 6), model.h[0].conv, model.h[0].experts
    torch.testing.assert_close(conv(inputs), inputs @ found["h.0.conv"].view(model).t() + conv.bias)
    gate, up = experts.gate_up_proj[1].chunk(2)
    assert torch.equal(found["h.0.experts.1.gate_proj"].view(model), gate)
    assert torch.equal(found["h.0.experts.1.up_proj"].view(model), up)
    assert torch.equal(found["h.0.experts.1.down_proj"].view(model), experts.down_proj[1])


# --- names in a configuration -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "meant"),
    [
        ("q_proj", True),
        ("self_attn.q_proj", True),
        ("model.layers.0.self_attn.q_proj", True),
        ("*.0.*", True),
        ("*q_proj", True),
        ("model.layers.[0-3].*", True),
        ("proj", False),  # a whole part of a name
        ("attn.q_proj", False),
        ("*.1.*", False),
        ("q_proj*x", False),
        ("layers.0.*", False),
    ],
)
def test_ends_of_names_and_patterns(wanted: str, meant: bool) -> None:
    assert matches("model.layers.0.self_attn.q_proj", wanted) == meant


@pytest.mark.parametrize(
    ("names", "skip", "chosen"),
    [
        (["1.up_proj"], [], ["h.0.experts.1.up_proj", "h.1.experts.1.up_proj"]),  # an expert is called like a layer
        ("all-linear", ["*.experts.*", "h.0.*"], ["h.1.lin", "h.1.conv"]),
        (["conv", "lin"], ["h.1.*"], ["h.0.lin", "h.0.conv"]),  # in the model's order
        (["h.1.conv", "*.conv", "conv"], [], ["h.0.conv", "h.1.conv"]),
    ],
)
def test_what_is_chosen(names: list[str] | str, skip: list[str], chosen: list[str], found: dict[str, Target]) -> None:
    assert list(select(found, names, skip, "t")) == chosen
    assert select(found, "all-linear", [], "t") == found


def test_a_choice_that_matches_nothing(found: dict[str, Target]) -> None:
    kinds = "conv, down_proj, gate_proj, lin, up_proj"
    with pytest.raises(UserError) as caught:
        select(found, ["lin", "fc1"], [], "train.targets")
    assert str(caught.value) == (
        f"train.targets: 'fc1' matches no linear layer; this model has {kinds} (or all-linear)"
    )
    with pytest.raises(UserError, match=r"^prune\.skip: 'fc1' matches no linear layer"):
        select(found, "all-linear", ["fc1"], "prune.targets")
    with pytest.raises(UserError, match=r"^prune\.targets: nothing is left to prune"):
        select(found, ["lin"], ["lin"], "prune.targets")


# --- names in checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "stored"),
    [
        ("model.layers.0.q.weight", "model.layers.0.q.weight"),
        ("model.layers.0.q.weight", "layers.0.q.weight"),
        ("layers.0.q.weight", "model.layers.0.q.weight"),
        ("model.layers.0.mlp.gate.weight", "model.layers.0.block_sparse_moe.gate.weight"),
        ("model.layers.0.mlp.gate.weight", "layers.0.block_sparse_moe.gate.weight"),
    ],
)
def test_spellings_of_a_name(asked: str, stored: str, tmp_path: Path) -> None:
    assert stored_name(files_with(tmp_path, stored, "other"), asked, "model") == stored
    assert stored_name(files_with(tmp_path, stored, asked), asked, "model") == asked  # the model's own comes first
    with pytest.raises(UserError, match=r"holds no tensor model\.layers\.1\.w, which its config\.json implies"):
        stored_name(files_with(tmp_path, stored), "model.layers.1.w", "model")


EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture
def mixture() -> nn.Module:
    """A model of one block with three experts, of 4 x 6 and 6 x 4."""
    made: nn.Module = Experts()
    for name in ("experts", "mlp", "0", "layers", "model"):
        inner, made = made, nn.Module()
        made.add_module(name, inner)
    made.base_model_prefix = "model"
    return made


@pytest.mark.parametrize(
    ("path", "gate", "up", "down"),
    [
        (EXPERTS, "gate_proj", "up_proj", "down_proj"),
        (EXPERTS.removeprefix("model."), "gate_proj", "up_proj", "down_proj"),
        (EXPERTS.replace("mlp", "block_sparse_moe"), "w1", "w3", "w2"),
    ],
)
def test_parts_of_fused_experts(path: str, gate: str, up: str, down: str, mixture: nn.Module, tmp_path: Path) -> None:
    names = [f"{path}.{expert}.{part}.weight" for expert in range(3) for part in (gate, up, down)]
    files = files_with(tmp_path, *names)
    assert stored_parts(files, mixture, f"{EXPERTS}.gate_up_proj") == [
        Part(f"{path}.{expert}.{part}.weight", expert, row, 4)
        for expert in range(3)
        for part, row in ((gate, 0), (up, 4))
    ]
    assert stored_parts(files, mixture, f"{EXPERTS}.down_proj") == [
        Part(f"{path}.{expert}.{down}.weight", expert, 0, 6) for expert in range(3)
    ]


def test_a_parameter_that_is_stored_as_it_is(mixture: nn.Module, tmp_path: Path) -> None:
    """Fused experts, or a linear layer that is called as they are."""
    mixture.mlp = nn.Module()
    mixture.mlp.gate_up_proj = nn.Linear(6, 8)
    for name in (f"{EXPERTS}.gate_up_proj", "mlp.gate_up_proj.weight"):
        assert stored_parts(files_with(tmp_path, name), mixture, name) == [Part(name)]


def test_an_expert_that_is_missing(mixture: nn.Module, tmp_path: Path) -> None:
    files = files_with(tmp_path, f"{EXPERTS}.0.down_proj.weight", f"{EXPERTS}.2.down_proj.weight")
    with pytest.raises(UserError, match=rf"holds no tensor {EXPERTS}\.1\.down_proj\.weight"):
        stored_parts(files, mixture, f"{EXPERTS}.down_proj")


def test_the_tensor_that_holds_each_target(mixture: nn.Module, tmp_path: Path) -> None:
    mixture.get_submodule("model.layers.0.mlp").up = nn.Linear(6, 8)
    targets = find_targets(mixture.get_submodule("model.layers"), "model.layers").values()
    assert len(targets) == 3 * 3 + 1
    one = [f"{EXPERTS}.{expert}.{part}_proj" for expert in range(3) for part in ("gate", "up")]
    stored = [
        f"{EXPERTS}.{expert}.{part}.weight".replace("mlp", "block_sparse_moe")
        for expert in range(3)
        for part in ("w1", "w3")
    ]
    files = files_with(tmp_path, *stored, f"{EXPERTS}.down_proj", "layers.0.mlp.up.weight")
    expected = dict(zip(one, stored, strict=True))
    expected |= {f"{EXPERTS}.{expert}.down_proj": f"{EXPERTS}.down_proj" for expert in range(3)}  # fused
    assert tensor_names(files, mixture, targets) == expected | {"model.layers.0.mlp.up": "layers.0.mlp.up.weight"}
    files = files_with(tmp_path, *stored)
    assert tensor_names(files, mixture, targets) == dict(zip(one, stored, strict=True)), "the others are not there"


def test_the_place_of_a_part() -> None:
    parameter = torch.arange(2 * 4 * 3).view(2, 4, 3)
    assert torch.equal(Part("w", 1, 2, 2).of(parameter), parameter[1, 2:4])
    assert Part("w").of(parameter) is parameter


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen3_moe", "gpt_neox"])
def test_a_matrix_from_files_is_what_the_model_holds(
    family: str, fused: bool, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    directory = make_checkpoint(family)
    stack, model = BlockStack(directory, CPU, "float32"), AutoModelForCausalLM.from_pretrained(directory)
    files = stack.files
    if fused:  # as the model names and holds them
        save_file({name: p.data.contiguous() for name, p in model.named_parameters()}, tmp_path / "model.safetensors")
        files = TensorFiles(tmp_path)
    for target in stack.targets("all-linear").values():
        assert torch.equal(stack.matrix(target, files), target.view(model)), target.name


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen3_moe"])
def test_what_is_written_is_read_again(family: str, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = make_checkpoint(family)
    before = load_file(source / "model.safetensors")
    save_file(before, tmp_path / "model.safetensors", {"format": "pt"})
    stack, copy = BlockStack(source, CPU, "float32"), OwnFiles(tmp_path)
    targets = {name: target for name, target in stack.targets("all-linear").items() if ".1." in name}
    written: dict[str, Tensor] = {}
    stack.load_block(1)
    stack.load_block(0)
    for name, target in targets.items():
        view = target.view(stack.model)
        written[name] = torch.randn_like(view)
        view.copy_(written[name])
    for target in targets.values():
        stack.write(target, copy)
    for name, target in targets.items():
        assert torch.equal(stack.matrix(target, copy), written[name]), name
        assert stack.homes(target) == {"model.safetensors"}
    after = load_file(tmp_path / "model.safetensors")
    assert sum(not torch.equal(after[name], before[name]) for name in before) == len(targets)


@pytest.mark.parametrize("family", RENAMED)
def test_tensors_that_transformers_renames_are_found(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(RENAMED[family]()).save_pretrained(tmp_path)
    own = AutoModelForCausalLM.from_pretrained(tmp_path)
    stack = BlockStack(tmp_path, CPU, "float32")
    assert not own.state_dict().keys() <= set(stack.files)
    stack.load_embeddings()
    for index in range(len(stack)):
        stack.load_block(index)
    loaded = stack.base.state_dict()
    different = [name for name, tensor in own.model.state_dict().items() if not torch.equal(tensor, loaded[name])]
    assert different == []
    for name, target in stack.targets("all-linear").items():
        assert torch.equal(stack.matrix(target, stack.files), target.view(own)), name
        if target.is_linear:  # for those who have no model at hand
            stored = stored_name(TensorFiles(tmp_path), f"{name}.weight", stack.base_prefix)
            assert torch.equal(stack.files.read(stored), target.view(own)), name
