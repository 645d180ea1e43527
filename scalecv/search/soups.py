"""Soups: for each architecture the mean of the weights of trained models, where these lie in one basin.

Source: Wortsman et al., Model soups, ICML 2022.
"""

import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import fmean

import torch

from scalecv.artifacts import bundle
from scalecv.batches.collate import to_device
from scalecv.batches.feed import Feed
from scalecv.models.soup import mean_of, renew_statistics
from scalecv.search.candidates import Candidate, fields_of
from scalecv.search.ensemble_record import put
from scalecv.search.judge import Judge

MOST_IN_SOUP = 8
"""Best models of one architecture that are tried in its soup."""
SOUP_IMAGES = 2048
"""Training images that the batch normalisation of a soup takes its statistics from."""


def add_soups(judge: Judge) -> None:
    """Let the soup of each architecture take part as one more candidate."""
    groups: dict[str, list[int]] = {}
    for at, one in enumerate(judge.candidates):
        facts = one.facts.model_dump(mode="json", include={"call", "pixels", "upscale"})
        groups.setdefault(json.dumps(facts, sort_keys=True), []).append(at)
    for group in groups.values():
        if len(group) > 1 and (soup := _soup(judge, group)):
            judge.add(soup)


def _soup(judge: Judge, group: list[int]) -> Candidate | None:
    """Add models from the best on, as long as the mean of weights is no worse than the mean of their scores."""
    held, good = judge.held, {at: judge.held.sign * judge.judged[at].score for at in group}
    ranked = sorted(group, key=lambda at: -good[at])[:MOST_IN_SOUP]
    first = judge.candidates[ranked[0]]
    network = bundle.open_bundle(first.uri, allow_import=judge.allow_import).model.to(judge.device)
    taken, states = ranked[:1], [judge.weights(ranked[0])]
    state = states[0]
    for at in ranked[1:]:
        more = [*states, judge.weights(at)]
        network.load_state_dict(mean_of(more))
        renew_statistics(network, _training_images(judge, first))
        answers = held.answers(judge.behind(first.facts, network))
        if held.sign * held.score([(answers, 1.0)]).value >= fmean(good[one] for one in [*taken, at]):
            taken, states = [*taken, at], more
            state = {name: value.cpu().clone() for name, value in network.state_dict().items()}
    if len(taken) == 1:
        said = f"no soup of {len(group)} x {first.facts.call.arch}: their weights do not lie in one basin"
        judge.tell({"kind": "progress", "message": said})
        return None
    name = f"soup of {', '.join(judge.candidates[at].name for at in taken)}"
    origins = tuple(origin for at in taken for origin in judge.candidates[at].origins)
    uri = str(Path(judge.folder, f"soup-{ranked[0]}"))
    put(uri, bundle.parts(state, **fields_of(first.facts) | {"name": name, "origins": origins, "metrics": {}}))
    return Candidate(name, uri, bundle.read_facts(uri), None)


def _training_images(judge: Judge, one: Candidate) -> Iterator[torch.Tensor]:
    """Batches of up to SOUP_IMAGES rows of train, as the network sees them, not augmented."""
    pixels, batch = judge.seen_by(one.facts), judge.held.batch
    feed = Feed(judge.dataset, "train", pixels, batch, is_training=True, threads=torch.get_num_threads())
    for _, raw in islice(feed.epoch(0), math.ceil(SOUP_IMAGES / batch)):
        given = to_device(raw, pixels, judge.device, False)
        yield given["image"][given["valid"]]
