"""Which drawn experiments can run: what their runs would refuse is known before any of them begins."""

from collections.abc import Callable
from typing import Any

from scalecv.config import Experiment
from scalecv.errors import ConfigError, UserError
from scalecv.shards.manifest import Manifest
from scalecv.train.checks import check, check_names, check_network

NETWORK: Any = {"model": True, "data": True, "upscale": True, "train": {"batch", "micro_batch", "exact"}}
"""Of an experiment, what decides whether its network can be built and take the images."""
NEITHER: Any = {"data": {"augment", "sampling"}}
"""And of that what does not."""


def approval(manifest: Manifest) -> Callable[[Experiment], None]:
    """A function that raises a UserError where an experiment cannot run on the data; each network is built once."""
    built: dict[str, str] = {}  # network -> why it cannot be built, empty where it can

    def approve(one: Experiment) -> None:
        from scalecv.train.network import check_builds

        check(one, manifest)
        check_names(one)
        check_network(one, manifest)
        network = one.model_dump_json(include=NETWORK, exclude=NEITHER)
        if network not in built:
            built[network] = ""
            try:
                check_builds(one, manifest)
            except UserError as error:
                built[network] = str(error)
        if built[network]:
            raise ConfigError(built[network])

    return approve
