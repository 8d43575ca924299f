"""Tuning pruned blocks: zeros stay, the block's error falls, a tuning that does harm is undone."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stage_calls
import torch
from checkpoints import as_matrix, in_first_block, kept_per_group, random_windows, shards, stored, weights_of
from conftest import PROJECTIONS, Prune
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from sppctl.config.load import load_config
from sppctl.config.settings import Config
from sppctl.errors import UserError
from sppctl.records import Attempt
from sppctl.run.attempts import differences, settings_of

Make = Callable[..., Path]
EPOCHS, RATE = 3, 1e-3
RATES: dict[str, Callable[[float], float]] = {  # by the share of the steps that have been done
    "constant": lambda done: RATE,
    "linear": lambda done: RATE * (1 - done),
    "cosine": lambda done: RATE * (1 + math.cos(math.pi * done)) / 2,
}


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize(("method", "unit"), [("wanda", "block"), ("magnitude", "block"), ("wanda", "sublayer")])
def test_tuning_keeps_zeros_and_lowers_the_blocks_error(
    method: str, unit: str, family: str, prune: Prune, make_checkpoint: Make
) -> None:
    base = make_checkpoint(family)
    common = "prune.targets=all-linear", f"prune.method={method}", f"prune.reconstruct_unit={unit}"
    tuning = "prune.reconstruct_epochs=3", "prune.reconstruct_lr=1e-3", "prune.batch_size=2"
    _, plain, _ = prune(*common, base=base)
    _, tuned, record = prune(*common, *tuning, base=base)
    assert record.reconstruction is not None
    assert record.reconstruction.keys() == {0, 1}
    assert all(0 < errors.after < errors.before for errors in record.reconstruction.values())
    touched = {stored(layer.name, family) for layer in record.layers}
    for name in touched:
        assert (kept_per_group(as_matrix(tuned[name], family)) == 2).all(), name
        if in_first_block(name):
            assert torch.equal(tuned[name] != 0, plain[name] != 0)
    before = weights_of(base)
    assert all(torch.equal(tuned[name], before[name]) for name in before.keys() - touched)


class Literal:
    """Blocks tuned one after the other by a plain loop over two whole models, without any of the walk."""

    def __init__(self, base: Path, windows: Tensor) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(base).eval().requires_grad_(False)
        self.calls: list[dict[str, Any]] = []
        inputs: list[Tensor] = []

        def look(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            inputs.append(args[0])
            self.calls.append(kwargs)

        hooks = [block.register_forward_pre_hook(look, with_kwargs=True) for block in self.model.model.layers]
        self.model(windows[:1], use_cache=False)
        for hook in hooks:
            hook.remove()
        self.hidden = list(self.model.model.embed_tokens(windows).split(1))
        self.dense = list(self.hidden)

    def run(self, index: int, hidden: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
        output: Tensor = functional_call(self.model.model.layers[index], weights or {}, (hidden,), self.calls[index])
        return output

    def attend(self, index: int, hidden: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
        """The hidden states after attention."""
        block = self.model.model.layers[index]
        own = {name.removeprefix("self_attn."): weight for name, weight in (weights or {}).items() if "attn" in name}
        output = functional_call(block.self_attn, own, (block.input_layernorm(hidden),), self.calls[index])
        attention: Tensor = hidden + output[0]
        return attention

    def tune_block(self, index: int, masks: dict[str, Tensor], target: str, unit: str, *how: Any) -> dict[str, Tensor]:
        """The block's tuned weights; hidden states go on to the next block."""
        inputs = self.dense if target == "dense" else self.hidden
        goals = {call: [call(index, rows) for rows in inputs] for call in (self.attend, self.run)}
        self.dense = [self.run(index, rows) for rows in self.dense]
        block = self.model.model.layers[index]
        weights = {name: block.get_parameter(name) * mask for name, mask in masks.items()}
        parts = {self.run: list(weights)}
        if unit == "sublayer":
            parts = {self.attend: [name for name in weights if "attn" in name]}
            parts[self.run] = [name for name in weights if "mlp" in name]
        for call, names in parts.items():
            own = {name: masks[name] for name in names}
            weights |= self.tune(index, call, goals[call], weights, own, *how)
        self.hidden = [self.run(index, rows, weights) for rows in self.hidden]
        return weights

    def tune(
        self,
        index: int,
        call: Callable[..., Tensor],
        goals: list[Tensor],
        others: dict[str, Tensor],
        masks: dict[str, Tensor],
        scheduler: str,
        size: int,
        kind: str,
    ) -> dict[str, Tensor]:
        weights = {name: others[name] for name in masks}
        moments = {name: (torch.zeros_like(weight), torch.zeros_like(weight)) for name, weight in weights.items()}
        an_epoch = math.ceil(len(goals) / size)
        steps = EPOCHS * an_epoch
        for step in range(steps):
            rows = slice(step % an_epoch * size, (step % an_epoch + 1) * size)
            for weight in weights.values():
                weight.requires_grad_()
            output = torch.cat([call(index, window, others | weights) for window in self.hidden[rows]])
            goal = torch.cat(goals[rows])
            loss = (output - goal).square().mean() / goal.square().mean()
            if kind == "token":
                loss = ((output - goal).norm(dim=-1) / goal.norm(dim=-1)).square().mean()
            gradients = torch.autograd.grad(loss, list(weights.values()))
            for (name, weight), gradient in zip(list(weights.items()), gradients, strict=True):
                first, second = moments[name]
                first.mul_(0.9).add_(gradient * masks[name], alpha=0.1)
                second.mul_(0.999).add_((gradient * masks[name]).square(), alpha=0.001)
                change = first / (1 - 0.9 ** (step + 1)) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
                weights[name] = weight.detach() - RATES[scheduler](step / steps) * change
        return weights


@pytest.mark.parametrize(
    ("target", "unit", "scheduler", "size", "kind"),
    [
        ("pruned", "block", "constant", 1, "mse"),
        ("pruned", "block", "constant", 2, "token"),
        ("pruned", "block", "constant", 4, "mse"),  # a micro-batch of 3 and one of 1, and a last step of 2
        ("pruned", "block", "cosine", 4, "token"),
        ("dense", "block", "linear", 2, "mse"),
        ("pruned", "sublayer", "constant", 4, "mse"),
        ("dense", "sublayer", "linear", 8, "token"),  # more than there are
    ],
)
def test_tuning_equals_a_literal_loop(
    target: str, unit: str, scheduler: str, size: int, kind: str, prune: Prune, llama: Path
) -> None:
    windows = random_windows(6, 24)
    tuning = {"epochs": EPOCHS, "lr": RATE, "target": target, "unit": unit, "scheduler": scheduler}
    tuning |= {"batch_size": size, "loss": kind}
    options = [f"prune.reconstruct_{key}={value}" for key, value in tuning.items()]
    _, tuned, record = prune(*options, "prune.batch_size=3", windows=windows)
    assert record.reconstruction is not None
    assert all(errors.after < errors.before for errors in record.reconstruction.values())
    literal = Literal(llama, windows)
    for index in range(2):
        prefix = f"model.layers.{index}."
        found = {name.removeprefix(prefix): weight for name, weight in tuned.items() if name.startswith(prefix)}
        masks = {name: weight != 0 for name, weight in found.items() if name.split(".")[-2] in PROJECTIONS}
        expected = literal.tune_block(index, masks, target, unit, scheduler, size, kind)
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("targets", [["q_proj", "o_proj"], ["down_proj"]], ids=str)
def test_one_sublayer_alone_is_tuned_if_the_other_is_dense(targets: list[str], prune: Prune, llama: Path) -> None:
    options = "prune.reconstruct_epochs=3", "prune.reconstruct_lr=1e-3", f"prune.targets={targets}"
    _, tuned, record = prune(*options, "prune.reconstruct_unit=sublayer")
    assert record.reconstruction is not None
    assert all(errors.after < errors.before for errors in record.reconstruction.values())
    before = weights_of(llama)
    changed = {name.split(".")[-2] for name in before if not torch.equal(tuned[name], before[name])}
    assert changed == set(targets)


def test_blocks_whose_attention_and_mlp_run_in_parallel_are_not_tuned_apart(
    prune: Prune, make_checkpoint: Make, tmp_path: Path
) -> None:
    options = "prune.targets=all-linear", "prune.reconstruct_epochs=1", "prune.reconstruct_unit=sublayer"
    with pytest.raises(UserError, match=r"prune\.reconstruct_unit: in block 0 of GPTNeoXForCausalLM, no MLP follows"):
        prune(*options, base=make_checkpoint("gpt_neox"), out=tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    prune(*options[:2], base=make_checkpoint("gpt_neox"))


@pytest.mark.parametrize(("memory", "unit"), [("ram", "block"), ("disk", "block"), ("disk", "sublayer")])
def test_a_resumed_tuning_on_the_dense_model_gives_the_same_bytes(
    memory: str, unit: str, prune: Prune, interrupt: Callable[..., Path], deep: Path
) -> None:
    """Block 1 has no targets, so the dense model's hidden states pass through it as well."""
    options = ["prune.reconstruct_epochs=1", f"prune.reconstruct_unit={unit}", "prune.skip=['*.1.*']"]
    dense = "prune.reconstruct_target=dense"
    out = interrupt(*options, dense, f"prune.memory={memory}", base=deep, blocks=3)
    resumed = prune(*options, dense, f"prune.memory={memory}", base=deep, out=out)
    whole, other = prune(*options, dense, base=deep), prune(*options, base=deep)
    assert resumed.record.reconstruction == whole.record.reconstruction
    assert shards(out) == shards(whole.directory) != shards(other.directory)


@pytest.mark.parametrize("options", [["prune.skip=['*.experts.0.*']"], ["prune.targets=[gate_proj, down_proj]"]])
def test_matrices_of_a_mixture_that_are_not_targets_are_not_tuned(
    options: list[str], prune: Prune, interrupt: Callable[..., Path], make_checkpoint: Make
) -> None:
    base = make_checkpoint("mixtral")
    options = ["prune.targets=all-linear", "prune.reconstruct_epochs=3", "prune.reconstruct_lr=1e-3", *options]
    directory, tuned, record = prune(*options, base=base)
    assert record.reconstruction is not None
    assert all(errors.after < errors.before for errors in record.reconstruction.values())
    touched = {stored(layer.name, "mixtral") for layer in record.layers}
    before = weights_of(base)
    assert {name for name in before if not torch.equal(tuned[name], before[name])} == touched
    out = interrupt(*options, base=base, blocks=1)
    prune(*options, base=base, out=out)
    assert shards(out) == shards(directory)


@pytest.mark.parametrize(
    ("dtype", "target", "unit"),
    [
        (torch.float32, "pruned", "block"),
        (torch.bfloat16, "pruned", "block"),
        (torch.float32, "dense", "block"),
        (torch.float32, "dense", "sublayer"),
    ],
    ids=str,
)
def test_a_tuning_that_does_harm_is_undone(
    dtype: torch.dtype, target: str, unit: str, prune: Prune, make_checkpoint: Make
) -> None:
    base = make_checkpoint("llama", dtype=dtype)
    plain = prune(base=base)
    options = "prune.reconstruct_epochs=1", "prune.reconstruct_lr=100", f"prune.reconstruct_target={target}"
    tuned = prune(*options, f"prune.reconstruct_unit={unit}", base=base)
    assert tuned.record.reconstruction is not None
    assert all(errors.after == errors.before for errors in tuned.record.reconstruction.values())
    assert shards(plain.directory) == shards(tuned.directory)


def test_gradients_too_small_for_float16_tune(
    configure: Callable[..., Config], make_checkpoint: Make, tmp_path: Path
) -> None:
    base = shutil.copytree(make_checkpoint("llama", dtype=torch.float16), tmp_path / "base")
    weights = weights_of(base)
    weights["model.embed_tokens.weight"] *= 400  # hidden states as large as those of large models
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    config = configure("prune.reconstruct_epochs=3", "prune.reconstruct_lr=1e-3", "prune.reconstruct_batch_size=16")
    full, half = (
        stage_calls.prune(config, base, tmp_path / dtype, dtype=dtype, windows=random_windows(16, 256)).reconstruction
        for dtype in ("float32", "float16")
    )
    assert full is not None
    assert half is not None
    gains = [[(errors.before - errors.after) / errors.before for errors in one.values()] for one in (full, half)]
    assert gains[1] == pytest.approx(gains[0], rel=0.5)


def test_the_records_are_those_of_the_tuned_weights(prune: Prune, llama: Path) -> None:
    _, untuned, _ = prune()
    _, tuned, record = prune("prune.reconstruct_epochs=8", "prune.reconstruct_lr=1e-3")
    before, changed = weights_of(llama), 0
    for layer in record.layers:
        name = f"{layer.name}.weight"
        error, without = (((one[name] - before[name]).norm() / before[name].norm()).item() for one in (tuned, untuned))
        assert layer.relative_weight_error == pytest.approx(error, rel=1e-3)
        changed += abs(error - without) > 0.01 * without
        assert layer.relative_output_error is not None
        assert layer.relative_output_error > 0
    assert changed >= 7


def test_a_tuning_that_rounding_to_the_files_dtype_undoes_lowers_no_error(prune: Prune, make_checkpoint: Make) -> None:
    base = make_checkpoint("llama", torch.bfloat16)
    common = ["model.compute_dtype=float32", "prune.reconstruct_epochs=2"]
    _, untuned, _ = prune(*common[:1], base=base)
    _, tuned, record = prune(*common, "prune.reconstruct_lr=1e-9", base=base)
    assert all(torch.equal(tuned[name], weight) for name, weight in untuned.items())
    assert record.reconstruction
    assert all(errors.before == errors.after for errors in record.reconstruction.values())


def test_the_error_is_the_distance_to_the_dense_model(prune: Prune, llama: Path) -> None:
    """The second block's error before its tuning counts what the first one has left."""
    windows, options = random_windows(4, 24), ("prune.reconstruct_epochs=1", "prune.batch_size=2")
    records = [
        prune(*options, f"prune.reconstruct_target={name}", windows=windows).record for name in ("pruned", "dense")
    ]
    pruned, dense = (record.reconstruction for record in records)
    assert pruned is not None
    assert dense is not None
    assert pruned[0] == dense[0]
    assert dense[1].before > pruned[1].before


def test_stages_of_earlier_versions_are_up_to_date(write_config: Callable[..., Path], tmp_path: Path) -> None:
    """Their records have no such keys."""
    path = write_config(tmp_path / "tiny.yaml")
    settings = settings_of(load_config(str(path)), "prune")
    assert not {"reconstruct_target", "reconstruct_scheduler", "reconstruct_unit"} & settings["prune"].keys()
    assert "reconstruct_lr" in settings["prune"]
    before = Attempt(settings, {})
    changed = settings_of(load_config(str(path), ["prune.reconstruct_target=dense"]), "prune")
    assert differences(before, changed) == "prune.reconstruct_target = pruned, now dense"
    assert differences(Attempt(changed, {}), settings) == "prune.reconstruct_target = dense, now pruned"
