"""An experiment as its sweep runs it."""

from scalecv.config import Experiment
from scalecv.errors import ConfigError
from scalecv.train.checks import check_metric


def prepared(experiment: Experiment) -> Experiment:
    """The experiment whose runs keep what is best by the objective, and little more: there are many of them.

    Trials of one worker need no process beside theirs.

    Raises: ConfigError: there is no space; the objective would be a loss, or is no metric of the task.
    """
    from scalecv.tasks import TASKS

    if not experiment.search.space:
        raise ConfigError(
            "search.space is empty: name keys and their values, as "
            "search: {space: {train.lr: {loguniform: [1e-4, 1e-2]}}}"
        )
    metric = experiment.search.metric or experiment.train.metric or f"val/{TASKS[experiment.task].headline}"
    if metric.endswith("/loss"):
        raise ConfigError(
            f"train.metric={metric} depends on the weights that are searched: set search.metric, as val/iou"
        )
    if experiment.search.metric:
        check_metric(metric, "search.metric", experiment.task)
    if experiment.search.cost and experiment.upscale.factor > 1:
        raise ConfigError("search.cost counts networks, and this experiment has a stage before its own: leave it out")
    train = experiment.train.model_copy(update={"metric": metric})
    workers = experiment.scale.workers if experiment.scale.workers > 1 else 0
    scale = experiment.scale.model_copy(update={"workers": workers, "min_workers": None})
    pixels = "yes" if experiment.cache.pixels == "auto" else experiment.cache.pixels
    cache = experiment.cache.model_copy(update={"pixels": pixels})
    track = experiment.track.model_copy(update={"keep": 1})
    return experiment.model_copy(update={"train": train, "scale": scale, "cache": cache, "track": track})
