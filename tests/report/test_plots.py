from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from made_up_runs import layer, stage_of, write_record
from matplotlib.figure import Figure

from sppctl.records import LayerRecord
from sppctl.report import plots
from sppctl.run import pipeline

PROJECTIONS = [
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
]


def llama(blocks: int = 3, **options: Any) -> list[LayerRecord]:
    return [layer(f"{block}.{name}", **options) for block in range(blocks) for name in PROJECTIONS]


def svg(layers: list[LayerRecord]) -> str:
    return plots.svg(lambda: plots.draw(layers))


def texts(drawing: str) -> list[str]:
    return ["".join(node.itertext()) for node in ET.fromstring(drawing).iter("{http://www.w3.org/2000/svg}text")]


# --- module types -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "types"),
    [
        (["model.layers.0.mlp.up_proj", "model.layers.11.mlp.up_proj"], ["up_proj"]),
        (["transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_proj"], ["attn.c_proj", "mlp.c_proj"]),
        (["model.layers.0.mlp.experts.0.up_proj", "model.layers.0.mlp.experts.13.up_proj"], ["up_proj"]),
        (
            ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.experts.0.up_proj", "model.layers.1.mlp.shared.up_proj"],
            ["mlp.up_proj", "experts.up_proj", "shared.up_proj"],
        ),
        (["model.layers.0.fc", "model.layers.0.mlp.fc"], ["fc", "mlp.fc"]),
    ],
)
def test_a_module_type_is_as_short_as_it_is_clear(names: list[str], types: list[str]) -> None:
    assert list(plots.by_type([replace(layer(""), name=name) for name in names])) == types


def test_layers_are_sorted_by_type_and_block() -> None:
    layers = [*llama(2), layer("10.mlp.up_proj")]
    found = plots.by_type(layers)
    assert list(found) == [name.rpartition(".")[2] for name in PROJECTIONS]
    assert {block: [one.name for one in own] for block, own in found["up_proj"].items()} == {
        block: [f"model.layers.{block}.mlp.up_proj"] for block in (0, 1, 10)
    }


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_a_line_of_errors_for_each_module_type_from_zero_unless_they_are_close_together() -> None:
    layers = llama(2)
    (errors,) = plots.draw([*layers[:-1], replace(layers[-1], relative_output_error=0.75)]).axes
    assert len(errors.lines) == 7
    assert errors.lines[-1].get_xydata().tolist() == [[0, 0.25], [1, 0.75]]  # type: ignore[union-attr]
    assert errors.get_ylim()[0] == 0
    close = plots.draw([*layers[:-1], replace(layers[-1], relative_output_error=0.375)])
    assert close.axes[0].get_ylim()[0] > 0.2


def test_experts_of_a_block_are_averaged() -> None:
    errors = ((0.1, 0.2, 0.3, 0.4), (0.2, 0.4, 0.6, 0.8))  # in two blocks of four experts
    experts = [(f"{b}.mlp.experts.{i}.gate_proj", i, error) for b in (0, 1) for i, error in enumerate(errors[b])]
    figure = plots.draw([layer(name, error, sparsity=0.5 + index / 10) for name, index, error in experts])
    above, below = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["gate_proj\n(mean of 4)"]
    assert list(above.lines[0].get_xdata()) == [0, 1]
    assert list(above.lines[0].get_ydata()) == pytest.approx([0.25, 0.5])
    assert list(below.lines[0].get_ydata()) == pytest.approx([65, 65])


def test_equal_sparsity_is_not_drawn_and_that_of_blocks_is_one_line() -> None:
    layers = llama()
    assert len(plots.draw(layers).axes) == 1
    made = plots.pruning(layers)
    assert made is not None
    assert made.caption == "Relative output error by block and module type"
    assert made.numbers.startswith("q_proj from 0.250 to 0.250; ")
    assert plots.pruning(llama(1)) is None  # a table shows as much
    _, sparsity = plots.draw([replace(one, sparsity=0.25) if ".2." in one.name else one for one in layers]).axes
    (line,) = sparsity.lines
    assert list(line.get_ydata()) == [50, 50, 25]
    assert [text.get_text() for text in sparsity.texts] == ["all module types"]
    _, sparsity = plots.draw([replace(layers[0], sparsity=0.75), *layers[1:]]).axes
    assert len(sparsity.lines) == 7
    assert list(sparsity.lines[0].get_ydata()) == [75, 50, 50]
    assert not sparsity.texts
    low, high = sparsity.get_ylim()
    assert low < 50 < 75 < high


def test_no_two_lines_look_alike() -> None:
    layers = [layer(f"0.part_{index}") for index in range(28)]
    lines = plots.draw(layers).axes[0].lines
    looks = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines]
    assert len(set(looks)) == 28
    assert len({color for color, _, _ in looks[:7]}) == len({marker for _, marker, _ in looks[:7]}) == 7


@pytest.mark.parametrize("blocks", [1, 2, 32, 33, 80])
def test_any_depth_can_be_drawn(blocks: int) -> None:
    assert "block index (0 = nearest to the input)" in texts(svg(llama(blocks)))


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("error", "whole"), [(0.25, "output"), (None, "weight")])
def test_every_module_type_and_what_the_axes_mean_are_named(error: float | None, whole: str) -> None:
    """Without inputs the error of the weights is drawn."""
    layers = llama(error=error)
    names = {name.rpartition(".")[2] for name in PROJECTIONS}
    axes = {f"relative {whole} error", f"(share of the {whole} norm)", "sparsity", "(% zeros)"}
    assert list(plots.draw(layers).axes[0].lines[0].get_ydata()) == [error or 0.5] * 3
    layers[0] = replace(layers[0], sparsity=0.25)
    assert names | axes <= set(texts(svg(layers)))


def test_the_same_records_give_the_same_bytes_under_any_matplotlibrc() -> None:
    first = svg(llama())
    with mpl.rc_context({"font.size": 20, "svg.fonttype": "path", "axes.facecolor": "red"}):
        assert svg(llama()) == first
        assert mpl.rcParams["font.size"] == 20
    assert "dc:date" not in first


# --- in a run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [llama(), []])
def test_a_report_draws_what_was_pruned_if_anything_and_a_failure_leaves_the_old_one(
    layers: list[LayerRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_record(tmp_path, "prune", stage_of("prune", {"layers": layers}))
    pipeline.report([tmp_path])
    figure = {"pruning.svg"} if layers else set()
    files = {"report.md", "report.csv", "report.json", "report.html"}
    assert {path.name for path in tmp_path.iterdir()} == {"pruned"} | files | figure
    assert ("](pruning.svg)" in (tmp_path / "report.md").read_text()) == bool(layers)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    write_record(tmp_path, "prune", stage_of("prune", {"layers": llama(2)}))
    monkeypatch.setattr(Figure, "savefig", lambda self, text, **_: text.write("<svg") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipeline.report([tmp_path])
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_matplotlib_is_imported_only_to_draw() -> None:
    code = "import sys, sppctl.cli, sppctl.run.pipeline, sppctl.report.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
