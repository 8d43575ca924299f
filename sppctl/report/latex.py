"""The table over runs in LaTeX, for the packages booktabs and graphicx."""

from __future__ import annotations

import itertools
import re

from sppctl import console
from sppctl.report.measures import Row
from sppctl.report.tables import HEADS_MEAN, TEXT_COLUMNS, head, wide_table

SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "|": r"\textbar{}",
    "[": "{[}",  # after the end of a row it would begin an argument, and a star belong to it
    "]": "{]}",
    "*": "{*}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
} | {character: f"\\{character}" for character in "&%$#_{}"}


def escape(text: str) -> str:
    """Text that LaTeX sets as it is."""
    return "".join(SPECIAL.get(character, character) for character in console.plain(text)).replace("--", "-{}-")


def to_latex(found: list[Row]) -> str:
    """A table of the package booktabs; percentages without their sign, which the caption has."""
    header, lines = wide_table(found)
    sides = "".join("l" if name in TEXT_COLUMNS else "r" for name in header)
    body = []
    before = None
    for row, line in zip(found, lines, strict=True):
        if before not in (None, row.run):
            body.append(r"\midrule")
        before = row.run
        body.append(" & ".join(_typeset(text) for text in line) + r" \\")
    caption = (
        r"Perplexities; accuracies and sparsity in percent, their differences to the dense model (-- base) in "
        r"percentage points. Gap recovered in percent: $(x - \mathrm{pruned}) / (\mathrm{base} - \mathrm{pruned})$, "
        r"of perplexities the logarithms. " + escape(HEADS_MEAN)
    )
    heads = [head(name) for name in header]
    titles = " & ".join(r"\shortstack[r]{" + _broken(escape(name)) + "}" for _, name in heads)
    return "\n".join(
        [
            "% needs \\usepackage{booktabs,graphicx}; made by sppctl report",
            r"\begin{table*}",
            r"\centering",
            rf"\caption{{{caption}}}",
            r"\label{tab:sppctl}",
            r"\resizebox{\textwidth}{!}{%",
            rf"\begin{{tabular}}{{{sides}}}",
            r"\toprule",
            *_spanning([shared for shared, _ in heads]),
            rf"{titles} \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table*}",
            "",
        ]
    )


def _spanning(shared: list[str]) -> list[str]:
    """The upper head: what neighbouring columns share stands there once, above a rule."""
    cells, rules, at = [], [], 1
    for name, columns in itertools.groupby(shared):
        size = len(list(columns))
        cells.append(rf"\multicolumn{{{size}}}{{c}}{{{escape({'- base': 'difference to base'}.get(name, name))}}}")
        rules += [rf"\cmidrule(lr){{{at}-{at + size - 1}}}"] * bool(name)
        at += size
    if not any(shared):
        return []
    return [" & ".join(cells) + r" \\", "".join(rules)]


def _broken(name: str) -> str:
    """The head of a column on several lines."""
    return name.replace(" (", r"\\ (").replace(", ", r",\\ ")


def _typeset(text: str) -> str:
    """A cell in LaTeX: a dash for nothing, numbers with a minus that is one and without the sign of percent."""
    if text == "-":
        return "--"
    number = re.fullmatch(r"([+-]?)(\d[\d.e+]*)%?", text)
    if number is None:
        return escape(text)
    return {"-": "$-$"}.get(number[1], number[1]) + number[2]
