"""The report of a run: one HTML page that needs nothing from outside itself, its plots as PNG too.

A run that is still going, or was killed, has a report too: it shows what there is and says what is missing.
"""

from __future__ import annotations

from pathlib import Path

import yaml
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from tbrm.reporting.facts import accuracies, choose, facts, group_by_outcome, mean_rewards, n_heldout
from tbrm.reporting.plots import draw_all, draw_narrow_accuracy, save_png, to_svg
from tbrm.reporting.run_folder import read_run

SHOWN_SAMPLES = 12


def write_report(run_dir: Path) -> Path:
    """Writes report.html and plots/*.png into the run's folder, and returns the page's path.

    Raises ValueError if there is nothing of a run in `run_dir`.
    """
    run = read_run(run_dir)
    figures = draw_all(run.metrics, run.evals)
    plots = run_dir / "plots"
    plots.mkdir(exist_ok=True)
    for name, figure in figures.items():
        save_png(figure, plots / f"{name}.png")

    before, after = accuracies(run)
    by_outcome = group_by_outcome(run.samples)
    page = _template().render(
        name=run_dir.resolve().name,
        gaps=run.gaps,
        before=before,
        after=after,
        mean_rewards=mean_rewards(run),
        n_heldout=n_heldout(run),
        finished=bool(run.result),
        facts=facts(run),
        figures={name: Markup(to_svg(figure)) for name, figure in figures.items()},
        narrow=Markup(to_svg(draw_narrow_accuracy(run.evals))) if run.evals else "",
        outcomes={outcome: len(pairs) for outcome, pairs in by_outcome.items()},
        shown=choose(by_outcome, SHOWN_SAMPLES),
        steps=run.sample_steps,
        config=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) if run.config else "",
    )
    path = run_dir / "report.html"
    # A response may hold half of a UTF-16 pair, which no file can: it becomes a question mark.
    path.write_text(page, encoding="utf-8", errors="replace")
    return path


def _template() -> Template:
    source = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    # Prompts and responses are whatever a model or a data set came up with: all text is escaped.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source)
