"""The candidates of an ensemble, each scored on the rows that choose, and timed on this machine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scalecv.artifacts import bundle, networks
from scalecv.artifacts.bundle import Facts
from scalecv.models.facts import latency_ms
from scalecv.search.candidates import Candidate
from scalecv.search.held_out import HeldOut, Mean, common_pixels
from scalecv.serve.evaluate import pixels_for
from scalecv.shards.store import Dataset
from scalecv.tasks import TASKS

Event = dict[str, Any]


@dataclass(frozen=True)
class Judged:
    """A candidate with what was measured of it."""

    name: str
    run_id: str | None
    bundle: str
    """Empty for a soup, which is only kept as a member."""
    score: float
    """On the rows that choose."""
    latency_ms: float
    """Of one image on this machine, the median of the better of two measurements."""
    origins: tuple[dict[str, Any], ...]
    """Name, run_id and weights_hash of the model that it is; of several for a soup."""
    weight: float = 0.0
    """Its share of the mean; 0 where it is no member."""


class Judge:
    """Asks candidates about the validation split, one network in memory at a time."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        dataset: Dataset,
        folder: Path,
        *,
        batch: int = 64,
        metric: str | None = None,
        allow_import: bool = False,
        tell: Callable[[Event], None] = lambda _: None,
    ) -> None:
        """Look at what candidates see; arguments as those of `search.ensemble.ensemble`, and a folder for answers."""
        self.dataset, self.folder, self.allow_import, self.tell = dataset, folder, allow_import, tell
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.pixels = common_pixels([one.facts.pixels for one in candidates], dataset.manifest.sizes_px)
        first = candidates[0].facts
        task = TASKS[first.task]
        self.held = HeldOut(
            dataset,
            task,
            self.seen_by(first.model_copy(update={"pixels": self.pixels})),
            folder,
            self.device,
            batch=batch,
            metric=metric,
            is_tuned=task.tuned or any(one.facts.threshold != 0.5 for one in candidates),
        )
        self.candidates: list[Candidate] = []
        self.judged: list[Judged] = []
        self._answers: list[Any] = []
        for one in candidates:
            self.add(one)

    def add(self, one: Candidate) -> None:
        """Score and time a candidate."""
        opened = bundle.open_bundle(one.uri, allow_import=self.allow_import)
        network = self.behind(one.facts, opened.model)
        before = latency_ms(network, self.held.shape)[0]
        answers = self.held.answers(network)
        latency = min(before, latency_ms(network, self.held.shape)[0])  # other work on the machine comes and goes
        score = self.held.score([(answers, 1.0)]).value
        place = "" if one.uri.startswith(str(self.folder)) else one.uri
        origins = tuple(origin.model_dump() for origin in one.origins)
        self.candidates.append(one)
        self._answers.append(answers)
        self.judged.append(Judged(one.name, one.run_id, place, score, latency, origins))
        said = f"{one.name}: {self.held.metric} {score:.4f}, {latency:.2f} ms an image"
        self.tell({"kind": "progress", "message": said})

    def mean(self, counts: Sequence[int]) -> Mean:
        """The mean of answers in which each candidate is so often."""
        total = sum(counts)
        return [(answers, count / total) for answers, count in zip(self._answers, counts, strict=True) if count]

    def good(self, counts: Sequence[int]) -> float:
        """Its score, larger is better."""
        return self.held.sign * self.held.score(self.mean(counts)).value

    def weights(self, at: int) -> dict[str, torch.Tensor]:
        """The weights of a candidate."""
        return bundle.read_weights(self.candidates[at].uri, self.candidates[at].facts)

    def seen_by(self, facts: Facts) -> Any:
        """Pixels of a feed for a network with these facts."""
        return pixels_for(bundle.Bundle("", facts, torch.nn.Identity()), self.dataset.manifest)

    def behind(self, facts: Facts, model: torch.nn.Module) -> torch.nn.Module:
        """A network as it takes the images of all candidates."""
        one = Candidate("", "", facts, None)
        member = one.member(1.0, self.pixels, self.held.sides)
        return networks.adapted(model, member, self.pixels).to(self.device).eval()
