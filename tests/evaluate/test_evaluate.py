"""Perplexity and divergence of checkpoints, and what is remembered of them."""

from __future__ import annotations

import gc
import json
import math
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaModel

from sppctl.config.load import load_config
from sppctl.data import texts
from sppctl.errors import StageError, UserError
from sppctl.evaluate import perplexities
from sppctl.evaluate import stage as evaluate
from sppctl.evaluate.results import TextMeasure
from sppctl.files import sealed
from sppctl.model import checkpoint
from sppctl.run import measure, pipeline
from sppctl.run.directory import Run
from sppctl.run.stages import PRUNE, TRAIN

CPU = torch.device("cpu")


@pytest.fixture
def work(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """work("key=value", ...) -> the run of the tiny configuration; other files are beside its directory."""
    monkeypatch.chdir(tmp_path)
    return lambda *overrides: Run(load_config(str(config_file), list(overrides)))


def changed(source: Path, out: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a checkpoint with other matrices."""
    shutil.copytree(source, out)
    weights = load_file(out / "model.safetensors")
    new = {name: change(weight) if weight.dim() > 1 else weight for name, weight in weights.items()}
    save_file(new, out / "model.safetensors", metadata={"format": "pt"})
    return out


# --- texts ------------------------------------------------------------------------------------------------------------


def test_a_text_that_changed_is_measured_again(work: Callable[..., Run], tmp_path: Path, text_file: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text(text_file.read_text())
    (before,) = pipeline.evaluate_some(work("eval.perplexity=[mine.txt]"), ["base"])["base"]["results"]
    mine.write_text(text_file.read_text()[::-1])
    (after,) = pipeline.evaluate_some(work("eval.perplexity=[mine.txt]"), ["base"])["base"]["results"]
    assert after["metrics"]["nll"] != before["metrics"]["nll"]
    assert after["settings"]["content"] == texts.file_hash("mine.txt") != before["settings"]["content"]


def test_a_text_without_a_file_is_known_by_what_it_says(
    work: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data set of the hub has a new revision."""
    run = work("eval.perplexity=[owner/name]")
    said = ["One " * 40, "Two " * 40]
    monkeypatch.setattr(texts, "load_text", lambda *_: texts.Text("owner/name", list(said)))
    (before,) = pipeline.evaluate_some(run, ["base"])["base"]["results"]
    assert pipeline.evaluate_some(run, ["base"])["base"]["results"] == [before]
    said[1] = "Too " * 40
    (after,) = pipeline.evaluate_some(run, ["base"])["base"]["results"]
    assert after["metrics"]["nll"] != before["metrics"]["nll"]


def test_of_some_texts_only_the_first_windows_count(
    work: Callable[..., Run], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = texts.Text("c4", ["a" * 90, "b" * 90], joiner=" ", windows=2)
    monkeypatch.setattr(texts, "load_text", lambda *_: text)
    config = work("eval.max_tokens=null").config
    windows = perplexities.windows_of(config, tokenizer, TextMeasure("c4", 64), CPU).tokens
    assert tokenizer.decode(windows.flatten()) == "a" * 90 + " " + "b" * 37
    assert len(perplexities.windows_of(config, tokenizer, TextMeasure("c4", 64, 32), CPU).tokens) == 3


def test_every_process_has_a_batch(
    work: Callable[..., Run], tokenizer: Any, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = work("eval.max_tokens=192").config  # three windows
    (measure,) = perplexities.wanted(config, 64, None, perplexities.contents(config))
    own = []
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        own.append(perplexities.windows_of(config, tokenizer, measure, CPU).own.tolist())
    assert own == [[0], [1], [2]]


@pytest.mark.parametrize(("stride", "fits"), [(64, True), (65, False)])
def test_a_stride_is_at_most_the_window(work: Callable[..., Run], stride: int, fits: bool) -> None:
    check = lambda run: pipeline.preflight(run, ("eval",))  # noqa: E731
    if fits:
        check(work(f"eval.stride={stride}"))
        return
    with pytest.raises(UserError, match=r"eval\.stride: 65 would skip tokens between windows of 64"):
        check(work(f"eval.stride={stride}"))


def test_the_default_window_bounds_the_stride(work: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "DEFAULT_WINDOW", 64)  # of 128 positions
    with pytest.raises(UserError, match=r"between windows of 64"):
        pipeline.preflight(work("eval.seq_len=null", "eval.stride=65"), ("eval",))


# --- the dense model --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_model_at_a_time(
    work: Callable[..., Run], alpaca_file: Path, text_file: Path, monkeypatch: Any, capfd: Any
) -> None:
    run = work(f"eval.perplexity=[{text_file}, {alpaca_file}]")
    run.do(PRUNE)
    loaded: list[tuple[str, Any]] = []
    load = checkpoint.load_model

    def watched(directory: Path, *args: Any, **options: Any) -> Any:
        gc.collect()
        assert not [name for name, model in loaded if model() is not None]
        model = load(directory, *args, **options)
        loaded.append((directory.name, weakref.ref(model)))
        return model

    monkeypatch.setattr(checkpoint, "load_model", watched)
    forwards = []
    forward = LlamaModel.forward

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        forwards.append(options["input_ids"].shape[1] == 64)
        return forward(self, *args, **options)

    monkeypatch.setattr(LlamaModel, "forward", counted)
    found = pipeline.evaluate_some(run, ["base", "pruned"])
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("dense model: ")]
    assert [line.partition(":")[2].partition(", ")[0] for line in told] == [
        f" text {text} of 2: {done}/8" for text in (1, 2) for done in (0, 8)
    ]
    assert sum(forwards) == 2 * 2 * 2  # two batches of two texts, once dense and once pruned
    assert [name for name, _ in loaded] == ["llama", "llama", "pruned"]  # predicts for both texts, is measured
    assert all(result["metrics"]["kl"] > 0 for result in found["pruned"]["results"])
    alone = pipeline.evaluate_some(Run(run.config, force=True), ["base"])["base"]["results"]
    assert [result["metrics"] for result in alone] == [result["metrics"] for result in found["base"]["results"]]
    assert not list(run.directory.glob(".reference*"))


def test_what_a_killed_process_kept_is_removed(work: Callable[..., Run]) -> None:
    run = work()
    run.do(PRUNE)
    for rank in range(2):
        (run.directory / f".reference-{rank}").mkdir()
    pipeline.evaluate_some(run, ["pruned"])
    assert not list(run.directory.glob(".reference*"))


def test_another_reference_takes_the_place_of_the_one_before(
    work: Callable[..., Run], llama: Path, tmp_path: Path
) -> None:
    work().do(PRUNE)
    changed(llama, tmp_path / "other", lambda weight: weight * 1.1)
    before = pipeline.evaluate_some(work(), ["pruned"])["pruned"]["results"]
    content = pipeline.evaluate_some(work("eval.divergence=other"), ["pruned"])["pruned"]
    (found,) = content["results"]
    assert (before[0]["metrics"]["compared_with"], found["metrics"]["compared_with"]) == (None, "other")
    assert before[0]["metrics"]["kl"] != found["metrics"]["kl"]
    # without a comparison nothing is missing, and nothing is lost
    assert pipeline.evaluate_some(work("eval.divergence=null"), ["pruned"])["pruned"] == content


def test_a_reference_with_another_vocabulary_is_refused_at_once(
    work: Callable[..., Run], llama: Path, tmp_path: Path
) -> None:
    shutil.copytree(llama, tmp_path / "other")
    config = json.loads((tmp_path / "other/config.json").read_text()) | {"vocab_size": 300}
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"eval\.divergence: other has a vocabulary of 300, this model of 260"):
        pipeline.preflight(work("eval.divergence=other"), ("eval",))
    with pytest.raises(UserError, match=r"^eval\.divergence: \./nowhere does not exist"):
        pipeline.preflight(work("eval.divergence=./nowhere"), ("eval",))


# --- numbers that are none --------------------------------------------------------------------------------------------


def test_a_model_without_finite_logits_fails(work: Callable[..., Run], llama: Path, tmp_path: Path) -> None:
    changed(llama, tmp_path / "broken", lambda weight: weight * math.nan)
    words = r"broken: logits are not finite in window 1 of 8 \(dtype float32\)"
    with pytest.raises(StageError, match=words):
        pipeline.evaluate_some(work(), ["broken"])
    assert not (tmp_path / "run/eval/broken.json").exists()


def test_an_infinite_perplexity_is_null(work: Callable[..., Run], llama: Path, tmp_path: Path) -> None:
    changed(llama, tmp_path / "hopeless", lambda weight: weight * 1e6)
    content = pipeline.evaluate_some(work(), ["hopeless"])["hopeless"]
    assert content["results"][0]["metrics"]["value"] is None
    assert content["results"][0]["metrics"]["nll"] > 700
    written = json.loads((tmp_path / "run/eval/hopeless.json").read_text(), parse_constant=pytest.fail)
    assert written == sealed.seal(content)


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(work: Callable[..., Run]) -> Run:
    """A run up to its adapter; where the current directory is, paths are relative."""
    run = work("run.dir=run", "train.max_steps=1")
    run.do(PRUNE)
    run.do(TRAIN)
    return run


def test_an_adapter_on_weights_it_was_not_trained_on(trained: Run, work: Callable[..., Run], tmp_path: Path) -> None:
    first = pipeline.evaluate_some(trained, ["adapter"])["adapter"]
    shutil.copytree("run", "copy")
    # beside the copy lie the right weights, whatever becomes of the original's
    again = Run(load_config("tiny.yaml", ["run.dir=run", "prune.pattern=4:8"]), force=True)
    again.do(PRUNE)
    moved = pipeline.evaluate_some(work("run.dir=copy", "eval.max_tokens=256"), ["adapter"])["adapter"]
    assert moved["fingerprint"] == first["fingerprint"]
    words = r"run/adapter was trained on other weights than .*pruned holds now; train again \(sppctl train --force\)"
    for model in ("adapter", "run/adapter"):
        with pytest.raises(UserError, match=words):
            pipeline.evaluate_some(trained, [model])


def test_an_adapter_anywhere(trained: Run, work: Callable[..., Run], tmp_path: Path) -> None:
    shutil.copytree("run/adapter", "mine")
    inside = pipeline.evaluate_some(trained, ["adapter"])["adapter"]
    elsewhere = pipeline.evaluate_some(work("run.dir=other", "eval.divergence=null"), ["mine"])["mine"]
    assert elsewhere["fingerprint"] == inside["fingerprint"]
    assert elsewhere["results"][0]["metrics"]["nll"] == inside["results"][0]["metrics"]["nll"]
    settings = json.loads(Path("mine/adapter_config.json").read_text()) | {"base_model_name_or_path": "./gone"}
    Path("mine/adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"mine/adapter_config.json is damaged"):
        pipeline.evaluate_some(work("run.dir=other"), ["mine"])
    Path("mine/stage.json").unlink()  # an adapter without a record may say what it likes
    with pytest.raises(UserError, match=r"mine adapts \./gone, which is not there"):
        pipeline.evaluate_some(work("run.dir=other"), ["mine"])


def test_an_adapter_whose_file_is_not_what_its_configuration_describes(
    trained: Run, work: Callable[..., Run], tmp_path: Path
) -> None:
    shutil.copytree("run/adapter", "mine")
    Path("mine/stage.json").unlink()
    run, own = work("run.dir=other", "eval.divergence=null"), load_file("mine/adapter_model.safetensors")
    settings = json.loads(Path("mine/adapter_config.json").read_text())
    first, *rest = sorted(own)

    def refused(words: str, tensors: dict[str, torch.Tensor] = own, **changed: Any) -> None:
        save_file(tensors, "mine/adapter_model.safetensors")
        Path("mine/adapter_config.json").write_text(json.dumps(settings | changed))
        with pytest.raises(UserError, match=words + r".*; download the adapter again, or correct its adapter_config"):
            pipeline.evaluate_some(run, ["mine"])
        assert not Path("other").exists()

    refused(rf"it holds no {first}\.default", {name: own[name] for name in rest})
    refused("it holds more, which is not part of it", own | {"more": torch.ones(2)})
    refused(r"it holds no .*lora_A\.default\.weight \(and \d+ more\)", peft_type="LORA")
    refused(r"it holds .*spp_alpha, which is not part of it \(and \d+ more\)", target_modules=["down_proj"])
    refused("mine cannot be attached to run/pruned: .*size mismatch", r=2)
    refused("mine cannot be attached to run/pruned: .*not supported between", scale="large")
    Path("mine/adapter_config.json").write_text(json.dumps(settings))
    Path("mine/adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"mine cannot be attached to run/pruned: .*header"):
        pipeline.evaluate_some(run, ["mine"])


def test_a_lora_that_began_with_the_base_weights(work: Callable[..., Run], llama: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config).save_pretrained("pissa")
    settings = json.loads(Path("pissa/adapter_config.json").read_text()) | {"base_model_name_or_path": str(llama)}
    Path("pissa/adapter_config.json").write_text(json.dumps(settings))
    assert pipeline.evaluate_some(work("eval.divergence=null"), ["pissa"])["pissa"]["results"]


def test_a_model_that_is_not_there_names_the_option(work: Callable[..., Run]) -> None:
    with pytest.raises(UserError, match=r"^--model: \./nowhere does not exist"):
        pipeline.evaluate_some(work(), ["./nowhere"])


# --- labels -----------------------------------------------------------------------------------------------------------


def labels(run: Run, *models: str) -> list[str]:
    return list(measure.checkpoints_to_measure(run, list(models)))


def test_every_checkpoint_has_a_name_of_its_own(
    work: Callable[..., Run], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("x/a/b", "x/a-b", "merged", "odd name", "odd+name"):
        shutil.copytree(llama, tmp_path / name)
    run = work()
    assert labels(run, "x/a/b", "x/a-b", "./x/a-b", "merged") == ["x--a--b", "x--a-b", f"{tmp_path.name}--merged"]
    first, second = labels(run, "odd name", "odd+name")
    assert first == "odd-name"
    assert second == f"odd-name-{checkpoint.fingerprint(tmp_path / 'odd+name')[:6]}"
    deep = tmp_path / "/".join(letter * 100 for letter in "xyé")
    shutil.copytree(llama, deep)
    (label,) = labels(run, str(deep.relative_to(tmp_path)))
    assert re.fullmatch(f"{'x' * 100}--{'y' * 89}-[0-9a-f]{{8}}", label)
    monkeypatch.chdir(tmp_path / "x/a/b")
    assert labels(run, ".") == ["a--b"]
    assert labels(run, "../b", "../../a-b")[1] == f"{tmp_path}/x/a-b".strip("/").replace("/", "--")


# --- large models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gpus", "free", "spread"), [(2, 1 << 30, False), (2, 10, True), (1, 10, False)])
def test_a_model_that_exceeds_a_gpu_lies_on_several(
    llama: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, free: int, spread: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 1 << 40))
    asked = {}

    def load(*_: Any, **options: Any) -> Any:
        asked.update(options)
        model = SimpleNamespace(config=SimpleNamespace(), eval=lambda: None, to=lambda _: model)
        return model, {"missing_keys": set(), "mismatched_keys": set()}

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    checkpoint.load_model(llama, torch.device("cuda", 0), "float32", spread=True)
    assert asked.get("device_map") == ("auto" if spread else None)
    checkpoint.load_model(llama, torch.device("cuda", 0), "float32")
    assert not checkpoint.exceeds(llama, CPU, "float32")
    monkeypatch.setenv("WORLD_SIZE", "2")
    if spread:
        with pytest.raises(UserError, match=r"launch\.num_processes=1 spreads it over all GPUs"):
            checkpoint.exceeds(llama, torch.device("cuda", 0), "float32")


def test_a_model_with_a_device_map_is_measured_like_any_other(
    work: Callable[..., Run], own_tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = work(f"eval.include_path={own_tasks}", "eval.tasks=[small_sums, said]", "eval.limit=2")
    run.do(PRUNE)
    plain = pipeline.evaluate_some(run, ["pruned"])["pruned"]
    load = checkpoint.load_model

    def mapped(directory: Path, *_: Any, **__: Any) -> Any:
        from accelerate import dispatch_model

        parts = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
        return dispatch_model(
            load(directory, CPU, "float32"), dict.fromkeys(parts, "cpu"), main_device="cpu", force_hooks=True
        )

    monkeypatch.setattr(checkpoint, "load_model", mapped)
    spread = pipeline.evaluate_some(Run(run.config, force=True), ["pruned"])["pruned"]
    assert [result["metrics"] for result in spread["results"]] == [result["metrics"] for result in plain["results"]]
    assert len(spread["results"]) == 3
