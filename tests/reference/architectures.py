"""What works with each segmentation architecture: a training step, ONNX and torch.export, each tried.

    python -m tests.reference.architectures --to docs/benchmarks/architectures.md

Small encoders, 4 bands, 3 classes, 128x128 px (pan needs more than 64). An export counts where what it gives equals the
network.
"""

import argparse
import io
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from scalecv.models import build_model
from scalecv.models.facts import model_facts
from scalecv.models.segmenters import ARCHITECTURES

SIDE, BANDS, CLASSES = 128, 4, 3
ENCODERS = {"dpt": "tu-vit_tiny_patch16_224", "segformer": "mit_b0"}
"""Where the smallest encoder that all others take, resnet18, is not possible or not usual."""
HEAD = """# Segmentation architectures

`python -m tests.reference.architectures --to docs/benchmarks/architectures.md` tries each one: {bands} bands,
{classes} classes, {side}x{side} px, on a CPU with torch {torch}, onnx {onnx}, onnxruntime {runtime}. GFLOPs are those
of one image (forward pass, two for each multiply-add).

- Training step: loss and all gradients are finite, and an update changes what has a gradient; weights without one
  are counted.
- ONNX: the file that `torch.onnx.export(dynamo=True)` wrote gives the logits of the network in ONNX Runtime.
- torch.export: the program, written and read again, gives the logits of the network.

| `model.arch` | `model.encoder` | parameters (M) | GFLOPs | training step | ONNX | torch.export |
|---|---|---|---|---|---|---|
"""


def names() -> list[str]:
    """The architectures, each once."""
    return [name for name in ARCHITECTURES if name != "unetpp"]


def network(arch: str) -> tuple[nn.Module, str]:
    """A network of random weights, and the name of its encoder."""
    torch.manual_seed(0)
    encoder = ENCODERS.get(arch, "resnet18")
    return build_model(arch, in_channels=BANDS, outputs=CLASSES, encoder=encoder), encoder


def trains(arch: str) -> str:
    """yes, if one update is sound, with the number of weights that get no gradient; else why not."""
    model, _ = network(arch)
    images, masks = torch.randn(2, BANDS, SIDE, SIDE), torch.randint(0, CLASSES, (2, SIDE, SIDE))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    loss = nn.functional.cross_entropy(model.train()(images), masks)
    loss.backward()
    optimizer.step()
    reached = {name: p for name, p in model.named_parameters() if p.grad is not None}
    still = {name for name, p in reached.items() if p.grad.any() and torch.equal(p, before[name])}
    bad = [name for name, p in reached.items() if name in still or not torch.isfinite(p.grad).all()]
    if bad or not torch.isfinite(loss):
        return f"no: loss {float(loss.detach()):.3f}, {len(bad)} weights without a sound update, such as {bad[:1]}"
    idle = len(before) - len(reached)
    return f"yes ({idle} of {len(before)} weights get no gradient)" if idle else "yes"


def to_onnx(arch: str) -> str:
    """yes, if the file gives the logits of the network; else why not."""
    import onnxruntime

    model, images = network(arch)[0].eval(), torch.randn(2, BANDS, SIDE, SIDE)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        torch.onnx.export(model, (images,), str(file), dynamo=True, external_data=False, verbose=False)
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        return _same(torch.from_numpy(found), model(images))


def to_program(arch: str) -> str:
    """yes, if the exported program, written and read again, gives the logits of the network; else why not."""
    model, images = network(arch)[0].eval(), torch.randn(2, BANDS, SIDE, SIDE)
    program = torch.export.export(model, (images,))
    with torch.no_grad():
        packed = io.BytesIO()
        torch.export.save(program, packed)
        packed.seek(0)
        return _same(torch.export.load(packed).module()(images), model(images))


def _same(found: torch.Tensor, expected: torch.Tensor) -> str:
    worst = float((found - expected).abs().max() / expected.abs().max())
    return "yes" if worst < 1e-3 else f"no: logits differ by {worst:.1e}"


def tried(how: Callable[[str], str], arch: str) -> str:
    """What came out, or the first line of the error."""
    try:
        return how(arch)
    except Exception as error:  # what a library cannot do is what the table is for
        said = next((line for line in str(error).splitlines() if line.strip()), "")
        return f"no: {type(error).__name__}: {said.strip()[:140]}".replace("|", "/")


def row(arch: str) -> str:
    """One line of the table."""
    model, encoder = network(arch)
    facts = model_facts(model, (BANDS, SIDE, SIDE))
    numbers = f"{facts['parameters'] / 1e6:.1f} | {facts['flops'] / 1e9:.2f}"
    results = " | ".join(tried(how, arch) for how in (trains, to_onnx, to_program))
    return f"| {arch} | {encoder} | {numbers} | {results} |"


def main() -> None:
    """Try all of them, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, help="Markdown file; stdout by default")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)
    rows = []
    for arch in names():
        began = time.perf_counter()
        rows.append(row(arch))
        print(f"{rows[-1]}  ({time.perf_counter() - began:.0f} s)", file=sys.stderr, flush=True)
    versions = {"torch": version("torch").split("+")[0], "onnx": version("onnx"), "runtime": version("onnxruntime")}
    head = HEAD.format(bands=BANDS, classes=CLASSES, side=SIDE, **versions)
    text = head + "\n".join(rows) + "\n"
    if given.to:
        given.to.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
