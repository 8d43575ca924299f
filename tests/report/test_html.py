from __future__ import annotations

import html
import io
import itertools
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_up_runs import stage_of, study_of, task, text, write_run

from sppctl.evaluate.values import Kind
from sppctl.report import plots_results
from sppctl.report.document import chapter
from sppctl.report.html import to_html
from sppctl.report.study import Row, RunStudy, Study
from sppctl.run import pipeline

BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
VOID = {"meta", "link", "br", "img", "hr", "input"}
PAGES = pytest.mark.parametrize("name", ["report.html", "one/report.html"])


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
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


# --- the page as text -------------------------------------------------------------------------------------------------


@PAGES
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
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(identities)
    levels = [int(level) for level in re.findall(r"<h(\d)", text)]
    assert levels[0] == 1
    assert all(later <= before + 1 for before, later in itertools.pairwise(levels))  # none is skipped


@pytest.mark.parametrize(("name", "figures"), [("one/report.html", 8), ("report.html", 3 + 2 * 8)])
def test_every_figure_is_well_formed_and_has_a_size_and_a_name(runs: Path, name: str, figures: int) -> None:
    drawn = re.findall(r"<svg .*?</svg>", (runs / name).read_text(), re.DOTALL)
    assert len(drawn) == figures
    for figure in drawn:
        element = ET.fromstring(figure)
        assert all(float(str(element.get(key)).removesuffix("pt")) > 50 for key in ("width", "height"))
        assert re.search(r"\. .*\d", str(element.get("aria-label")))  # the caption, then numbers
        assert sum(1 for _ in element.iter("{http://www.w3.org/2000/svg}path")) > 10
        words = "".join("".join(node.itertext()) for node in element.iter("{http://www.w3.org/2000/svg}text"))
        assert re.search(r"\d.*[a-z]", words)  # letters are text
        assert not re.search("#000000|#ffffff", figure)  # these are the page's, which may be dark


def test_the_page_says_what_was_measured_and_how_it_was_made(runs: Path) -> None:
    text = (runs / "one/report.html").read_text()
    one = RunStudy.of(runs / "one")
    assert to_html(chapter(one)) == to_html(chapter(one)) == text
    facts = ("Paired bootstrap", "Flipped answers", "sppctl train run.dir=one", "0123456789abcdef", "55.97", "+46.40")
    assert all(fact in text for fact in (*facts, "<details><summary>Configuration", "# &lt;b&gt; &amp; other signs"))
    assert "<b>" not in text
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings[:4] == ["Results", "Distance to the dense model", "On the same samples", "Flipped answers"]
    assert headings[4:] == ["Training", "Pruning", "Time and size", "How it was made"]


@pytest.mark.parametrize(
    "gone", ["eval", "adapter merged", "pruned", "eval adapter merged", "eval/base.json", "adapter"]
)
def test_a_run_in_parts_has_a_report(gone: str, tmp_path: Path) -> None:
    one = write_run(tmp_path / "one")
    (one / "resolved.yaml").unlink()
    for path in (one / name for name in gone.split()):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    pipeline.report([one])
    page = (one / "report.html").read_text()
    Checked(page)
    assert "None" not in page + (one / "report.md").read_text()
    assert ("No checkpoint of this run has been measured yet" in page) == (gone.split()[0] == "eval")
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


def bars(**perplexities: float) -> Any:
    rows = study_of(**{label: [text(value)] for label, value in perplexities.items()}).rows
    return plots_results.bars(rows, Kind.PERPLEXITY).axes[0]


def test_a_bar_for_each_perplexity_with_its_number(rows: list[Row]) -> None:
    (perplexity,), (divergence,) = (plots_results.bars(rows, kind).axes for kind in (Kind.PERPLEXITY, Kind.DIVERGENCE))
    assert names(perplexity) == ["base", "pruned", "merged"]
    widths = [bar.get_width() for bar in perplexity.patches]  # type: ignore[attr-defined]
    assert written(perplexity) == [f"{width:.2f}" for width in widths]
    assert written(perplexity)[:2] == ["9.57", "55.97"]
    assert names(divergence) == ["pruned", "merged"]
    assert len({(bar.get_facecolor(), bar.get_hatch()) for bar in perplexity.patches}) == 3


def test_perplexities_far_apart_have_a_logarithmic_axis_and_infinite_ones_are_not_drawn() -> None:
    axes = bars(base=9.0, pruned=9000.0)
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "perplexity, logarithmic axis"
    assert names(bars(base=9.0, pruned=float("inf"), merged=10.0)) == ["base", "merged"]


@pytest.mark.parametrize(
    ("values", "numbers"), [((1.8, 0.52), ["1.80", "0.52"]), ((1.8, 0.00123), ["1.8000", "0.0012"])]
)
def test_divergences_of_a_panel_have_equal_decimals(values: tuple[float, float], numbers: list[str]) -> None:
    pruned, merged = ([text(9.0, kl=value, top1_agreement=0.5)] for value in values)
    (axes,) = plots_results.bars(study_of(pruned=pruned, merged=merged).rows, Kind.DIVERGENCE).axes
    assert written(axes) == numbers
    assert axes.get_xlabel() == "nats per token"


def test_what_shows_nothing_is_not_drawn() -> None:
    """Bars of equal length, a single bar, a point that is no curve, checkpoints of the same size."""
    same = {label: [text(5.0)] for label in ("base", "pruned", "merged")}
    run = study_of(**same)
    assert not list(plots_results.result_figures(run.rows))
    assert not list(plots_results.result_figures(study_of(base=[text(5.0), text(6.0, 128)]).rows))
    drawn = list(plots_results.result_figures(study_of(base=[text(5.0)], pruned=[text(6.0)]).rows))
    assert [(one.caption, one.numbers) for one in drawn] == [
        ("Perplexity, lower is better; whiskers: one standard error over windows", "prose @64: base 5.00, pruned 6.00")
    ]
    assert not list(plots_results.loss_figures(stage_of("train", {"steps": 10, "validation_loss": 2.5}).metrics))
    assert not list(plots_results.cost_figures(run))
    times = {"prune": stage_of("prune", wall_time_s=3.0), "merge": stage_of("merge", wall_time_s=2.0)}
    assert [one.numbers for one in plots_results.cost_figures(study_of(stages=times))] == ["prune 3.0 s, merge 2.0 s"]


def test_bars_of_several_runs_say_how_they_were_made(runs: Path) -> None:
    rows = Study.of([runs / "one", runs / "two"]).rows
    (panel,) = plots_results.bar_panels(rows, Kind.PERPLEXITY)
    expected = [
        "base dense (one)",
        "pruned wanda 2:4 seed 0",
        "merged wanda 2:4 spp seed 0",
        "base dense (two)",
        "pruned wanda 4:8 seed 1",
        "merged wanda 4:8 masked_full seed 1",
    ]
    assert panel.names == expected
    (axes,) = plots_results.bars(rows, Kind.PERPLEXITY).axes
    assert [words for words in written(axes) if words in expected] == expected  # above the bars


def test_long_titles_and_labels_stay_inside(rows: list[Row]) -> None:
    name = "/a/long/way/to/the/text/that/was/read.txt"
    own = {row.checkpoint: [text(5.0, name=name, kl=0.5)] for row in rows}
    other = replace(study_of(1, **own | {"base": [text(6.0, name=name)]}), directory="runs/" + "other" * 20)
    figure = plots_results.bars(Study([study_of(**own), other]).rows, Kind.PERPLEXITY)
    figure.savefig(io.BytesIO())
    assert all(words.get_window_extent().x1 <= figure.bbox.width for axes in figure.axes for words in axes.texts)
    for axes in figure.axes:
        assert axes.get_title(loc="left").replace("\n", "").replace(" ", "").count("/a/long/way") == 1
        assert axes._left_title.get_window_extent().x1 <= figure.bbox.width  # type: ignore[attr-defined]


def many(rows: list[Row], number: int) -> list[Row]:
    """The rows of a run beside further checkpoints."""
    return [*rows, *(replace(rows[-1], checkpoint=f"a-checkpoint-from-elsewhere-{index}") for index in range(number))]


@pytest.mark.parametrize("number", [0, 2, 6, 20])
def test_the_legend_of_accuracies_is_inside_and_no_two_checkpoints_look_alike(rows: list[Row], number: int) -> None:
    checkpoints = many(rows, number)
    figure = plots_results.dots(checkpoints, plots_results.dot_groups(checkpoints)["zeroshot, limit 200"])
    figure.savefig(io.BytesIO())  # lays it out
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    assert box.y1 <= figure.bbox.height
    markers = [container[0] for container in figure.axes[0].containers]
    looks = {(line.get_marker(), line.get_color()) for line in markers}  # type: ignore[union-attr]
    assert len(looks) == len(legend.get_texts()) == 3 + number


def test_whiskers_of_accuracies_are_their_standard_errors() -> None:
    rows = study_of(pruned=[task(0.485), task(0.5, "boolq")]).rows
    (axes,) = plots_results.dots(rows, plots_results.dot_groups(rows)[""]).axes
    assert names(axes) == ["rte", "boolq"]
    ends = [line[:, 0] for line in axes.containers[0][2][0].get_segments()]  # type: ignore[index]
    assert ends[0] == pytest.approx([48.5 - 3, 48.5 + 3])


def test_bars_fill_their_panel_however_many_there_are(rows: list[Row]) -> None:
    (axes,) = plots_results.bars(many(rows, 40), Kind.PERPLEXITY).axes
    assert axes.get_ylim() == pytest.approx((43 - 0.4, -0.9))


def curves(
    history: list[dict[str, Any]], steps: int, last: float | None, best: int | None = None
) -> dict[str, list[tuple[int, float]]]:
    trained = stage_of("train", {"history": history, "steps": steps, "validation_loss": last, "best_step": best})
    return plots_results.loss_curves(trained.metrics)


def test_the_numbers_at_the_ends_of_losses_stand_clear_of_the_axis() -> None:
    figure = plots_results.losses(
        curves([{"loss": 4.6 - 0.06 * step, "step": step} for step in range(1, 36)], 37, 2.51)
    )
    figure.savefig(io.BytesIO())
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts]
    assert all(box.y0 > axes.bbox.y0 for box in boxes)
    assert not boxes[0].overlaps(boxes[1])


def test_losses_of_a_training() -> None:
    drawn = curves([{"loss": 3.0, "step": 1}, {"loss": 2.0, "step": 5}, {"eval_loss": 2.5, "step": 5}], 10, 2.25)
    assert drawn == {"training": [(1, 3.0), (5, 2.0)], "validation": [(5, 2.5), (10, 2.25)]}
    (axes,) = plots_results.losses(drawn).axes
    assert [list(line.get_xdata()) for line in axes.lines] == [[1, 5], [5, 10]]
    assert written(axes) == ["2.000", "2.250"]
    assert len({(line.get_marker(), line.get_linestyle()) for line in axes.lines}) == 2
    assert (curves([], 10, None), curves([], 10, 2.5)) == ({}, {"validation": [(10, 2.5)]})
    history = [{"eval_loss": 2.5, "step": 5}, {"perplexity": 40.0, "step": 10}]
    assert curves(history, 10, 2.5, best=5)["validation"] == [(5, 2.5)]  # of the published adapter, not of the last one


def test_perplexities_of_a_training_are_a_figure_of_their_own() -> None:
    history = [{key: value / step, "step": step} for step in (1, 2) for key, value in (("loss", 3), ("perplexity", 40))]
    drawn = list(plots_results.loss_figures(stage_of("train", {"history": history, "steps": 2}).metrics))
    assert [figure.draw().axes[0].get_ylabel() for figure in drawn] == ["loss (nats per token)", "perplexity"]
    assert drawn[0].numbers == "training from 3.000 at step 1 to 1.500 at step 2"


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
    # the browser's own requests, for updates and the like, come from no page
    asked = {one["url"] for one in events if "url" in one and one.get("initiator", "not an origin") != "not an origin"}
    return console, asked, (folder / "page.png").read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@PAGES
def test_a_browser_opens_the_page_in_silence(runs: Path, name: str, tmp_path: Path) -> None:
    console, addresses, picture = opened(runs / name, tmp_path)
    assert (console, addresses) == ([], set())
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 50_000  # a page of tables and figures; an empty one has a few thousand bytes


MEASURE = """
const page = document.querySelector("iframe").contentDocument, view = page.defaultView;
const width = page.documentElement.clientWidth;
const left = element => element.getBoundingClientRect().left, right = element => element.getBoundingClientRect().right;
const all = (selector, inside = page) => [...inside.querySelectorAll(selector)];
const results = all("table").find(table => table.querySelector("tbody tr:last-child td"));
const wide = all(".scroll").find(one => one.scrollWidth > one.clientWidth + 50);
if (wide) wide.scrollLeft = 50;
const selected = all("figure svg").map(figure => {
  view.getSelection().selectAllChildren(figure); return view.getSelection().toString(); });
document.body.textContent = JSON.stringify({
  overflow: page.documentElement.scrollWidth - width,
  hidden: all(".verdict dd, figure svg").filter(one => right(one) > width).length,
  cut: all("td", results).filter(cell => right(cell) > width).length,
  fixed: wide ? left(wide) - left(wide.querySelector("tr:not(.group) th[scope=row]")) : null,
  selected,
  letters: Math.min(...all("figure svg text").map(one => one.getBoundingClientRect().height)),
  page: view.getComputedStyle(page.body).backgroundColor,
  ink: view.getComputedStyle(page.querySelector("svg text")).fill,
  folded: all("details").every(one => !one.open),
});
"""


def measured(page: Path, folder: Path, width: int, *, is_dark: bool) -> dict[str, Any]:
    """What a browser makes of a page in a frame of this many pixels."""
    frame = (
        f'<iframe style="border: 0; width: {width}px; height: 800px" srcdoc="{html.escape(page.read_text())}"></iframe>'
    )
    (folder / "frame.html").write_text(
        f"<!DOCTYPE html><meta charset=utf-8><body>{frame}<script>onload = () => {{{MEASURE}}}</script>"
    )
    scheme = f"--blink-settings=preferredColorScheme={0 if is_dark else 1}"
    command = [str(BROWSER), *QUIET, scheme, f"--user-data-dir={folder / 'profile'}", "--dump-dom", "--hide-scrollbars"]
    command.append((folder / "frame.html").as_uri())
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    body = re.search(r"<body>(.*)</body>", done.stdout, re.DOTALL)
    assert body is not None
    found: dict[str, Any] = json.loads(html.unescape(body[1]))
    return found


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@PAGES
@pytest.mark.parametrize("is_dark", [False, True])
def test_a_telephone_shows_every_value_in_light_and_dark(runs: Path, name: str, is_dark: bool, tmp_path: Path) -> None:
    found = measured(runs / name, tmp_path, 390, is_dark=is_dark)
    assert (found["overflow"], found["hidden"]) == (0, 0)
    assert found["cut"] == 0 or name == "report.html"  # a table of several runs is scrolled below a fixed first column
    assert found["fixed"] == 0
    assert found["letters"] > 9
    assert all(
        re.search(r"base\s|prune", words) for words in found["selected"] if "step" not in words and "block" not in words
    )
    assert found["folded"]
    dark, light = "rgb(20, 24, 29)", "rgb(255, 255, 255)"
    assert found["page"] == (dark if is_dark else light)
    assert found["ink"] == ("rgb(230, 233, 237)" if is_dark else "rgb(27, 31, 36)")


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
