from __future__ import annotations

import dataclasses
import io
import itertools
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_up_runs import stage_of, study_of, task, text, write_run

from sppctl.evaluate.results import TextResult
from sppctl.report import plots_results
from sppctl.report.document import chapter
from sppctl.report.html import to_html
from sppctl.report.study import Row, RunStudy, Study
from sppctl.run import pipeline

BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
VOID = {"meta", "link", "br", "img", "hr", "input"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs and the report over both."""
    root = tmp_path_factory.mktemp("runs")
    pipeline.report([write_run(root / "one"), write_run(root / "two", pattern="4:8", training="masked_full", seed=1)])
    return root


class Checked(HTMLParser):
    """Reads a page strictly: every element is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


# --- the page as text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["report.html", "one/report.html"])
def test_the_page_is_whole_and_refers_to_nothing_outside(runs: Path, name: str) -> None:
    text = (runs / name).read_text()
    tags = Checked(text).tags
    assert not {"script", "img", "iframe", "object", "embed", "image"} & {tag for tag, _ in tags}
    for tag, attributes in tags:
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in ("src", "href", "xlink:href", "srcset", "action"):
                assert value is not None
                assert value.startswith("#") or (tag, value) == ("link", "data:,")
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert "@import" not in text
    identities = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(identities) == len(set(identities))
    wanted = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    assert wanted <= set(identities)


@pytest.mark.parametrize(("name", "figures"), [("one/report.html", 5), ("report.html", 1 + 2 * 5)])
def test_every_figure_is_well_formed_and_has_a_size_and_a_name(runs: Path, name: str, figures: int) -> None:
    drawn = re.findall(r"<svg .*?</svg>", (runs / name).read_text(), re.DOTALL)
    assert len(drawn) == figures
    for figure in drawn:
        element = ET.fromstring(figure)
        assert all(float(str(element.get(key)).removesuffix("pt")) > 50 for key in ("width", "height"))
        assert element.get("aria-label")
        assert sum(1 for _ in element.iter("{http://www.w3.org/2000/svg}path")) > 10
        assert not list(element.iter("{http://www.w3.org/2000/svg}text"))  # letters are paths


def test_signs_of_html_are_text(runs: Path) -> None:
    text = (runs / "one/report.html").read_text()
    assert "# &lt;b&gt; &amp; other signs" in text
    assert "<b>" not in text


def test_the_page_says_what_was_measured_and_how_it_was_made(runs: Path) -> None:
    text = (runs / "one/report.html").read_text()
    for words in (
        "Paired bootstrap",
        "Flipped answers",
        "sppctl train run.dir=one",
        "0123456789abcdef",
        "55.97",
        "+46.40",
    ):
        assert words in text
    assert "<details><summary>Configuration" in text
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings[:4] == ["Results", "Distance to the dense model", "On the same samples", "Flipped answers"]
    assert headings[4:] == ["Training", "Pruning", "Time and size", "How it was made"]


@pytest.mark.parametrize("name", ["report.html", "one/report.html"])
def test_headings_skip_no_level(runs: Path, name: str) -> None:
    levels = [int(level) for level in re.findall(r"<h(\d)", (runs / name).read_text())]
    assert levels[0] == 1
    assert all(later <= before + 1 for before, later in itertools.pairwise(levels))


def test_the_same_records_give_the_same_page(runs: Path) -> None:
    one = RunStudy.of(runs / "one")
    assert to_html(chapter(one)) == to_html(chapter(one)) == (runs / "one/report.html").read_text()


@pytest.mark.parametrize("gone", [["eval"], ["adapter", "merged"], ["pruned"], ["eval", "adapter", "merged"]])
def test_a_page_of_a_run_in_parts(gone: list[str], tmp_path: Path) -> None:
    one = write_run(tmp_path / "one")
    for name in gone:
        shutil.rmtree(one / name)
    page = to_html(chapter(RunStudy.of(one)))
    Checked(page)
    assert ("No checkpoint of this run has been measured yet" in page) == ("eval" in gone)
    assert ("<h2>Training</h2>" in page) == ("adapter" not in gone)
    assert ("<h2>Pruning</h2>" in page) == ("pruned" not in gone)


# --- what is drawn ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(runs: Path) -> list[Row]:
    return RunStudy.of(runs / "one").rows


def names(axes: Any) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def written(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_a_bar_for_each_perplexity_with_its_number(rows: list[Row]) -> None:
    perplexity, divergence = plots_results.bars(rows).axes
    assert names(perplexity) == ["base", "pruned", "merged"]
    widths = [bar.get_width() for bar in perplexity.patches]  # type: ignore[attr-defined]
    assert written(perplexity) == [f"{width:.2f}" for width in widths]
    assert written(perplexity)[:2] == ["9.57", "55.97"]
    assert names(divergence) == ["pruned", "merged"]
    assert len({(bar.get_facecolor(), bar.get_hatch()) for bar in perplexity.patches}) == 3


def compared(value: float, kl: float | None = None) -> list[TextResult]:
    return [text(value, kl=kl, top1_agreement=0.5)]


def test_perplexities_far_apart_have_a_logarithmic_axis_that_says_so() -> None:
    axes = plots_results.bars(study_of(base=compared(9.0), pruned=compared(9000.0)).rows).axes[0]
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "perplexity, lower is better, logarithmic axis"


def test_a_perplexity_that_is_infinite_is_not_drawn() -> None:
    found = study_of(base=compared(9.0), pruned=compared(float("inf")), merged=compared(10.0))
    assert names(plots_results.bars(found.rows).axes[0]) == ["base", "merged"]


@pytest.mark.parametrize(
    ("values", "numbers"), [((1.8, 0.52), ["1.80", "0.52"]), ((1.8, 0.00123), ["1.8000", "0.0012"])]
)
def test_divergences_of_a_panel_have_equal_decimals(values: tuple[float, float], numbers: list[str]) -> None:
    found = study_of(pruned=compared(9.0, values[0]), merged=compared(9.0, values[1]))
    axes = plots_results.bars(found.rows).axes[1]
    assert written(axes) == numbers
    assert axes.get_xlabel() == "nats per token, lower is better"


def test_bars_of_several_runs_say_how_they_were_made(runs: Path) -> None:
    found = Study.of([runs / "one", runs / "two"])
    assert names(plots_results.bars(found.rows).axes[0]) == [
        "base dense (one)",
        "pruned wanda 2:4 seed 0",
        "merged wanda 2:4 spp seed 0",
        "base dense (two)",
        "pruned wanda 4:8 seed 1",
        "merged wanda 4:8 masked_full seed 1",
    ]


def test_long_titles_and_labels_stay_inside(rows: list[Row]) -> None:
    name = "/a/long/way/to/the/text/that/was/read.txt"
    own = {row.checkpoint: [text(5.0, name=name, kl=0.5)] for row in rows}
    other = study_of(1, **own)
    figure = plots_results.bars(Study([study_of(**own), dataclasses.replace(other, directory="runs/other")]).rows)
    figure.savefig(io.BytesIO())
    for axes in figure.axes:
        assert axes.get_title(loc="left").replace("\n", "").replace(" ", "").count("/a/long/way") == 1
        assert axes._left_title.get_window_extent().x1 <= figure.bbox.width  # type: ignore[attr-defined]


def many(rows: list[Row], labels: list[str]) -> list[Row]:
    """The rows of a run beside further checkpoints."""
    return [*rows, *(dataclasses.replace(rows[-1], checkpoint=label) for label in labels)]


@pytest.mark.parametrize("number", [0, 2, 6, 20])
def test_the_legend_of_accuracies_is_inside_and_no_two_checkpoints_look_alike(rows: list[Row], number: int) -> None:
    found = many(rows, [f"a-checkpoint-from-elsewhere-{index}" for index in range(number)])
    figure = plots_results.dots(found)
    figure.savefig(io.BytesIO())  # lays it out
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    assert box.y1 <= figure.bbox.height
    markers = [container[0] for container in figure.axes[0].containers]
    looks = {(line.get_marker(), line.get_color()) for line in markers}  # type: ignore[union-attr]
    assert len(looks) == len(found) == len(legend.get_texts()) == 3 + number


def test_whiskers_of_accuracies_are_their_standard_errors() -> None:
    axes = plots_results.dots(study_of(pruned=[task(0.485), task(0.5, "boolq")]).rows).axes[0]
    assert names(axes) == ["rte", "boolq"]
    ends = [line[:, 0] for line in axes.containers[0][2][0].get_segments()]  # type: ignore[index]
    assert ends[0] == pytest.approx([48.5 - 3, 48.5 + 3])


def test_bars_fill_their_panel_however_many_there_are(rows: list[Row]) -> None:
    axes = plots_results.bars(many(rows, [str(index) for index in range(40)])).axes[0]
    assert axes.get_ylim() == pytest.approx((43 - 0.4, -0.6))


def curves(history: list[dict[str, Any]], steps: int, last: float | None) -> dict[str, list[tuple[int, float]]]:
    trained = stage_of("train", {"history": history, "steps": steps, "validation_loss": last})
    return plots_results.loss_curves(trained.metrics)


def test_the_numbers_at_the_ends_of_losses_stand_clear_of_the_axis() -> None:
    history = [{"loss": 4.6 - 0.06 * step, "step": step} for step in range(1, 36)]
    figure = plots_results.losses(curves(history, 37, 2.51))
    figure.savefig(io.BytesIO())
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts]
    assert all(box.y0 > axes.bbox.y0 for box in boxes)
    assert not boxes[0].overlaps(boxes[1])


def test_losses_of_a_training() -> None:
    history: list[dict[str, Any]] = [{"loss": 3.0, "step": 1}, {"loss": 2.0, "step": 5}, {"eval_loss": 2.5, "step": 5}]
    drawn = curves(history, 10, 2.25)
    assert drawn == {"training": [(1, 3.0), (5, 2.0)], "validation": [(5, 2.5), (10, 2.25)]}
    (axes,) = plots_results.losses(drawn).axes
    assert [list(line.get_xdata()) for line in axes.lines] == [[1, 5], [5, 10]]
    assert [text.get_text() for text in axes.texts] == ["2.000", "2.250"]
    assert len({(line.get_marker(), line.get_linestyle()) for line in axes.lines}) == 2


def test_a_training_that_logged_nothing_has_no_figure() -> None:
    assert curves([], 10, None) == {}
    assert curves([], 10, 2.5) == {"validation": [(10, 2.5)]}


def test_perplexities_of_a_training_are_a_panel_of_their_own() -> None:
    drawn = curves([{"loss": 3.0, "step": 1}, {"perplexity": 40.0, "step": 1}], 1, None)
    assert [axes.get_ylabel() for axes in plots_results.losses(drawn).axes] == ["loss (nats per token)", "perplexity"]


# --- the page in a browser --------------------------------------------------------------------------------------------


# nothing that the browser does for itself, and no network whatever a page asks for
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
QUIET += ["--disable-sync", "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr"]


def opened(path: Path, folder: Path) -> tuple[list[str], set[str], bytes]:
    """Lines that a browser wrote to its console, addresses that the page asked for, and a picture of it."""
    command = [str(BROWSER), *QUIET, f"--user-data-dir={folder / 'profile'}", "--window-size=1200,1600"]
    command += [f"--log-net-log={folder / 'net.json'}", f"--screenshot={folder / 'page.png'}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    events = [event.get("params", {}) for event in json.loads((folder / "net.json").read_text())["events"]]
    return console, addresses_of(events), (folder / "page.png").read_bytes()


def addresses_of(events: list[dict[str, Any]]) -> set[str]:
    """Addresses in a browser's log of its network; its own requests, for updates and the like, come from no page."""
    started = [event for event in events if "url" in event and "initiator" in event]
    return {event["url"] for event in started if event["initiator"] != "not an origin"}


def test_what_the_browser_asks_for_itself_is_not_the_pages() -> None:
    update = {"url": "https://update.googleapis.com/", "initiator": "not an origin"}
    ours = {"url": "https://example.org/", "initiator": None}
    assert addresses_of([update, ours, {"url": "https://update.googleapis.com/"}, {}]) == {"https://example.org/"}


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("name", ["report.html", "one/report.html"])
def test_a_browser_opens_the_page_in_silence(runs: Path, name: str, tmp_path: Path) -> None:
    console, addresses, picture = opened(runs / name, tmp_path)
    assert console == []
    assert addresses == set()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 50_000  # a page of tables and figures; an empty one has a few thousand bytes


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_the_browser_would_tell(tmp_path: Path) -> None:
    """What the test above rests on: a page that does what ours must not is noticed."""
    bad = tmp_path / "bad.html"
    outside = {"http://127.0.0.1:9/x.png", "https://example.org/y.png"}
    pictures = "".join(f'<img src="{address}">' for address in sorted(outside))
    bad.write_text(f'{pictures}<script>console.error("oh no")</script>')
    console, addresses, picture = opened(bad, tmp_path)
    assert any("oh no" in line for line in console)
    assert addresses == outside
    assert len(picture) < 50_000
