"""The report of a run: one HTML page that needs nothing from outside itself.

A run that is still going, or was killed, has a report too: it shows what there is and says what is missing.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from tbrm.reporting.facts import accuracies, choose, facts, group_by_outcome, mean_rewards, n_heldout
from tbrm.reporting.html import write_page
from tbrm.reporting.plots import plots
from tbrm.reporting.run_folder import Row, read_run

SHOWN_SAMPLES = 12


def write_report(run_dir: Path) -> Path:
    """Writes report.html into the run's folder, and returns its path.

    Raises ValueError if there is nothing of a run in `run_dir`.
    """
    run = read_run(run_dir)
    before, after = accuracies(run)
    by_outcome = group_by_outcome(run.samples)
    return write_page(
        run_dir / "report.html",
        "report.html",
        name=run.name,
        gaps=run.gaps,
        before=before,
        after=after,
        mean_rewards=mean_rewards(run),
        n_heldout=n_heldout(run),
        finished=bool(run.result),
        facts=facts(run),
        plots=plots([[run]], [run.name]),
        outcomes={outcome: len(pairs) for outcome, pairs in by_outcome.items()},
        shown=choose(by_outcome, SHOWN_SAMPLES),
        steps=run.sample_steps,
        config=as_yaml(run.config),
    )


def as_yaml(config: Row) -> str:
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config else ""
