"""What a run with a fault came to, beside the quiet run of the same recipe."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["PASS", "HARD_FAIL", "SILENT", "LOST_WORK", "NOT_RUN"]
MEANING = {
    "PASS": "same samples, same weights, nothing lost that a checkpoint held",
    "HARD_FAIL": "the run did not end, or needed help",
    "SILENT": "the run ended well with other samples or weights",
    "LOST_WORK": "a checkpoint or a recorded point that was complete is gone",
    "NOT_RUN": "this machine or recipe cannot show it",
}


@dataclass(frozen=True)
class Run:
    """What one run came to, all its starts together."""

    code: int
    """Exit code of the last start."""
    said: str
    """The last line of its messages."""
    weights_hash: str
    order_hash: str
    steps: tuple[int, ...]
    """Each step that was done, in the order of doing, counted from 1."""
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """The verdict on one fault."""

    fault: str
    verdict: Verdict
    detail: str
    step: int | None = None
    """The step at which the fault came."""
    weights_hash: str = ""
    order_hash: str = ""
    steps: int = 0
    """Steps of the recipe."""
    steps_done: int = 0
    """Steps that were done, those done again included."""
    seconds: float = 0.0


def judge(
    fault: str, step: int, what: str, quiet: Run, run: Run, *, held: int | None = None, record: str = ""
) -> Outcome:
    """The verdict on a run.

    Args:
        fault: its name.
        step: at which it came.
        what: what was done, in words.
        quiet: the run without faults.
        run: the run with this one.
        held: updates of the newest complete checkpoint when the fault came; None where nothing had to be resumed.
        record: what is wrong with the run's record; empty where nothing is.
    """

    def outcome(verdict: Verdict, detail: str) -> Outcome:
        told = (run.weights_hash, run.order_hash, len(set(quiet.steps)), len(run.steps), run.seconds)
        return Outcome(fault, verdict, f"{what}; {detail}", step, *told)

    if run.code != 0:
        return outcome("HARD_FAIL", f"exit code {run.code}: {run.said}")
    if run.order_hash != quiet.order_hash:
        return outcome("SILENT", "other samples than in the quiet run")
    if run.weights_hash != quiet.weights_hash:
        return outcome("SILENT", "same samples, other weights than in the quiet run")
    back = went_back_to(run.steps)
    if held is not None and back is not None and back < held:
        return outcome("LOST_WORK", f"went on from step {back}, a checkpoint held {held}")
    if record:
        return outcome("LOST_WORK", record)
    twice = len(run.steps) - len(set(run.steps))
    return outcome("PASS", f"{twice} of {len(set(quiet.steps))} steps done twice")


def went_back_to(steps: Sequence[int]) -> int | None:
    """The update that a run went on from after its first interruption, or None if no step was done twice."""
    seen = 0
    for step in steps:
        if step <= seen:
            return step - 1
        seen = step
    return None


def share_done_once(outcomes: Sequence[Outcome]) -> float:
    """Steps of the recipe by steps done, over all faults that were tried."""
    done = sum(one.steps_done for one in outcomes if one.verdict != "NOT_RUN")
    return sum(one.steps for one in outcomes if one.verdict != "NOT_RUN") / done if done else 1.0
