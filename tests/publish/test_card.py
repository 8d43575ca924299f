from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import weights_of
from conftest import Command
from huggingface_hub import ModelCard
from made_up_runs import change_record, change_results, text, write_run
from transformers import pipeline

from sppctl.config.settings import ModelConfig
from sppctl.config.yaml12 import parse_yaml
from sppctl.evaluate.results import Results, TextResult
from sppctl.files import sealed
from sppctl.files.names import RECORD
from sppctl.publish import card, card_data
from sppctl.records import BaseModel, to_json


@pytest.fixture
def run(here: Path) -> Path:
    """A copy of the finished run, whose dense model is in ``base`` below the current directory."""
    return here / "run"


def data_of(directory: Path) -> dict[str, Any]:
    """The front matter of a card."""
    found: dict[str, Any] = ModelCard.load(directory / "README.md").data.to_dict()
    return found


def made_up(directory: Path, base: BaseModel | None = None, **training: Any) -> Path:
    """A run with made-up numbers of a dense model, without cards."""
    write_run(directory)
    metrics = sealed.read(directory / "pruned/stage.json", "")["metrics"]
    change_record(directory, "prune", metrics=metrics | {"base": to_json(base)})
    if training:
        metrics = sealed.read(directory / "adapter/stage.json", "")["metrics"]
        change_record(directory, "train", metrics=metrics | training)
    return directory


def update(run: Path) -> Path:
    card.update(card.study_of(run))
    return run


HUB = BaseModel("meta-llama/Llama-2-7b-hf", True, "a" * 40, {"license": "llama2"})


def test_every_checkpoint_of_a_run_says_what_it_is(run: Path) -> None:
    merged, pruned, adapter = (data_of(run / name) for name in ("merged", "pruned", "adapter"))
    assert {"sparse", "2:4", "wanda", "spp"} <= set(merged["tags"])
    assert "spp" not in pruned["tags"]
    assert [one["library_name"] for one in (merged, pruned, adapter)] == ["transformers", "transformers", "peft"]
    assert {one["pipeline_tag"] for one in (merged, pruned, adapter)} == {"text-generation"}
    assert not {"base_model", "datasets", "license"} & (merged.keys() | adapter.keys())  # all of it is local
    measured = sealed.read(run / "eval/merged.json", "")["results"][0]["metrics"]["value"]
    (result,) = merged["model-index"][0]["results"]
    (metric,) = result["metrics"]
    assert metric["type"] == "perplexity"
    assert metric["value"] == pytest.approx(measured, abs=1e-5)
    assert "first 256 tokens" in metric["name"]
    text = (run / "merged/README.md").read_text()
    assert "| base | pruned | merged |" in text
    assert "2405.16057" in text
    assert "2306.11695" in text
    assert "base: its licence is unknown" in text


def test_no_card_says_where_files_were(run: Path, finished: Path, text_file: Path, alpaca_file: Path) -> None:
    """Where the run was when its cards were written, where its data is, and where it is now."""
    for name in ("merged", "pruned", "adapter"):
        text = (run / name / "README.md").read_text()
        assert text_file.name in text
        for folder in (finished, text_file.parent, alpaca_file.parent, run.parent):
            assert str(folder) not in text


def test_a_model_of_the_hub_and_its_data_are_linked(tmp_path: Path) -> None:
    run = update(made_up(tmp_path / "run", HUB))
    merged, pruned, adapter = (data_of(run / name) for name in ("merged", "pruned", "adapter"))
    assert {one["base_model"] for one in (merged, pruned, adapter)} == {HUB.name}
    assert merged["base_model_relation"] == "finetune"
    assert adapter["base_model_relation"] == "adapter"
    assert "base_model_relation" not in pruned  # the hub has no word for pruning
    assert merged["license"] == "llama2"
    assert merged["datasets"] == ["allenai/c4"]
    results = {
        (one["dataset"]["type"], metric["type"]): metric
        for one in merged["model-index"][0]["results"]
        for metric in one["metrics"]
    }
    assert ("Salesforce/wikitext", "perplexity") in results
    assert "limit 200" in results["rte", "acc"]["name"]
    assert 0 < results["rte", "acc"]["value"] < 1
    assert "licence is unknown" not in (run / "merged/README.md").read_text()


def test_results_on_few_examples_are_in_the_table_alone(tmp_path: Path) -> None:
    run = made_up(tmp_path / "run", HUB)

    def limit(results: Results) -> None:
        results.results[:] = [
            one
            if isinstance(one, TextResult)
            else dataclasses.replace(one, measure=dataclasses.replace(one.measure, limit=20))
            for one in results.results
        ]

    change_results(run, "merged", limit)
    (result,) = data_of(update(run) / "merged")["model-index"][0]["results"]
    assert result["metrics"][0]["type"] == "perplexity"
    assert "limit 20" in (run / "merged/README.md").read_text()


@pytest.mark.parametrize(
    ("file", "shown"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct.Q4_1.gguf, quantised to Q4_1"),
        ("folder/a-IQ2_XXS.gguf", "a-IQ2_XXS.gguf, quantised to IQ2_XXS"),
        ("model.F16.gguf", "model.F16.gguf"),
    ],
)
def test_a_base_that_was_quantised_is_named_as_such(tmp_path: Path, file: str, shown: str) -> None:
    run = made_up(tmp_path / "run", HUB)
    change_record(run, "prune", settings={"model": {"gguf_file": file}})
    lines = (update(run) / "merged/README.md").read_text().splitlines()
    assert f"- base: unpacked from a GGUF file, {shown}" in lines


def test_the_licence_is_that_of_the_models_own_card(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b/snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"license": "mit"}')
    assert card_data.base_of(ModelConfig(path="a/b"), snapshot) == BaseModel("a/b", True, "c" * 40, {"license": "mit"})
    (snapshot / "README.md").write_text("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n# B\n")
    own = {"license": "other", "license_name": "own", "license_link": "LICENSE"}
    assert card_data.base_of(ModelConfig(path="a/b"), snapshot).license == own
    (snapshot / "README.md").write_text("---\nlicense: 'mit\n\n  # x'\n---\n")  # two lines
    assert card_data.base_of(ModelConfig(path="a/b"), snapshot).license == {}
    for front in ("license: [a, b]", "{", "a: &a [1]\nb: [*a"):
        (snapshot / "README.md").write_text(f"---\n{front}\n---\n")
        assert card_data.base_of(ModelConfig(path="a/b"), snapshot).license == {"license": "mit"}
    assert card_data.base_of(ModelConfig(path=str(snapshot)), snapshot).name == "a/b"
    local = card_data.base_of(ModelConfig(path="models/own"), tmp_path / "models/own")
    assert local == BaseModel("own", False)
    file = card_data.base_of(ModelConfig(path="package:models", gguf_file="x.Q4.gguf"), tmp_path)
    assert file == BaseModel("x.Q4.gguf", False)


def test_names_are_shown_and_mean_nothing(tmp_path: Path) -> None:
    odd = "a|b <script>*x*: [y](z) # {{ 7 * 7 }}\n---\nlicense: mit"
    run = update(made_up(tmp_path / "run", BaseModel(odd, False)))
    found = ModelCard.load(run / "merged/README.md")
    assert "license" not in found.data.to_dict()
    assert "<script>" not in found.text
    assert "[y](z)" not in found.text
    assert r"{{ 7 \* 7 }}" in found.text


def test_results_come_into_the_card_and_leave_the_record_alone(command: Command, run: Path) -> None:
    record = (run / "merged" / RECORD).read_bytes()
    before = (run / "merged/README.md").read_text()
    for path in (run / "eval").iterdir():
        path.unlink()
    assert command("report", str(run)).code == 0
    assert "Nothing has been measured yet" in (run / "merged/README.md").read_text()
    models = [f"--model={label}" for label in ("base", "pruned", "merged")]
    assert command("eval", "tiny.yaml", *models).code == 0
    assert (run / "merged/README.md").read_text() == before
    assert data_of(run / "merged")["model-index"]
    assert (run / "merged" / RECORD).read_bytes() == record
    assert command("verify", str(run)).code == 0


def test_a_card_of_ones_own_stays(command: Command, run: Path) -> None:
    (run / "merged/README.md").write_text("# Mine\n")
    (run / "adapter/README.md").unlink()
    assert command("report", str(run)).code == 0
    assert (run / "merged/README.md").read_text() == "# Mine\n"
    assert card.MARK in (run / "adapter/README.md").read_text()


def test_the_card_of_the_base_does_not_travel(command: Command, config_file: Path, llama: Path, tmp_path: Path) -> None:
    base = shutil.copytree(llama, tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# The original\n")
    outcome = command("prune", str(config_file), f"model.path={base}", "prune.method=magnitude")
    assert outcome.code == 0, outcome.err
    pruned = config_file.parent / "run/pruned"
    assert "The original" not in (pruned / "README.md").read_text()
    assert data_of(pruned)["license"] == "mit"
    assert "language" not in data_of(pruned)


def test_a_merge_that_fills_zeros_is_not_called_2_to_4(tmp_path: Path) -> None:
    run = made_up(tmp_path / "run", method="lora")
    metrics = sealed.read(run / "merged/stage.json", "")["metrics"]
    filled = {"pattern_unchanged": False, "filled_zeros": 7, "sparsity": 0.0}
    change_record(run, "merge", metrics=metrics | filled)
    update(run)
    assert not {"sparse", "2:4"} & set(data_of(run / "merged")["tags"])
    assert "filled 7 zeros" in (run / "merged/README.md").read_text()
    adapter = (run / "adapter/README.md").read_text()
    assert "import sppctl" not in adapter
    assert "KeyError" not in adapter


def test_an_adapter_on_refreshed_weights_is_not_said_to_load_with_peft(tmp_path: Path) -> None:
    refresh = {"refreshes": [], "changed_matrices": 1, "masks": {}, "regrown_share": 0.1, "base_weights": "x"}
    run = update(made_up(tmp_path / "run", refresh=refresh))
    text = (run / "adapter/README.md").read_text()
    assert "refreshed.safetensors" in text
    assert "PeftModel" not in text


def test_the_code_on_the_card_of_an_adapter_loads_it_from_anywhere(run: Path) -> None:
    named = json.loads((run / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(named).is_absolute()
    code = (run / "adapter/README.md").read_text().partition("```python\n")[2].partition("```")[0]
    assert code.startswith("import sppctl")
    repository = code.rpartition('PeftModel.from_pretrained(model, "')[2].partition('"')[0]
    code = code.replace("OWNER/PRUNED", str(run / "pruned")).replace(repository, str(run / "adapter"))
    found: dict[str, Any] = {}
    exec(code, found)
    merged = found["model"].merge_and_unload().state_dict()
    assert all(tensor.equal(merged[name]) for name, tensor in weights_of(run / "merged").items())


@pytest.mark.slow
def test_peft_alone_stops_as_the_card_says(run: Path) -> None:
    script = f"from peft import PeftModel; PeftModel.from_pretrained(None, {str(run / 'adapter')!r})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "KeyError: 'SPP'"
    assert "`KeyError: 'SPP'`" in (run / "adapter/README.md").read_text()


def test_published_files_have_the_permissions_of_new_files(run: Path) -> None:
    Path("new").touch()
    mode = Path("new").stat().st_mode
    assert not [path for path in run.rglob("*") if path.is_file() and path.stat().st_mode != mode]


def test_a_merged_checkpoint_is_served_by_transformers_pipeline(run: Path) -> None:
    write = pipeline("text-generation", model=str(run / "merged"))
    (answer,) = write("One and two", max_new_tokens=4, do_sample=False)
    assert answer["generated_text"].startswith("One and two")


def test_a_read_only_run_can_be_reported(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (run / "merged/README.md").stat().st_mtime_ns
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    update(run)
    assert (run / "merged/README.md").stat().st_mtime_ns == before


def test_texts_are_named_without_their_folders(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    texts = [
        text(number, 64, name) for number, name in ((2.0, "/secret/a/x.txt"), (3.0, "/secret/b/x.txt"), (4.0, "a/b"))
    ]
    change_results(run, "merged", lambda content: setattr(content, "results", texts))
    found = update(run) / "merged/README.md"
    assert "/secret" not in found.read_text()
    values = {
        one["dataset"]["name"]: one["metrics"][0]["value"]
        for one in data_of(run / "merged")["model-index"][0]["results"]
    }
    assert values == {"x.txt": 2.0, "x.txt (2)": 3.0, "a/b": 4.0}


def test_settings_on_a_card_are_those_of_all_stages(run: Path) -> None:
    settings = parse_yaml(
        card.render(card.study_of(run), "merge").partition("```yaml\n")[2].partition("```")[0], "card"
    )
    assert settings["model"].keys() > {"path", "compute_dtype"}, "of pruning; training records only the dtype"
    assert settings.keys() == {"run", "model", "prune", "train", "merge"}


def test_settings_on_a_card_leave_out_where_files_were(run: Path) -> None:
    study = card.study_of(run)
    record = study.stages["train"]
    mixture = {"/secret/rows.jsonl": 1.0, "tatsu-lab/alpaca": 2.0, "own/corpus": 1.0}  # the last one is a folder
    data = record.settings["train"]["data"] | {"dataset": mixture}
    settings = record.settings | {"train": record.settings["train"] | {"data": data}}
    settings["eval"] = {"perplexity": ["/secret/held-out.txt"]}  # with train.keep_best=perplexity
    stages = study.stages | {
        "train": dataclasses.replace(record, settings=settings, inputs={"data own/corpus": "hash"})
    }
    text = card.render(dataclasses.replace(study, stages=stages), "merge")
    assert "/secret" not in text
    assert "rows.jsonl: 1.0" in text
    assert "held-out.txt" in text
    assert ModelCard(text).data.to_dict()["datasets"] == ["tatsu-lab/alpaca"]
