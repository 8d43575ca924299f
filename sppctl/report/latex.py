"""A table in LaTeX, for the packages booktabs and graphicx."""

from __future__ import annotations

import re

from sppctl import console
from sppctl.report.tables import COLUMN_NOTE, NOTHING, Table

SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "|": r"\textbar{}",
    "[": "{[}",  # after \\, brackets and stars would be taken as its arguments
    "]": "{]}",
    "*": "{*}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
} | {character: f"\\{character}" for character in "&%$#_{}"}
CAPTION = (
    r"Perplexities; accuracies and sparsity in percent, their differences from the dense model (-- base) in "
    r"percentage points. Gap recovered in percent: $(x - \mathrm{pruned}) / (\mathrm{base} - \mathrm{pruned})$, "
    r"of perplexities the logarithms. "
)


def escape(text: str) -> str:
    """Escapes text for LaTeX."""
    return "".join(SPECIAL.get(character, character) for character in console.plain(text)).replace("--", "-{}-")


def to_latex(table: Table) -> str:
    """Renders a table with booktabs; percentages without a sign, since the caption names the unit."""
    body = []
    for at, row in enumerate(table.rows):
        body += [r"\midrule"] if at in table.breaks else []
        body.append(" & ".join(map(_typeset, row)) + r" \\")
    # heads on several lines
    heads = [escape(column.name).replace(" (", r"\\ (").replace(", ", r",\\ ") for column in table.columns]
    spans, rules, at = [], [], 1  # the head that neighbouring columns share is above a rule
    for name, size in table.spans:
        spans.append(rf"\multicolumn{{{size}}}{{c}}{{{escape(name)}}}")
        rules += [rf"\cmidrule(lr){{{at}-{at + size - 1}}}"] if name else []
        at += size
    above = [" & ".join(spans) + r" \\", "".join(rules)] if spans else []
    return "\n".join(
        [
            "% needs \\usepackage{booktabs,graphicx}; made by sppctl report",
            r"\begin{table*}",
            r"\centering",
            rf"\caption{{{CAPTION}{escape(COLUMN_NOTE)}}}",
            r"\label{tab:sppctl}",
            r"\resizebox{\textwidth}{!}{%",
            rf"\begin{{tabular}}{{{''.join('l' if column.is_text else 'r' for column in table.columns)}}}",
            r"\toprule",
            *above,
            " & ".join(rf"\shortstack[r]{{{head}}}" for head in heads) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table*}",
            "",
        ]
    )


def _typeset(text: str) -> str:
    """A cell in LaTeX: a dash if empty, numbers with a proper minus sign and without the percent sign."""
    if text == NOTHING:
        return "--"
    number = re.fullmatch(r"([+-]?)(\d[\d.e+]*)%?", text)
    return escape(text) if number is None else number[1].replace("-", "$-$") + number[2]
