from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import Command
from huggingface_hub.errors import LocalEntryNotFoundError
from made_up_runs import change_record
from transformers import AutoModelForCausalLM, AutoTokenizer

from sppctl.config.settings import ModelConfig
from sppctl.errors import StageError, UserError
from sppctl.inspect import speed
from sppctl.publish import generate
from sppctl.publish.generate import Settings
from sppctl.records import Sample, from_json, to_json

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture
def run(here: Path) -> Path:
    """A copy of the finished run, whose dense model is in ``base`` below the current directory."""
    return here / "run"


def greedy(directory: Path, prompt: str, tokens: int) -> str:
    """What plain transformers write."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    encoded = tokenizer(prompt, return_tensors="pt")["input_ids"]
    whole = model.generate(encoded, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(whole[0, encoded.shape[1] :], skip_special_tokens=True))


def test_base_pruned_and_merged_continue_the_same_prompts(command: Command, run: Path) -> None:
    asked = ("generate", str(run), "--prompt", "One", "--prompt", "Two and", "--max-new-tokens", "6")
    outcome = command(*asked, "--json")
    assert outcome.code == 0, outcome.err
    samples = [from_json(Sample, one) for one in outcome.json]
    assert [sample.prompt for sample in samples] == ["One", "Two and"]
    places = {"base": Path("base"), "pruned": run / "pruned", "merged": run / "merged"}
    for sample in samples:
        assert [one.checkpoint for one in sample.completions] == list(places)
        for one in sample.completions:
            assert one.text == greedy(places[one.checkpoint], sample.prompt, 6)
            assert one.tokens <= 6
    assert to_json(samples) == outcome.json
    shown = command(*asked)
    assert shown.code == 0
    assert all(label in shown.out for label in places)


def test_any_checkpoint_and_an_adapter_that_is_not_merged(run: Path) -> None:
    (merged,) = generate.subjects_of(str(run / "merged"), ModelConfig())
    (adapter,) = generate.subjects_of(str(run / "adapter"), ModelConfig())
    (sample,) = generate.generate([merged, adapter], ["Three is"], Settings(max_new_tokens=5))
    assert len({one.text for one in sample.completions}) == 1
    assert not sample.chat_template


def test_the_chat_template_is_used_where_there_is_one(run: Path, tmp_path: Path) -> None:
    chatty = Path(shutil.copytree(run / "merged", tmp_path / "chatty"))
    (chatty / "stage.json").unlink()
    (chatty / "chat_template.jinja").write_text(TEMPLATE)
    subjects = generate.subjects_of(str(chatty), ModelConfig())
    (with_template,) = generate.generate(subjects, ["Hi"], Settings(max_new_tokens=4))
    (without,) = generate.generate(subjects, ["Hi"], Settings(max_new_tokens=4, chat_template=False))
    assert with_template.chat_template
    assert not without.chat_template
    assert with_template.completions[0].text == greedy(chatty, "<user>Hi<a>", 4)
    assert without.completions[0].text == greedy(chatty, "Hi", 4)
    (chatty / "chat_template.jinja").write_text("{{ raise_exception('never') }}")
    with pytest.raises(UserError, match="chat template fails: never; --no-chat"):
        generate.generate(subjects, ["Hi"], Settings(max_new_tokens=4))


def test_drawn_tokens_follow_the_seed(run: Path) -> None:
    subjects = generate.subjects_of(str(run / "merged"), ModelConfig())

    def drawn(*prompts: str, seed: int) -> list[str]:
        samples = generate.generate(subjects, prompts, Settings(max_new_tokens=12, temperature=5.0, seed=seed))
        return [sample.completions[0].text for sample in samples]

    assert drawn("A", "B", seed=1) == [*drawn("A", seed=1), *drawn("B", seed=1)]
    assert drawn("A", seed=1) != drawn("A", seed=2)


def test_a_checkpoints_own_generation_settings_change_nothing(run: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(run / "merged", tmp_path / "own"))
    (own / "stage.json").unlink()
    settings = json.loads((own / "generation_config.json").read_text())
    changed = {"do_sample": True, "top_k": 1, "top_p": 0.1, "num_beams": 3, "repetition_penalty": 9.0}
    (own / "generation_config.json").write_text(json.dumps(settings | changed))
    subjects = [
        *generate.subjects_of(str(run / "merged"), ModelConfig()),
        *generate.subjects_of(str(own), ModelConfig()),
    ]
    for temperature in (0.0, 5.0):
        (sample,) = generate.generate(subjects, ["A"], Settings(max_new_tokens=12, temperature=temperature))
        assert len({one.text for one in sample.completions}) == 1
    assert sample.completions[0].text != greedy(run / "merged", "A", 12)


def test_a_token_that_ends_the_text_is_noticed(run: Path, tmp_path: Path) -> None:
    """Of equal logits the first token is the likeliest, which ends the text here."""
    ending = Path(shutil.copytree(run / "merged", tmp_path / "ending"))
    (ending / "stage.json").unlink()
    model = AutoModelForCausalLM.from_pretrained(ending)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.generation_config.eos_token_id = 0
    model.save_pretrained(ending)
    (sample,) = generate.generate(generate.subjects_of(str(ending), ModelConfig()), ["Hi"], Settings(max_new_tokens=4))
    assert sample.completions[0].is_finished
    assert sample.completions[0].tokens == 1


def test_a_base_that_has_changed_is_left_out(command: Command, run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree("base", tmp_path / "other"))
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 0.1}))
    record = generate.records.read(run / "pruned/stage.json", "prune")
    record.settings["model"]["path"] = str(other)
    generate.records.sealed.write(run / "pruned/stage.json", to_json(record))
    outcome = command("generate", str(run), "--prompt", "One", "--max-new-tokens", "2", "--json")
    assert outcome.code == 0, outcome.err
    assert [one["checkpoint"] for one in outcome.json[0]["completions"]] == ["pruned", "merged"]
    assert "without the base" in outcome.err


def test_a_base_that_has_left_the_cache_is_left_out(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def download(*_: object, **options: object) -> str:
        assert options["local_files_only"]
        raise LocalEntryNotFoundError("not cached")

    settings = generate.records.read(run / "pruned/stage.json", "prune").settings
    change_record(run, "prune", settings=settings | {"model": settings["model"] | {"path": "owner/gone"}})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert [one.label for one in generate.subjects_of(str(run), ModelConfig())] == ["pruned", "merged"]
    assert "without the base (model.path: owner/gone is neither a local" in capsys.readouterr().err


@pytest.mark.parametrize("trust", [False, True])
def test_a_models_own_code_runs_if_the_run_trusts_it(
    trust: bool, command: Command, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = generate.records.read(run / "pruned/stage.json", "prune").settings
    change_record(run, "prune", settings=settings | {"model": settings["model"] | {"trust_remote_code": trust}})

    def stop(_: str, settings: ModelConfig | speed.Settings) -> None:
        raise StageError(f"trust: {settings.trust_remote_code}")

    monkeypatch.setattr(generate, "subjects_of", stop)
    monkeypatch.setattr(speed, "execute", stop)
    for name in ("generate", "bench"):
        assert f"trust: {trust}" in command(name, str(run)).err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt", "  "], "--prompt: is empty"),
        (["--max-new-tokens", "0"], "--max-new-tokens: 0 is not a positive number"),
        (["--temperature", "-1"], "--temperature: -1.0"),
        (["--max-new-tokens", "200"], "more than the 128 positions"),
        (["--device", "warp"], "--device: warp is not usable"),
    ],
)
def test_what_cannot_be_generated_is_said_in_one_line(
    command: Command, run: Path, options: list[str], words: str
) -> None:
    outcome = command("generate", str(run / "merged"), *options)
    assert outcome.code == 2
    assert words in outcome.err
    assert outcome.err.count("error:") == 1


def test_a_directory_that_is_neither_is_refused(command: Command, tmp_path: Path) -> None:
    outcome = command("generate", str(tmp_path), "--prompt", "One")
    assert outcome.code == 2
    assert f"RUN: {tmp_path} has no config.json" in outcome.err
