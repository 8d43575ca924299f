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
from sppctl.evaluate import perplexities, perplexity
from sppctl.evaluate.results import Results, TextMeasure, TextNumbers
from sppctl.evaluate.subjects import shortage
from sppctl.model import checkpoint
from sppctl.run import measure as measuring
from sppctl.run import pipeline
from sppctl.run.directory import Run
from sppctl.run.stages import PRUNE, TRAIN

CPU = torch.device("cpu")
Work = Callable[..., Run]


@pytest.fixture
def work(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    """work("key=value", ...) -> the run of the tiny configuration; other files are beside its directory."""
    monkeypatch.chdir(tmp_path)
    return lambda *overrides, force=False: Run(load_config(str(config_file), list(overrides)), force=force)


def measure(run: Run, model: str) -> Results:
    """What is recorded of a checkpoint after measuring it."""
    (content,) = pipeline.evaluate_some(run, [model]).values()
    return Results.from_json(content)


def numbers(run: Run, model: str) -> TextNumbers:
    """Of the only text that is recorded."""
    (result,) = measure(run, model).texts
    return result.numbers


def changed(source: Path, out: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a checkpoint with other matrices."""
    shutil.copytree(source, out)
    weights = load_file(out / "model.safetensors")
    new = {name: change(weight) if weight.dim() > 1 else weight for name, weight in weights.items()}
    save_file(new, out / "model.safetensors", metadata={"format": "pt"})
    return out


# --- texts ------------------------------------------------------------------------------------------------------------


def test_a_text_that_changed_is_measured_again(work: Work, tmp_path: Path, text_file: Path) -> None:
    run = work("eval.perplexity=[mine.txt]")
    found = []
    for content in (text_file.read_text(), text_file.read_text()[::-1]):
        (tmp_path / "mine.txt").write_text(content)
        (result,) = measure(run, "base").texts
        assert result.measure.content == texts.file_hash("mine.txt")
        found.append(result)
    assert found[0].measure.content != found[1].measure.content
    assert found[0].numbers.nll != found[1].numbers.nll


def test_a_text_without_a_file_is_identified_by_its_content(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set of the hub has a new revision."""
    run = work("eval.perplexity=[owner/name]")
    documents = ["One " * 40, "Two " * 40]
    monkeypatch.setattr(texts, "load_text", lambda *_: texts.Text("owner/name", list(documents)))
    before = measure(run, "base")
    assert measure(run, "base") == before
    documents[1] = "Too " * 40
    assert numbers(run, "base").nll != before.texts[0].numbers.nll


def test_of_some_texts_only_the_first_windows_count(
    work: Work, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = texts.Text("c4", ["a" * 90, "b" * 90], joiner=" ", windows=2)
    monkeypatch.setattr(texts, "load_text", lambda *_: text)
    config = work("eval.max_tokens=null").config
    windows = perplexities.windows_of(config, tokenizer, TextMeasure("c4", 64), CPU).tokens
    assert tokenizer.decode(windows.flatten()) == "a" * 90 + " " + "b" * 37
    assert len(perplexities.windows_of(config, tokenizer, TextMeasure("c4", 64, 32), CPU).tokens) == 3


def test_every_process_has_a_batch(
    work: Work, tokenizer: Any, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    three = TextMeasure(str(text_file), 64, max_tokens=192)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        assert perplexities.windows_of(work().config, tokenizer, three, CPU).indices.tolist() == [rank]


def test_a_stride_is_at_most_the_window(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline.preflight(work("eval.stride=64"), ("eval",))
    monkeypatch.setattr(perplexity, "DEFAULT_WINDOW", 64)  # of 128 positions
    for overrides in (["eval.stride=65"], ["eval.stride=65", "eval.seq_len=null"]):
        with pytest.raises(UserError, match=r"eval\.stride: 65 would skip tokens between windows of 64"):
            pipeline.preflight(work(*overrides), ("eval",))


# --- the dense model --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_model_at_a_time(
    work: Work, alpaca_file: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    run = work(f"eval.perplexity=[{text_file}, {alpaca_file}]")
    run.do(PRUNE)
    loaded: list[tuple[str, Any]] = []
    load, forward, forwards = checkpoint.load_model, LlamaModel.forward, []

    def watched(directory: Path, *args: Any, **options: Any) -> Any:
        gc.collect()
        assert not [name for name, model in loaded if model() is not None]
        model = load(directory, *args, **options)
        loaded.append((directory.name, weakref.ref(model)))
        return model

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        forwards.append(options["input_ids"].shape[1] == 64)
        return forward(self, *args, **options)

    monkeypatch.setattr(checkpoint, "load_model", watched)
    monkeypatch.setattr(LlamaModel, "forward", counted)
    found = pipeline.evaluate_some(run, ["base", "pruned"])
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("dense model: ")]
    assert [line.partition(":")[2].partition(", ")[0] for line in lines] == [
        f" text {text} of 2: {done}/8" for text in (1, 2) for done in (0, 8)
    ]
    assert sum(forwards) == 2 * 2 * 2  # two batches of two texts, once dense and once pruned
    assert [name for name, _ in loaded] == ["llama", "llama", "pruned"]  # predicts for both texts, is measured
    assert all(result["metrics"]["kl"] > 0 for result in found["pruned"]["results"])
    alone = measure(Run(run.config, force=True), "base").texts
    assert [result.numbers for result in alone] == [one.numbers for one in Results.from_json(found["base"]).texts]
    assert not list(run.directory.glob(".reference*"))


def test_what_a_killed_process_kept_is_removed(work: Work) -> None:
    run = work()
    run.do(PRUNE)
    for rank in range(2):
        (run.directory / f".reference-{rank}").mkdir()
    measure(run, "pruned")
    assert not list(run.directory.glob(".reference*"))


def test_another_reference_takes_the_place_of_the_one_before(work: Work, llama: Path, tmp_path: Path) -> None:
    work().do(PRUNE)
    changed(llama, tmp_path / "other", lambda weight: weight * 1.1)
    before = numbers(work(), "pruned")
    content = measure(work("eval.divergence=other"), "pruned")
    (after,) = content.texts
    assert (before.compared_with, after.numbers.compared_with) == (None, "other")
    assert before.kl != after.numbers.kl
    # without a comparison nothing is missing, and nothing is lost
    assert measure(work("eval.divergence=null"), "pruned") == content


def test_a_reference_with_another_vocabulary_is_refused_at_once(work: Work, llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "other")
    config = json.loads((tmp_path / "other/config.json").read_text()) | {"vocab_size": 300}
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"eval\.divergence: other has a vocabulary of 300, this model of 260"):
        pipeline.preflight(work("eval.divergence=other"), ("eval",))
    with pytest.raises(UserError, match=r"^eval\.divergence: \./nowhere does not exist"):
        pipeline.preflight(work("eval.divergence=./nowhere"), ("eval",))


# --- numbers that are none --------------------------------------------------------------------------------------------


def test_a_model_without_finite_logits_fails(work: Work, llama: Path, tmp_path: Path) -> None:
    changed(llama, tmp_path / "broken", lambda weight: weight * math.nan)
    with pytest.raises(StageError, match=r"broken: logits are not finite in window 1 of 8 \(dtype float32\)"):
        measure(work(), "broken")
    assert not (tmp_path / "run/eval/broken.json").exists()


def test_an_infinite_perplexity_is_null(work: Work, llama: Path, tmp_path: Path) -> None:
    changed(llama, tmp_path / "hopeless", lambda weight: weight * 1e6)
    content = measure(work(), "hopeless")
    assert (content.texts[0].numbers.value, content.texts[0].numbers.nll > 700) == (math.inf, True)
    written = json.loads((tmp_path / "run/eval/hopeless.json").read_text(), parse_constant=pytest.fail)
    assert written["results"] == content.to_json()["results"]


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(work: Work) -> Run:
    """A run up to its adapter; where the current directory is, paths are relative."""
    run = work("run.dir=run", "train.max_steps=1")
    run.do(PRUNE)
    run.do(TRAIN)
    return run


def copied(adapter: str, record: bool = True) -> Callable[..., None]:
    """A copy of an adapter, mine/, and a function that changes its settings."""
    shutil.copytree(adapter, "mine")
    settings = json.loads(Path("mine/adapter_config.json").read_text())
    if not record:
        Path("mine/stage.json").unlink()
    return lambda **changes: Path("mine/adapter_config.json").write_text(json.dumps(settings | changes)) and None


def test_an_adapter_on_weights_it_was_not_trained_on(trained: Run, work: Work) -> None:
    first = measure(trained, "adapter")
    shutil.copytree("run", "copy")
    # the right weights are beside the copy, whatever becomes of the original's
    work("run.dir=run", "prune.pattern=4:8", force=True).do(PRUNE)
    assert measure(work("run.dir=copy", "eval.max_tokens=256"), "adapter").fingerprint == first.fingerprint
    problem = (
        r"run/adapter was trained on other weights than .*pruned holds now; train again \(sppctl train .*run --force\)"
    )
    for model in ("adapter", "run/adapter"):
        with pytest.raises(UserError, match=problem):
            measure(trained, model)


def test_an_adapter_anywhere(trained: Run, work: Work) -> None:
    change, run = copied("run/adapter"), work("run.dir=other", "eval.divergence=null")
    inside, outside = measure(trained, "adapter"), measure(run, "mine")
    assert outside.fingerprint == inside.fingerprint
    assert outside.texts[0].numbers.nll == inside.texts[0].numbers.nll
    change(base_model_name_or_path="./gone")
    with pytest.raises(UserError, match=r"mine/adapter_config.json is damaged"):
        measure(run, "mine")
    Path("mine/stage.json").unlink()  # an adapter without a record may name any base
    with pytest.raises(UserError, match=r"mine was trained on \./gone, which was not found"):
        measure(run, "mine")


def test_an_adapter_whose_file_is_not_what_its_configuration_describes(trained: Run, work: Work) -> None:
    change, weights = copied("run/adapter", record=False), Path("mine/adapter_model.safetensors")
    run, own = work("run.dir=other", "eval.divergence=null"), load_file(weights)
    first, *rest = sorted(own)

    def refused(problem: str, tensors: dict[str, torch.Tensor] = own, **changes: Any) -> None:
        save_file(tensors, weights)
        change(**changes)
        with pytest.raises(UserError, match=problem + ".*; download the adapter again, or correct its adapter_config"):
            measure(run, "mine")
        assert not Path("other").exists()

    refused(rf"it holds no {first}\.default", {name: own[name] for name in rest})
    refused("it holds more, which is not part of it", own | {"more": torch.ones(2)})
    refused(r"it holds no .*lora_A\.default\.weight \(and \d+ more\)", peft_type="LORA")
    refused(r"it holds .*spp_alpha, which is not part of it \(and \d+ more\)", target_modules=["down_proj"])
    refused("mine cannot be attached to .*run/pruned: .*size mismatch", r=2)
    refused("mine cannot be attached to .*run/pruned: .*not supported between", scale="large")
    change()
    weights.write_bytes(b"")
    with pytest.raises(UserError, match=r"mine cannot be attached to .*run/pruned: .*header"):
        measure(run, "mine")


def test_a_lora_that_began_with_the_base_weights(work: Work, llama: Path) -> None:
    from peft import LoraConfig, get_peft_model

    run, config = work("eval.divergence=null"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config).save_pretrained("pissa")
    settings = json.loads(Path("pissa/adapter_config.json").read_text()) | {"base_model_name_or_path": str(llama)}
    Path("pissa/adapter_config.json").write_text(json.dumps(settings))
    assert measure(run, "pissa").texts


# --- labels -----------------------------------------------------------------------------------------------------------


def test_every_checkpoint_has_a_name_of_its_own(
    work: Work, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def labels(*models: str) -> list[str]:
        return list(measuring.checkpoints_to_measure(run, list(models)))

    for name in ("x/a/b", "x/a-b", "merged", "odd name", "odd+name"):
        shutil.copytree(llama, tmp_path / name)
    run = work()
    assert labels("x/a/b", "x/a-b", "./x/a-b", "merged") == ["x--a--b", "x--a-b", f"{tmp_path.name}--merged"]
    second = f"odd-name-{checkpoint.fingerprint(tmp_path / 'odd+name')[:6]}"
    assert labels("odd name", "odd+name") == ["odd-name", second]
    deep = tmp_path / "/".join(letter * 100 for letter in "xyé")
    shutil.copytree(llama, deep)
    (label,) = labels(str(deep.relative_to(tmp_path)))
    assert re.fullmatch(f"{'x' * 100}--{'y' * 89}-[0-9a-f]{{8}}", label)
    monkeypatch.chdir(tmp_path / "x/a/b")
    assert labels(".") == ["a--b"]
    assert labels("../b", "../../a-b")[1] == f"{tmp_path}/x/a-b".strip("/").replace("/", "--")
    with pytest.raises(UserError, match=r"^--model: \./nowhere does not exist"):
        labels("./nowhere")


# --- large models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gpus", "free", "spread"), [(2, 1 << 30, False), (2, 10, True), (1, 10, False)])
def test_a_model_that_exceeds_a_gpu_is_spread_over_several(
    llama: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, free: int, spread: bool
) -> None:
    def load(*_: Any, **options: Any) -> Any:
        asked.update(options)
        model = SimpleNamespace(config=SimpleNamespace(), eval=lambda: None, to=lambda _: model)
        return model, {"missing_keys": set(), "mismatched_keys": set()}

    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 1 << 40))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    gpu, asked = torch.device("cuda", 0), dict[str, Any]()
    checkpoint.load_model(llama, gpu, "float32", spread=True)
    assert asked.get("device_map") == ("auto" if spread else None)
    checkpoint.load_model(llama, gpu, "float32")
    assert not checkpoint.exceeds(llama, CPU, "float32")
    monkeypatch.setenv("WORLD_SIZE", "2")
    if spread:
        with pytest.raises(UserError, match=r"launch\.num_processes=1 spreads it over all GPUs"):
            checkpoint.load_model(llama, gpu, "float32", spread=True)


@pytest.mark.parametrize(("gpus", "free", "exceeds"), [(2, 1 << 30, False), (2, 10, True), (1, 10, False)])
def test_a_dense_model_that_exceeds_a_gpu_needs_all(
    gpus: int, free: int, exceeds: bool, llama: Path, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, run = torch.device("cuda", 0), work("model.compute_dtype=float32")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 1 << 40))
    monkeypatch.setattr(checkpoint, "pick_device", lambda _: gpu)
    assert measuring.needs_all_gpus(run, {"base": llama}) is exceeds
    assert measuring.needs_all_gpus(run, {"merged": llama}) is exceeds, "it is compared with the dense model"
    assert not measuring.needs_all_gpus(work("eval.divergence=null"), {"merged": llama})
    config, needed = run.config.model, checkpoint.weight_bytes(llama, "float32")
    assert (shortage(config, needed) is None) is (free > 10)
    monkeypatch.setenv("WORLD_SIZE", "2")
    advice = " on a GPU (launch.num_processes=1 spreads it over all GPUs)"
    assert (shortage(config, needed) or "").endswith(advice) is exceeds


def test_a_model_with_a_device_map_is_measured_like_any_other(
    work: Work, own_tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = work(f"eval.include_path={own_tasks}", "eval.tasks=[small_sums, said]", "eval.limit=2")
    run.do(PRUNE)
    plain, load = measure(run, "pruned"), checkpoint.load_model

    def mapped(directory: Path, *_: Any, **__: Any) -> Any:
        from accelerate import dispatch_model

        parts = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
        device_map = dict.fromkeys(parts, "cpu")
        return dispatch_model(load(directory, CPU, "float32"), device_map, main_device="cpu", force_hooks=True)

    monkeypatch.setattr(checkpoint, "load_model", mapped)
    spread = measure(Run(run.config, force=True), "pruned")
    assert [result.numbers for result in spread.results] == [result.numbers for result in plain.results]
    assert len(spread.results) == 3
