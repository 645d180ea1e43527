"""Examination in a process of its own, whose death is itself a reason to set a sample aside.

Small samples go many at
a time, for a turn of both processes costs as much as a small image. After a death or a time-out those of that turn
go one by one, so that it is always one sample's own.
"""

import gc
import json
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from typing_extensions import TypedDict

from scalecv import raster
from scalecv.shards import jpeg_sums
from scalecv.shards.child import Child, Died, allow, reply, serving
from scalecv.shards.decode import MAX_PIXELS, REASONS, BadImage, Reason
from scalecv.shards.examine import FORMATS, MOST_SUMMED, Facts, examine, of_plain, plain

if TYPE_CHECKING:
    from pydantic import TypeAdapter

TIMEOUT_S = 60.0
SPARE_S = 30.0
"""CPU time of a turn beyond that, after which a child without a parent ends."""
TOGETHER_BYTES = 1 << 20
"""Bytes of the samples that are sent in one turn; a larger one goes alone."""
TOGETHER = 64
"""Samples of one turn."""

T = TypeVar("T")
Sample = tuple[str, bytes, bytes | None]
"""Name, encoded image, encoded mask."""


class Examiner:
    """A child process that decodes; it is started on first use and again after it died."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        """Args: timeout_s: time for one sample before its process is killed."""
        self._timeout_s = timeout_s
        self._child = Child("scalecv.shards.examiner:serve", TOGETHER_BYTES)

    def examine(
        self, name: str, data: bytes, mask: bytes | None = None, declared: Sequence[int] = (), ignore: int | None = None
    ) -> Facts:
        """As `scalecv.shards.examine.examine`; also the reasons decoder_died and timeout."""
        answer = self._alone((name, data, mask), declared, ignore)
        if isinstance(answer, BadImage):
            raise answer
        return answer

    def examine_all(
        self, samples: Sequence[Sample], declared: Sequence[int] = (), ignore: int | None = None
    ) -> Iterator[Facts | BadImage]:
        """The facts of each sample, or why it is set aside; in order."""
        for some in turns(samples, lambda sample: len(sample[1]) + len(sample[2] or b"")):
            if len(some) == 1:
                yield self._alone(some[0], declared, ignore)
                continue
            try:
                found = self._asked(some, declared, ignore)
            except (Died, TimeoutError):
                found = [self._alone(sample, declared, ignore) for sample in some]
            yield from found

    def close(self) -> None:
        """End the child."""
        self._child.close()

    def _alone(self, sample: Sample, declared: Sequence[int], ignore: int | None) -> Facts | BadImage:
        try:
            return self._asked([sample], declared, ignore)[0]
        except Died as error:
            return BadImage("decoder_died", f"the decoder {error}")
        except TimeoutError:
            return BadImage("timeout", f"not decoded after {self._timeout_s:g} s")

    def _asked(self, samples: Sequence[Sample], declared: Sequence[int], ignore: int | None) -> list[Facts | BadImage]:
        """One answer for each sample.

        Raises: Died: the child died, or answered with something else. TimeoutError: it did not answer in time.
        """
        lengths = [(name, len(data), None if mask is None else len(mask)) for name, data, mask in samples]
        parts = [part for _, *both in samples for part in both if part]
        with self._child.turn():
            is_shared = self._child.share(parts)
            head = {"samples": lengths, "declared": list(declared), "ignore": ignore, "shared": is_shared}
            self._child.send(head, () if is_shared else parts, self._timeout_s)
            answers = _answers().validate_json(self._child.line(self._timeout_s))
            if len(answers) != len(samples):
                raise ValueError
            return [_read(answer) for answer in answers]


def serve(shared: int) -> None:
    """The child's end: answers until its input ends.

    Args: shared: number of the memory in which samples may lie; -1 for none.
    """
    jpeg_sums.by_c()  # before the first image, whose time is limited
    raster.keep_settings()
    source, target = serving()
    memory = mmap.mmap(shared, 0, access=mmap.ACCESS_READ) if shared >= 0 else None
    gc.freeze()  # modules are here to stay, and need not be looked through for what can go
    while line := source.readline():
        head = json.loads(line)
        if memory is not None:
            memory.seek(0)
        read = memory.read if memory is not None and head["shared"] else source.read
        samples = [
            (name, read(size), None if mask_size is None else read(mask_size))
            for name, size, mask_size in head["samples"]
        ]
        allow(TIMEOUT_S + SPARE_S)
        reply(target, [_examined(*sample, head["declared"], head["ignore"]) for sample in samples])


def _examined(name: str, data: bytes, mask: bytes | None, declared: Sequence[int], ignore: int | None) -> Any:
    try:
        return (plain(name, data) if mask is None else None) or examine(name, data, mask, declared, ignore)
    except BadImage as error:
        return {"reason": error.reason, "detail": error.detail}
    except MemoryError:
        return {"reason": "too_large", "detail": "does not fit into memory"}
    except Exception as error:  # whatever a decoder raises is about this sample, and must not stop the others
        return {"reason": "damaged", "detail": f"{type(error).__name__}: {error}"[:200]}


def turns(each: Iterable[T], size_bytes: Callable[[T], int]) -> Iterator[list[T]]:
    """What is examined in one turn: at most TOGETHER, of TOGETHER_BYTES or one alone."""
    held: list[T] = []
    held_bytes = 0
    for one in each:
        size = size_bytes(one)
        if held and (held_bytes + size > TOGETHER_BYTES or len(held) >= TOGETHER):
            yield held
            held, held_bytes = [], 0
        held.append(one)
        held_bytes += size
    if held:
        yield held


class _Bad(TypedDict):
    reason: str
    detail: str


@cache
def _answers() -> "TypeAdapter[list[list[int] | Facts | _Bad]]":
    from pydantic import TypeAdapter  # which the child does without

    return TypeAdapter(list[list[int] | Facts | _Bad])


def _read(answer: "list[int] | Facts | _Bad") -> Facts | BadImage:
    if isinstance(answer, list):
        return of_plain(answer)
    if "width" in answer:
        return _possible(cast("Facts", answer))
    return BadImage(cast("Reason", answer["reason"] if answer["reason"] in REASONS else "damaged"), answer["detail"])


def _possible(facts: Facts) -> Facts:
    """The facts, if an image can have them.

    Raises: ValueError: none can, and what is made of them would fail.
    """
    bands, width, height = facts["bands"], facts["width"], facts["height"]
    sums = list(zip(facts["mean"], facts["m2"], facts["min"], facts["max"], strict=True))
    slack = 1e-6  # of float sums
    values = {int(value): pixels for value, pixels in facts["mask_values"].items()}
    if (
        min(width, height, bands) < 1
        or not 0 <= facts["pixels"] <= width * height <= MAX_PIXELS
        or not len(sums) == bands < 1 << 16
        or facts["format"] not in FORMATS
        or np.dtype(facts["dtype"]).kind not in "buif"
        or any(
            not (-MOST_SUMMED <= low <= high <= MOST_SUMMED and 0 <= m2 <= MOST_SUMMED**2 * MAX_PIXELS)
            or not low - slack * max(1, abs(low)) <= mean <= high + slack * max(1, abs(high))
            for mean, m2, low, high in sums
        )
        or len(values) != len(facts["mask_values"])
        or any(abs(value) >= 1 << 63 or pixels < 0 for value, pixels in values.items())
        or sum(values.values()) > width * height
    ):
        raise ValueError("no image has such facts")
    return facts
