"""The commands as a person or a script meets them: help, configuration, output, the pipeline and its shortcuts."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Command

from sppctl import __version__, cli, options, records
from sppctl.config.load import config_keys, load_config, to_dict
from sppctl.config.settings import Config
from sppctl.config.yaml12 import parse_yaml
from sppctl.files import sealed
from sppctl.files.names import DIRECTORIES
from sppctl.options import parse
from sppctl.records import to_json
from sppctl.run import pipeline

COMMANDS = sorted(command.name or command.callback.__name__ for command in cli.app.registered_commands)
WEIGHTS = ("pruned/model.safetensors", "adapter/adapter_model.safetensors", "merged/model.safetensors")
ROOT = Path(cli.__file__).parents[1]
RESULTS = {"label", "checkpoint", "fingerprint", "sparsity", "results"}


def times(run_dir: Path) -> list[int]:
    return [(run_dir / name).stat().st_mtime_ns for name in WEIGHTS]


# --- help and configuration -------------------------------------------------------------------------------------------


def without_torch(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, which must not load a library that takes seconds."""
    code = f"""
import sys
from sppctl.cli import main
sys.argv = ["sppctl", *{arguments!r}]
try:
    main()
finally:
    heavy = {{"torch", "transformers", "peft", "datasets", "lm_eval"}} & sys.modules.keys()
    assert not heavy, heavy
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [["--help"], ["config"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_and_configuration_are_there_without_torch(arguments: list[str]) -> None:
    done = without_torch(arguments)
    assert done.returncode == 0, done.stderr
    assert ("Usage: sppctl" if "--help" in arguments else "prune:") in done.stdout
    if len(arguments) == 2:
        assert re.findall(rf"^ +sppctl {arguments[0]}\b", done.stdout, re.MULTILINE), "no example"
        documents = re.search(r"More: (.*)", done.stdout)
        assert documents is not None
        assert all((ROOT / document.strip()).is_file() for document in documents[1].split(","))


def test_a_plan_without_a_model_is_refused_before_torch_is_loaded() -> None:
    done = without_torch(["plan", "--model", "nowhere"])
    assert done.returncode == 2, done.stderr
    assert "error: model.path: nowhere is not a local directory" in done.stderr


def test_python_m_sppctl_knows_its_version_and_shows_its_commands() -> None:
    version, nothing = (
        subprocess.run([sys.executable, "-m", "sppctl", *arguments], capture_output=True, text=True)
        for arguments in (["--version"], [])
    )
    assert (version.returncode, version.stdout) == (0, f"sppctl {__version__}\n")
    assert nothing.returncode == 2
    assert "Usage: " in nothing.stdout + nothing.stderr
    documented = {"run", "prune", "train", "merge", "eval", "report", "inspect", "bench", "plan", "sweep", "config"}
    assert documented <= set(COMMANDS)


def test_config_prints_yaml_that_can_be_run(command: Command, config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "written.yaml").write_text(command("config", str(config_file), "prune.pattern=4:8").out)
    resolved = load_config(str(config_file), ["prune.pattern=4:8"])
    assert load_config(str(tmp_path / "written.yaml")) == resolved
    assert command("config", str(config_file), "prune.pattern=4:8", "--json").json == to_dict(resolved)
    assert command("config", "--json").json == to_dict(load_config("quickstart"))


def test_schema_lists_every_key(command: Command) -> None:
    assert [entry["key"] for entry in command("config", "--schema", "--json").json] == config_keys()
    text = command("config", "--schema").out
    assert parse_yaml(text, "the schema") == to_dict(Config())
    assert "# optimizer steps between checkpoints (integer)" in text


@pytest.mark.parametrize(
    "words",
    ["CONFIG train.rank=2 run.seed=7", "train.rank=2 run.seed=7 CONFIG", "train.rank=2 --json CONFIG run.seed=7"],
)
def test_overrides_may_stand_anywhere(command: Command, config_file: Path, words: str) -> None:
    found = command("config", *words.replace("CONFIG", str(config_file)).split(), "--json").json
    assert (found["train"]["rank"], found["run"]["seed"], found["train"]["data"]["val_size"]) == (2, 7, 4)


@pytest.mark.parametrize(
    ("short", "overrides"),
    [
        ({"model": "a/b"}, ["model.path=a/b"]),
        ({"method": "magnitude"}, ["prune.method=magnitude"]),
        ({"train_method": "hira"}, ["train.method=hira"]),
        ({"pattern": "4:8"}, ["prune.pattern=4:8"]),
        ({"pattern": "0.6"}, ["prune.pattern=0.6"]),
        ({"output": "elsewhere"}, ["run.dir=elsewhere"]),
        ({"output": "2024"}, ["run.dir='2024'"]),
        ({"output": "runs/a: b"}, ["run.dir='runs/a: b'"]),
        ({"limit": 5}, ["eval.limit=5"]),
        ({"tasks": "ppl"}, ["eval.tasks=[]"]),
        ({"tasks": "zeroshot, mmlu"}, ["eval.tasks=[zeroshot, mmlu]", "eval.perplexity=[]"]),
        ({"tasks": "boolq,ppl"}, ["eval.tasks=[boolq]"]),
        ({"tasks": "ppl", "models": None}, ["eval.tasks=[]", "eval.prompts=[]"]),  # `sppctl eval` without --model
    ],
    ids=str,
)
def test_options_are_short_for_overrides(config_file: Path, short: dict[str, Any], overrides: list[str]) -> None:
    assert parse([str(config_file)], **short).config == load_config(str(config_file), overrides)


def test_another_model_on_the_command_line_needs_no_gguf_file_of_the_default(llama: Path) -> None:
    model = parse(model=str(llama)).config.model
    assert (model.path, model.gguf_file) == (str(llama), None)


@pytest.mark.parametrize(
    ("arguments", "notice"),
    [
        ([], "neither CONFIG nor a model is given, so this is the quickstart: "),
        (["train.rank=2"], "run directory runs/quickstart; for your own model: sppctl run --model HUB_ID_OR_DIRECTORY"),
        (
            ["model.path=a/b", "prune.pattern=4:8"],
            "no CONFIG is given, so the defaults are used: wanda 4:8 with c4 (128 x 2048 tokens), spp on alpaca (epochs"
            " 3, lr 0.004, batch size 128), run directory runs/b-wanda-4of8; KEY=VALUE changes them, sppctl config "
            "model.path=a/b prune.pattern=4:8 prints all\n",
        ),
        (["quickstart"], None),
        (["CONFIG", "model.path=a/b"], None),
    ],
    ids=str,
)
def test_what_is_used_without_a_configuration_is_printed(
    arguments: list[str], notice: str | None, command: Command, config_file: Path
) -> None:
    printed = command("config", *(str(config_file) if name == "CONFIG" else name for name in arguments)).err
    assert printed == "" if notice is None else notice in printed
    assert printed.count("\n") == (notice is not None)


def test_default_lengths_are_those_that_the_model_takes(command: Command, llama: Path) -> None:
    assert json.loads((llama / "config.json").read_text())["max_position_embeddings"] == 128
    outcome = command("config", f"model.path={llama}", "--json")
    config = outcome.json
    assert (config["prune"]["calibration"]["seq_len"], config["train"]["data"]["seq_len"]) == (128, 128)
    assert "c4 (128 x 128 tokens)" in outcome.err
    shown = "prune.calibration.seq_len=128 and train.data.seq_len=128, as many tokens as the model takes; "
    assert shown in outcome.err
    config = command("config", f"model.path={llama}", "train.data.seq_len=256", "--json").json
    assert (config["prune"]["calibration"]["seq_len"], config["train"]["data"]["seq_len"]) == (128, 256)


def test_a_length_that_the_model_does_not_take_is_reported_before_data_is_read(
    command: Command, config_file: Path
) -> None:
    lengths = ("prune.calibration.seq_len=129", "train.data.seq_len=130")
    outcome = command("run", str(config_file), *lengths, "train.data.dataset=lost/rows")
    assert outcome.code == 2
    assert [line.partition(" exceeds")[0] for line in outcome.err.splitlines()] == [
        "error: prune.calibration.seq_len: 129",
        "error: train.data.seq_len: 130",
    ]


def test_with_local_calibration_text_and_the_hub_switched_off_the_default_rows_are_built_in(
    tmp_path: Path, text_file: Path
) -> None:
    def rows(offline: str, *overrides: str) -> tuple[str, bool]:
        environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": offline}
        environment.pop("HF_DATASETS_CACHE", None)
        command = [sys.executable, "-m", "sppctl", "config", "model.path=a/b", *overrides]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        dataset = next(line for line in done.stdout[done.stdout.index("\ntrain:") :].splitlines() if "dataset:" in line)
        return dataset.split()[1], "the built-in instructions, as HF_HUB_OFFLINE is set" in done.stderr

    local = f"prune.calibration.dataset={text_file}"
    assert rows("1", local) == ("instructions", True)
    assert rows("0", local) == ("alpaca", False)
    assert rows("1") == ("alpaca", False)
    assert rows("1", local, "train.data.dataset=c4") == ("c4", False)
    (tmp_path / "datasets/tatsu-lab___alpaca").mkdir(parents=True)
    assert rows("1", local) == ("alpaca", False)


def test_a_command_that_another_one_started_repeats_no_notice() -> None:
    arguments = [sys.executable, "-m", "sppctl", "config"]
    started = os.environ | {"SPPCTL_LAUNCHER": str(os.getpid())}
    by_us, by_the_user = (
        subprocess.run(arguments, env=environment, capture_output=True, text=True)
        for environment in (started, os.environ)
    )
    assert (by_us.returncode, by_us.stderr) == (0, "")
    assert "quickstart" in by_the_user.stderr


def test_help_of_a_command(command: Command) -> None:
    assert command("help", "train").out == command("train", "--help").out
    assert command("help").out == command("--help").out
    assert "llama2-7b" in command("help").out
    wrong = command("help", "trian")
    assert wrong.code == 2
    assert "train" in wrong.err


def test_schema_of_a_section(command: Command) -> None:
    keys = [entry["key"] for entry in command("config", "--schema", "train.distill", "--json").json]
    assert keys == [f"train.distill.{key}" for key in ("teacher", "weight", "temperature", "tokens", "hidden")]
    assert "teacher: null" in command("config", "--schema", "train.distill").out
    for wrong in ("trian", "train.rank=2"):
        assert command("config", "--schema", wrong).code == 2


def test_shells_complete_configurations_and_keys() -> None:
    assert options.completions("llama2-7b") == ["llama2-7b"]
    assert options.completions("train.rank") == ["train.rank="]


def test_eval_of_a_checkpoint_alone(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_run = parse(models=["run/merged"])
    assert (of_run.config, of_run.notice) == (parse(["run"]).config, None)
    alone = parse(models=["owner/Some-8B"], tasks="zeroshot,ppl")
    assert (alone.config.run.dir, alone.config.model.path) == ("runs/Some-8B", "owner/Some-8B")
    assert alone.notice is not None
    assert "perplexity on wikitext2, zeroshot; results are in runs/Some-8B/eval" in alone.notice
    assert parse(models=["owner/Some-8B"], output="mine").config.run.dir == "mine"
    assert parse(models=["merged"]).config == load_config("quickstart")


# --- errors -----------------------------------------------------------------------------------------------------------


def test_debug_shows_the_traceback(command: Command) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        command("config", "nowhere.yaml", "--debug")


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (ZeroDivisionError("a\nb"), 1, r"error: ZeroDivisionError: a \(--debug shows where\)\n"),
        (KeyboardInterrupt(), 130, r"interrupted; the same command continues or starts the stage again\n"),
    ],
    ids=["an error nobody expected", "Ctrl-C"],
)
def test_any_other_end_is_one_line(
    error: BaseException, code: int, printed: str, command: Command, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(pipeline, "preflight", fail)
    outcome = command("prune", str(config_file))
    assert outcome.code == code
    assert re.fullmatch(printed, outcome.err.strip("\n") + "\n")


def test_quiet_prints_warnings_alone_and_the_log_has_everything(command: Command, here: Path) -> None:
    options = ["tiny.yaml", "train.max_steps=2", "--method", "ste", "train.rank=3"]
    shutil.rmtree(here / "run" / "adapter")
    outcome = command("train", *options, "--quiet")
    assert outcome.code == 0, outcome.err
    assert outcome.err.splitlines() == ["warning: train.rank: no effect with train.method=ste"]
    log = (here / "run" / "sppctl.log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in log)
    messages = [line[20:] for line in log]
    for message in (outcome.err.strip(), "training: 0/2", r"train: done in .* s \(run/adapter\)"):
        assert any(re.fullmatch(message, line) or message == line for line in messages), (message, log)
    assert [line for line in messages if line.startswith("$ sppctl train tiny.yaml ")]
    refused = command("train", "tiny.yaml", "train.lr=7")
    assert refused.code == 2
    assert refused.err.splitlines()[-1] in (here / "run" / "sppctl.log").read_text()


def test_quiet_and_verbose_exclude_each_other(command: Command, config_file: Path) -> None:
    outcome = command("train", str(config_file), "--quiet", "--verbose")
    assert (outcome.code, outcome.err) == (2, "error: --quiet: contradicts --verbose; use one of them\n")


def test_two_commands_do_not_share_a_run_directory(command: Command, here: Path) -> None:
    hold = "import fcntl, sys; file = open('run/.lock'); fcntl.flock(file, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"\n"
        outcome = command("merge", "tiny.yaml")
        holder.communicate(b"\n")
    assert outcome.code == 2
    assert "run: another sppctl command is working in this directory; wait for it" in outcome.err
    assert command("merge", "tiny.yaml").code == 0


# --- the pipeline -----------------------------------------------------------------------------------------------------


def test_run_makes_every_artefact_from_one_file(command: Command, config_file: Path, tmp_path: Path) -> None:
    outcome = command("run", str(config_file))
    assert outcome.code == 0
    directory = tmp_path / "run"
    for name in (*WEIGHTS, "resolved.yaml", "report.md", "report.csv", "report.json", "report.html", "pruning.svg"):
        assert (directory / name).is_file(), name
    for name in ("pruned", "adapter", "merged"):
        assert (directory / name / "stage.json").is_file()
    assert {path.name for path in (directory / "eval").iterdir()} == {"base.json", "pruned.json", "merged.json"}
    assert not [path.name for path in directory.iterdir() if "partial" in path.name or ".old" in path.name]
    assert load_config(str(directory / "resolved.yaml")) == load_config(str(config_file))
    assert "2:4" in outcome.out
    assert "prune: done" in outcome.err
    assert "prune: done" not in outcome.out


@pytest.mark.parametrize(
    "override", ["", "model.device=auto", "train.micro_batch_size=2", "train.log_steps=1", "launch.strategy=fsdp"]
)
def test_nothing_is_redone_unless_a_key_changes_results(override: str, command: Command, here: Path) -> None:
    before = times(here / "run")
    outcome = command("run", "tiny.yaml", *override.split())
    assert outcome.code == 0
    for what in ("prune", "train", "merge", "eval base", "eval pruned", "eval merged"):
        assert f"{what}: up to date" in outcome.err
    assert "done, loss" not in outcome.err
    assert times(here / "run") == before


def test_a_measurement_with_another_configuration_leaves_the_stages_alone(command: Command, here: Path) -> None:
    resolved = (here / "run/resolved.yaml").read_text()
    assert command("report", "run").code == 0
    before = json.loads((here / "run/report.json").read_text())
    changed = "prune.pattern=4:8", "train.rank=2", "eval.max_tokens=128"
    assert command("eval", "tiny.yaml", *changed, "--model=merged").code == 0
    assert (here / "run/resolved.yaml").read_text() == resolved
    assert command("report", "run").code == 0
    after = json.loads((here / "run/report.json").read_text())
    assert [after[key] for key in ("config", "stages")] == [before[key] for key in ("config", "stages")]
    assert [row["pattern"] for row in after["table"]] == ["dense", "2:4", "2:4"]
    assert load_config("tiny.yaml").train.rank == parse_yaml(after["config"], "")["train"]["rank"]


def test_force_redoes_every_stage_or_the_one_it_is_given_to(command: Command, here: Path) -> None:
    before = times(here / "run")
    assert command("merge", "tiny.yaml", "--force").code == 0
    merged = times(here / "run")
    assert merged[:2] == before[:2]
    assert merged[2] != before[2]
    outcome = command("run", "tiny.yaml", "prune.pattern=4:8", "--force")
    assert outcome.code == 0
    assert "up to date" not in outcome.err
    assert all(new != old for new, old in zip(times(here / "run"), merged, strict=True))
    assert str(load_config("run/resolved.yaml").prune.pattern) == "4:8"
    assert "| 4:8 | 4:8 |" in (here / "run/report.md").read_text()


def test_stages_one_by_one_make_what_run_makes(command: Command, here: Path) -> None:
    printed, next_command = "", ["prune", "tiny.yaml", "--output", "steps"]
    for stage in DIRECTORIES:
        assert next_command[0] == stage
        outcome = command(*next_command)
        assert outcome.code == 0
        printed += outcome.out
        next_command = shlex.split(outcome.err.splitlines()[-1])[2:]  # next: sppctl ...
    assert next_command == ["eval", "tiny.yaml", "run.dir=steps"]
    assert re.search(r"^prune: wanda 2:4, 14 matrices, mean relative output error [\d.]+, \d+ s\ntrain: spp, ", printed)
    for name in WEIGHTS:
        assert (here / "steps" / name).read_bytes() == (here / "run" / name).read_bytes(), name


def test_a_training_that_changes_no_weight_is_no_silent_success(command: Command, here: Path) -> None:
    weak = ("run", "--force", "train.lr=1e-12", "train.max_steps=2")
    assert command("train", *weak).code == 0
    outcome = command("merge", *weak)
    text = "none of the kept weights moved: merged equals pruned (train.lr=1e-12, steps: 2, dtype: float32)"
    assert outcome.code == 0
    assert f"warning: merge: {text}; use a higher train.lr or more steps" in outcome.err
    assert "merged equals pruned" in (here / "run/merged/README.md").read_text()


def test_a_run_directory_is_a_configuration(command: Command, here: Path) -> None:
    changed = ["--method", "magnitude", "--pattern", "4:8", "--output", "my runs/one", "train.max_steps=2"]
    pruned = command("prune", "tiny.yaml", *changed)
    assert pruned.err.splitlines()[-1] == (
        "next: sppctl train tiny.yaml train.max_steps=2 prune.method=magnitude prune.pattern=4:8 'run.dir=my runs/one'"
    )
    for stage in ("train", "merge"):
        assert command(stage, "my runs/one").code == 0
    assert command("merge", "my runs/one").err.splitlines()[-1] == "next: sppctl eval 'my runs/one'"
    assert records.read(here / "my runs/one/adapter/stage.json", "train").metrics.steps == 2
    assert command("eval", "my runs/one").code == 0
    assert "up to date" in command("prune", "my runs/one").err
    assert command("inspect", "my runs/one/merged", "--expect", "4:8").code == 0


def test_a_stage_that_is_missing_is_named_with_the_command_that_makes_it(command: Command, here: Path) -> None:
    refused = command("merge", "tiny.yaml", "--output", "new")
    assert refused.code == 2
    assert "new/pruned does not exist; run sppctl prune tiny.yaml run.dir=new first" in refused.err
    refused = command("merge", "run", "--output", "new")
    copied = "mkdir -p new && cp -r run/pruned new/"
    again = "or make it again (sppctl prune run run.dir=new)"
    assert refused.err == f"error: new/pruned does not exist; copy that of run ({copied}), {again}\n"
    subprocess.run(copied, shell=True, check=True)
    refused = command("merge", "run", "--output", "new")
    assert (
        "new/adapter does not exist; copy that of run (mkdir -p new && cp -r run/adapter new/), or make it again"
        in refused.err
    )
    shutil.rmtree("new")
    refused = command("eval", "tiny.yaml", "--output", "new", "--model", "merged")
    assert "--model: new/merged does not exist yet; make it: sppctl merge tiny.yaml run.dir=new" in refused.err
    typo = command("eval", "tiny.yaml", "--model", "meregd")
    assert typo.err == "error: --model: meregd is not a checkpoint; did you mean merged?\n"
    a_run = "error: --model: run is a run, not a checkpoint; name one of its checkpoints, such as run/merged\n"
    assert command("eval", "tiny.yaml", "--model", "run").err == a_run


# --- results ----------------------------------------------------------------------------------------------------------


def test_json_of_a_stage_is_its_record(command: Command, here: Path) -> None:
    for stage, folder in DIRECTORIES.items():
        record = command(stage, "tiny.yaml", "--json").json
        assert record == to_json(records.read(here / "run" / folder / "stage.json", stage))
    assert record["metrics"]["pattern_unchanged"] is True


def test_inspect_certifies_every_checkpoint(command: Command, here: Path, llama: Path) -> None:
    sparse = "14 of 16 matrices are sparse: 50.0000% zeros in them, pattern 2:4"
    for name, expect, sentence in (
        ("run/pruned", ["--expect", "2:4"], sparse),
        ("run/merged", ["--expect", "2:4"], sparse),
        ("run", ["--expect", "4:8"], "14 of 14 sparse matrices match 4:8, which 2:4 implies"),
        (str(llama), [], "dense: none of 16 matrices is sparse"),
    ):
        outcome = command("inspect", name, *expect)
        assert outcome.code == 0
        assert sentence in outcome.out


def test_verify_reads_every_file_and_names_what_is_wrong(command: Command, here: Path) -> None:
    whole = command("verify", "run", "--json")
    assert whole.code == 0
    assert {file["state"] for file in whole.json} == {"ok"}
    found = {f"{file['artefact']}/{file['file']}" for file in whole.json}
    assert found >= {*WEIGHTS, "merged/tokenizer.json", "adapter/adapter_config.json", "eval/base.json"}
    assert "./samples.json" not in found  # tiny.yaml asks for none
    (here / "run/samples.json").write_text("{}")
    (here / "run/merged/tokenizer.json").unlink()
    config = here / "run/adapter/adapter_config.json"
    config.write_text(config.read_text().replace("2.0", "4.0"))
    damaged = command("verify", "run")
    assert damaged.code == 2
    assert "error: run/merged/tokenizer.json is missing; restore it, or sppctl merge run --force" in damaged.err
    assert "error: run/adapter/adapter_config.json is damaged: its content is not what was recorded" in damaged.err
    assert "error: run/samples.json is damaged" in damaged.err
    assert len(damaged.err.splitlines()) == 3
    assert "missing" in damaged.out


def test_inspect_json_is_whole_also_where_the_expectation_fails(command: Command, here: Path) -> None:
    found = command("inspect", "run/merged", "--expect", "2:4", "--json").json
    assert found.keys() == {"summary", "violations", "matrices"}
    assert found["violations"] == []
    assert (found["summary"]["sparsity"], found["summary"]["patterns"]) == (0.5, ["2:4"])
    assert len(found["matrices"]) == found["summary"]["matrices"] == 16
    keys = {"name", "shape", "zeros", "sparsity", "patterns", "along_outputs", "transposed", "listed"}
    assert found["matrices"][0].keys() == keys
    refused = command("inspect", "run/merged", "--expect", "1:4", "--json")
    assert refused.code == 1
    assert len(refused.json["violations"]) == 14
    assert "model.layers.0.mlp.down_proj.weight: not 1:4 (sparsity 0.5000)" in refused.err
    assert "and 11 more" in refused.err


def test_report_is_a_table_of_base_pruned_and_merged(command: Command, here: Path, text_file: Path) -> None:
    figure = (here / "run/pruning.svg").read_bytes()
    for name in ("report.md", "pruning.svg"):
        (here / "run" / name).unlink()
    outcome = command("report", "run")
    assert outcome.code == 0
    assert (here / "run/pruning.svg").read_bytes() == figure
    text = (here / "run/report.md").read_text()
    lines = text.splitlines()
    assert lines[0] == "# run"
    assert "|  | base | pruned | merged |" in lines
    assert "| sparsity of pruned matrices | dense | 50.00% | 50.00% |" in lines
    assert "| pattern | dense | 2:4 | 2:4 |" in lines
    assert f"| ppl {text_file} @64, first 256 tokens | " in text
    assert "- prune: wanda 2:4, 14 matrices, mean relative output error 0." in text
    assert "- train: spp, 2,368 parameters (" in text
    assert "- merge: 14 matrices, all 7,680 zeros kept, " in text
    assert (
        "| module type | matrices | mean sparsity | mean relative output error | worst | worst layer | seconds |"
        in lines
    )
    assert "![relative output error by block](pruning.svg)" in lines
    assert "all 7,680 zeros kept" in outcome.out


def test_report_json_collects_several_runs(command: Command, here: Path) -> None:
    shutil.copytree("run", "again")
    runs = command("report", "run", "again", "--json").json
    assert [found["run"] for found in runs] == ["run", "again"]
    for found in runs:
        assert found.keys() >= {"run", "stages", "checkpoints"}
        assert list(found["stages"]) == ["prune", "train", "merge"]
        assert list(found["checkpoints"]) == ["base", "pruned", "merged"]
        assert all(content.keys() >= RESULTS for content in found["checkpoints"].values())
    assert json.loads((here / "again/report.json").read_text()) == runs[1]
    assert command("run", "tiny.yaml", "--json").json == [json.loads((here / "run/report.json").read_text())]


def test_report_goes_where_it_is_told(command: Command, here: Path) -> None:
    outcome = command("report", "run", "--output", "there", "--latex", "table.tex")
    assert outcome.code == 0
    assert "report: there/report.html" in outcome.err
    files = {"report.md", "report.csv", "report.json", "report.html", "pruning.svg"}
    assert {path.name for path in (here / "there").iterdir()} == files
    assert r"\toprule" in (here / "table.tex").read_text()
    # windows are recorded, so that checkpoints can be compared on each of them
    assert "| pruned to merged | " in (here / "there/report.md").read_text()


# --- eval -------------------------------------------------------------------------------------------------------------


def test_eval_measures_the_newest_artefact_and_says_which(command: Command, here: Path) -> None:
    assert "eval: merged, run/merged" in command("eval", "tiny.yaml").err
    shutil.rmtree("run/merged")
    assert "eval: pruned, run/pruned" in command("eval", "tiny.yaml").err
    shutil.rmtree("run/pruned")
    assert "eval: base, " in command("eval", "tiny.yaml").err


def test_eval_adds_to_the_results_of_a_checkpoint_and_measures_nothing_twice(
    command: Command, here: Path, text_file: Path
) -> None:
    (here / "other.txt").write_text("Another text, long enough for a window of it. " * 4)
    path = here / "run/eval/merged.json"
    before = json.loads(path.read_text())["results"]
    content = command("eval", "tiny.yaml", "eval.perplexity=[other.txt]", "--json").json
    assert content.keys() >= RESULTS
    assert content == sealed.parse(path.read_text())
    assert content["label"] == "merged"
    assert [result["settings"]["text"] for result in content["results"]] == [str(text_file), "other.txt"]
    assert content["results"][:1] == before
    assert before[0].keys() >= {"settings", "metrics", "seconds", "dtype", "device", "versions"}
    assert (before[0]["settings"]["seq_len"], before[0]["metrics"]["tokens"]) == (64, 4 * 63)
    measured = path.read_bytes()
    outcome = command("eval", "tiny.yaml")
    assert "eval merged: up to date (run/eval/merged.json)" in outcome.err
    assert path.read_bytes() == measured
    assert "ppl " in outcome.out


def test_eval_of_other_weights_starts_anew(command: Command, here: Path) -> None:
    assert command("train", "tiny.yaml", "train.lr=1e-3", "--force").code == 0
    assert command("merge", "tiny.yaml", "train.lr=1e-3", "--force").code == 0
    before = json.loads((here / "run/eval/merged.json").read_text())
    after = command("eval", "tiny.yaml", "--json").json
    assert after["fingerprint"] != before["fingerprint"]
    assert len(after["results"]) == 1


def test_eval_of_any_other_checkpoint_has_a_file_of_its_own(command: Command, here: Path) -> None:
    assert command("eval", "tiny.yaml", "--model", "run/pruned", "--json").json["label"] == "pruned"
    shutil.copytree("run/merged", "elsewhere")
    content = command("eval", "tiny.yaml", "--model", "elsewhere", "--json").json
    assert content["label"] == "elsewhere"
    assert (here / "run/eval/elsewhere.json").is_file()
    merged = json.loads((here / "run/eval/merged.json").read_text())
    here_too, there = (found["results"][0]["metrics"] for found in (content, merged))
    assert here_too["nll"] == there["nll"]
    # compared with the run's dense model is what belongs to the run
    assert (here_too["kl"], there["kl"] > 0) == (None, True)


def test_what_was_moved_aside_comes_back_if_nothing_took_its_place(command: Command, here: Path) -> None:
    weights = (here / "run/pruned/model.safetensors").read_bytes()
    (here / "run/pruned").rename(here / "run/.pruned.old")
    assert command("eval", "tiny.yaml").code == 0  # any command that works in the run
    assert (here / "run/pruned/model.safetensors").read_bytes() == weights
    assert command("verify", "run").code == 0


def test_a_home_that_the_shell_leaves_to_options(command: Command, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "home").mkdir()
    monkeypatch.setenv("HOME", str(here / "home"))
    (here / "run").rename(here / "home/run")
    assert command("report", "~/run", "--output=~/reports", "--latex=~/table.tex").code == 0
    assert command("verify", "~/run").code == 0
    (here / "tiny.yaml").rename(here / "home/tiny.yaml")
    assert command("config", "~/tiny.yaml").code == 0
    assert {"reports", "table.tex"} <= {path.name for path in (here / "home").iterdir()}
    assert not (here / "~").exists()


def test_eval_of_several_and_of_the_adapter_that_is_not_merged(command: Command, here: Path) -> None:
    found = command("eval", "tiny.yaml", "--model", "adapter", "--model", "pruned", "--model", "base", "--json").json
    assert list(found) == ["adapter", "pruned", "base"]
    merged = json.loads((here / "run/eval/merged.json").read_text())
    values = {label: one["results"][0]["metrics"] for label, one in found.items()}
    assert values["adapter"]["nll"] == merged["results"][0]["metrics"]["nll"]
    assert values["adapter"]["kl"] == merged["results"][0]["metrics"]["kl"]
    assert values["pruned"]["kl"] > 0
    assert values["base"]["kl"] is None
