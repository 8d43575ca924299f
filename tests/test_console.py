"""Progress: something is on the screen before the first step, and steps without a count are named."""

from __future__ import annotations

import io
import os
import pty
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from sppctl import cli, console


def on_a_terminal(action: Callable[[], None], monkeypatch: pytest.MonkeyPatch, columns: int = 100) -> str:
    """What an action writes to stderr where that is a terminal of so many columns."""
    reader, writer = pty.openpty()
    written: list[bytes] = []

    def read() -> None:
        while True:
            try:
                piece = os.read(reader, 65536)
            except OSError:  # the terminal is closed
                return
            if not piece:
                return
            written.append(piece)

    thread = threading.Thread(target=read)
    thread.start()
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        action()
        monkeypatch.undo()
    thread.join()
    os.close(reader)
    return b"".join(written).decode()


@pytest.mark.parametrize("done", [0, 12])
def test_a_bar_is_there_before_the_first_step(done: int, capsys: pytest.CaptureFixture[str]) -> None:
    with console.Progress("training", 37, start=done):
        assert capsys.readouterr().err == f"training: {done}/37\n"


def test_a_terminal_shows_the_bar_before_and_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def steps() -> None:
        with console.Progress("training", 37) as bar:
            bar._bar.refresh()
            bar.advance("loss 4.701")
            bar._bar.refresh()

    shown = on_a_terminal(steps, monkeypatch)
    assert shown.index("0/37") < shown.index("1/37")
    assert "loss 4.701" in shown


def test_a_narrow_terminal_keeps_steps_rate_and_time_and_shortens_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def steps() -> None:
        with console.Progress("pruning sparsegpt 2:4, 4:8 in 12 matrices", 1210) as bar:
            bar._started -= 60
            bar.advance("model.layers.12.self_attn.q_proj error 0.123", steps=10)
            bar._bar.refresh()

    last = re.split(r"\r|\n", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", on_a_terminal(steps, monkeypatch, 80)).rstrip())[-1]
    assert len(last.rstrip()) <= 80
    assert all(words in last for words in ("pruning spa", "10/1210", "6.0 s/step", "2:00:0", " left", "error 0.123"))
    assert "model.layers" not in last


@pytest.mark.parametrize(
    ("room", "shown"),
    [
        (99, ("training", "loss 2.531")),
        (14, ("training", "…2.531")),
        (26, ("training", "loss 2.531")),
        (8, ("training", "")),
        (4, ("tra…", "")),
        (0, ("…", "")),
    ],
)
def test_a_message_is_shortened_before_a_label(room: int, shown: tuple[str, str]) -> None:
    assert console.fitted("training", "loss 2.531", room) == shown


def test_an_interruption_is_reported_on_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped() -> None:
        raise KeyboardInterrupt

    app = typer.Typer()
    app.command()(stopped)

    def interrupted() -> None:
        monkeypatch.setattr(cli, "app", lambda: app([]))
        with pytest.raises(SystemExit):
            cli.main()

    assert on_a_terminal(interrupted, monkeypatch).startswith("\r\ninterrupted; ")


def test_a_long_step_without_a_count_is_named_even_where_it_silences_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with console.working("loading model"):
        pass
    assert capsys.readouterr().err == ""  # it was short
    monkeypatch.setattr(console, "SILENT_SECONDS", 0.01)
    named = threading.Event()
    original = console.note
    monkeypatch.setattr(console, "note", lambda *arguments: (original(*arguments), named.set()))
    with console.working("loading model"):
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        assert named.wait(10)
        monkeypatch.undo()
    assert capsys.readouterr().err == "loading model\n"


def test_a_terminal_names_a_step_without_a_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def step() -> None:
        with console.working("loading [red]model"):
            pass

    assert "loading [red]model" in on_a_terminal(step, monkeypatch)


def test_suggested_commands_have_the_configuration_of_the_run_they_are_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    console.remember("my runs/one", ["own.yaml", "run.dir=my runs/one"])
    assert console.command("train", run=tmp_path / "my runs/one") == "sppctl train own.yaml 'run.dir=my runs/one'"
    assert console.command("train", "--force", run="other") == "sppctl train other --force"
    console.remember(None)
    assert console.command("train", run="my runs/one") == "sppctl train 'my runs/one'"


def test_a_log_has_every_message_with_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "_log", console._Log())
    console.note("before the run directory is known")
    console.log_to(tmp_path / "sppctl.log")
    console.log("$ sppctl train")
    monkeypatch.setattr(console, "verbosity", console.Verbosity.QUIET)
    console.note("one\ntwo \x1b[31m")
    console.warn("three")
    with console.Progress("training", 2) as bar:
        bar.advance("loss 4.7", steps=2)
    assert capsys.readouterr().err == "before the run directory is known\nwarning: three\n"
    lines = [line[len("2026-11-29 12:00:00 ") :] for line in (tmp_path / "sppctl.log").read_text().splitlines()]
    assert lines[0] == "before the run directory is known"
    assert lines[1:6] == ["$ sppctl train", "one", "two \\x1b[31m", "warning: three", "training: 0/2"]
    assert re.fullmatch(r"training: 2/2, 0 s, done, loss 4\.7", lines[6])


def test_a_bar_leaves_lines_in_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_log", console._Log())
    console.log_to(tmp_path / "sppctl.log")

    def steps() -> None:
        with console.Progress("training", 1) as bar:
            bar.advance("loss 4.7")

    assert "loss 4.7" in on_a_terminal(steps, monkeypatch)
    assert "training: 1/1, 0 s, done, loss 4.7\n" in (tmp_path / "sppctl.log").read_text()


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_log", console._Log())
    console.log_to(tmp_path / "nowhere" / "sppctl.log")
    console.note("anything")
