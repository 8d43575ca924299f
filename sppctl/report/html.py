"""A report as one HTML page, from the template ``page.html``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sppctl import __version__, console
from sppctl.report import plots_results
from sppctl.report.document import Code, Facts, Figure, Note, Section

LONG = 60  # characters; longer cells are broken into lines


def to_html(sections: Sequence[Section]) -> str:
    """Renders a report as a page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    numbers = count(1)

    def drawn(figure: Figure) -> Markup:
        """An SVG element with identifiers that are unique in the page."""
        return Markup(plots_results.with_prefix(figure.svg, f"figure{next(numbers)}"))  # noqa: S704

    environment.filters |= {"shown": console.plain_lines, "drawn": drawn}
    for name, kind in {"facts": Facts, "note": Note, "code": Code, "figure": Figure}.items():
        environment.tests[name] = lambda item, kind=kind: isinstance(item, kind)
    chapters = [section for section in sections if section.anchor]
    template = environment.get_template("page.html")
    return template.render(sections=sections, chapters=chapters, version=__version__, long=LONG)
