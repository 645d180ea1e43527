"""One line for each thing that is wrong with an experiment: the key, what was found, what was expected."""

from typing import Any

from pydantic import BaseModel

from scalecv.config.experiment import Experiment
from scalecv.config.search import Spec
from scalecv.errors import nearest


def explain(where: str, problem: Any) -> str:
    """What one error of pydantic says, in our words."""
    path = [str(part) for part in problem["loc"]]
    key = ".".join(path)
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key '{key}'{_near_key(path)}"
    found = problem.get("input")
    if problem["type"] == "missing" and path[-1].isdigit():  # of a list
        return f"{where}: {'.'.join(path[:-1])}={found!r}: expected more than {path[-1]} values"
    if problem["type"] == "missing":
        return f"{where}: key '{key}' is missing"
    said = _expected(problem)
    if not key or isinstance(found, dict) or "login" in said:
        return f"{where}: {key + ': ' if key else ''}{said}"
    return f"{where}: {key}={found!r}: {said}"


def _expected(problem: Any) -> str:
    """What was expected, in words of YAML."""
    kind, limits = problem["type"], problem.get("ctx", {})
    if kind == "tuple_type":
        return "expected a list, as [a, b]"
    if kind == "too_short":
        return f"expected {limits['min_length']} or more values"
    if kind == "too_long":
        return f"expected at most {limits['max_length']} values"
    if kind == "model_type" and limits.get("class_name") == Spec.__name__:
        return "expected how it is drawn, as {loguniform: [1e-4, 1e-2]} or {choice: [a, b]}"
    said = str(problem["msg"]).removeprefix("Value error, ")
    return said[0].lower() + said[1:]


ELSEWHERE = {
    "learning_rate": "train.lr",
    "batch_size": "train.batch",
    "max_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "num_workers": "data.decode_threads",
    "amp": "train.precision",
    "accumulate_grad_batches": "train.micro_batch",
    "image_size": "data.size_px",
    "img_size": "data.size_px",
    "imgsz": "data.size_px",
    "backbone": "model.encoder",
    "pretrained": "model.weights",
    "encoder_weights": "model.weights",
    "dataset": "data.uri",
}
"""What keys are called in other tools."""


def _near_key(path: list[str]) -> str:
    known = _keys(Experiment)
    if path[-1] in ELSEWHERE:
        return f"; did you mean '{ELSEWHERE[path[-1]]}'?"
    if path[:2] == ["search", "space"]:  # below a key that its author chose
        known = [".".join([*path[:-1], name]) for name in Spec.model_fields]
    siblings = [k for k in known if k.rpartition(".")[0] == ".".join(path[:-1])]
    same = nearest(path[-1], [k.rpartition(".")[2] for k in siblings])
    if same:
        return same.replace("'", "'" + "".join(p + "." for p in path[:-1]), 1)
    elsewhere = [k for k in known if k.rpartition(".")[2] == path[-1]]
    return (
        f"; did you mean '{elsewhere[0]}'?"
        if elsewhere
        else f"; known here: {', '.join(k.rpartition('.')[2] for k in siblings)}"
    )


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    out: list[str] = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        out.append(prefix + name)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            out += _keys(inner, f"{prefix}{name}.")
    return out
