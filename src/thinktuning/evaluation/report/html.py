"""The report as one HTML page that needs nothing else."""

from collections.abc import Sequence
from importlib import resources

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from thinktuning.evaluation.report.sections import Section


def html(title: str, overview: str, sections: Sequence[Section]) -> str:
    """The whole page; all text is escaped but the plots, which escape their own."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    files = resources.files(__package__)
    template = environment.from_string((files / "page.html").read_text(encoding="utf-8"))
    return template.render(
        title=title,
        overview=overview,
        sections=sections,
        css=Markup((files / "page.css").read_text(encoding="utf-8")),
        plot_css=Markup((files / "plots.css").read_text(encoding="utf-8")),
        safe=Markup,
    )
