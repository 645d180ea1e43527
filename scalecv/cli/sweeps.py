"""Verbs on many runs of one experiment: tune."""

import sys
from pathlib import Path

from scalecv.cli.experiments import ExperimentPath, Overrides, _experiment
from scalecv.cli.output import Json, Quiet, print_json
from scalecv.errors import ConfigError


def tune(
    experiment: ExperimentPath,
    overrides: Overrides = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Search an experiment's space; the same command again continues it."""
    from scalecv.display import Display
    from scalecv.search.report import as_json as plain
    from scalecv.search.report import table
    from scalecv.search.space import told
    from scalecv.search.sweep import tune as run

    if experiment.startswith("runs:/"):
        raise ConfigError(f"{experiment} is a record; tune searches the space of an experiment file")
    display = Display(quiet=quiet)
    code = (str(Path(experiment).resolve().parent),)
    swept = run(_experiment(experiment, overrides), code_dirs=code, tell=display)
    if as_json:
        print_json(plain(swept))
        return
    sys.stdout.write(table(swept.trials, swept.metric))
    if swept.best is not None:
        display.line(f"best      trial {swept.best.number}: {told(swept.best.overrides)}")
        display.line(f"bundle    {swept.best.bundle}")
    display.line(f"verdict   {swept.verdict.sentence}")
    display.line(f"MLflow    run {swept.run_id or '(not reached)'} in {swept.tracking_uri}: scalecv ui")
