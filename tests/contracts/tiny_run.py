"""A training that takes milliseconds and saves as the real one does: parts first, manifest last, then collect."""

import hashlib
import json

import torch
from torch import distributed as dist

from scalecv import storage
from scalecv.artifacts import bundle
from scalecv.batches.pixels import Pixels
from scalecv.config import Augment, Train
from scalecv.train import checkpoint
from scalecv.train.optim import build_optimizer

EPOCHS, STEPS, KEEP = 6, 2, 2
PIXELS = Pixels(None, "rgb", 3, "uint8", "uint8", 8, "stretch", (0.0,) * 3, (1.0,) * 3, ("a", "b"), augment=Augment())
METRICS = (0.2, 0.9, 0.3, 0.4, 0.5, 0.6)
"""Of each epoch; the best one is early, so that it is kept beside the newest."""


def resume(run, rank, ranks):
    """(epoch, model, optimizer, number of updates that were found) from the newest checkpoint, or from the start."""
    model = torch.nn.Linear(4, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1)
    optimizer = build_optimizer(model, Train(optimizer="adamw", lr=0.1))
    found, parts, _ = checkpoint.newest(run) if rank == 0 else (None, None, [])
    if ranks > 1:
        box = [found]
        dist.broadcast_object_list(box, src=0)
        found, parts = box[0], parts or (checkpoint.read(box[0]) if box[0] else None)
    if found is None:
        return 0, model, optimizer, 0
    from safetensors.torch import load

    model.load_state_dict(load(parts[bundle.WEIGHTS]))
    checkpoint.unpack_optimizer(optimizer, parts[checkpoint.TENSORS])
    return json.loads(parts[checkpoint.STATE])["epoch"], model, optimizer, found.updates


def train(run, *, rank=0, ranks=1):
    """Train on from what is there; the SHA-256 of the weights, and the updates that were found at the start."""
    epoch, model, optimizer, found = resume(run, rank, ranks)
    if rank == 0:
        checkpoint.collect(run, KEEP)
    while epoch < EPOCHS:
        for step in range(STEPS):
            inputs = torch.full((2, 4), float(epoch * STEPS + step + 1 + rank))
            model(inputs).square().mean().backward()
            for parameter in model.parameters():
                if ranks > 1:
                    dist.all_reduce(parameter.grad)
            optimizer.step()
            optimizer.zero_grad()
        epoch += 1
        if rank == 0:
            parts = bundle.parts(model.state_dict(), **facts(epoch))
            parts[checkpoint.TENSORS] = checkpoint.pack_optimizer(optimizer)
            parts[checkpoint.STATE] = json.dumps({"epoch": epoch}).encode()
            checkpoint.save(run, parts, epoch * STEPS, METRICS[epoch - 1])
            checkpoint.collect(run, KEEP)
        if ranks > 1:
            dist.barrier()
    weights_hash = bundle.weights_hash(model.state_dict())
    if rank == 0:
        finish(run, weights_hash)
    return weights_hash, found


def finish(run, weights_hash):
    """The best weights as a bundle, then the result: its presence says that the run has ended."""
    best = checkpoint.best(checkpoint.complete(run)[0])
    parts = checkpoint.read(best)
    uri = storage.join(run, "bundles", weights_hash[:8])
    for name in (bundle.WEIGHTS, bundle.FACTS):
        storage.put(storage.join(uri, name), parts[name])
    storage.put(storage.join(run, "result.json"), json.dumps({"weights_hash": weights_hash, "bundle": uri}).encode())


def facts(epoch):
    call = bundle.Call(arch="resnet10", encoder="", in_channels=3, outputs=2, stem="small", norm="batch")
    return {
        "name": "tiny",
        "task": "classify",
        "call": call,
        "pixels": bundle.pixel_facts(PIXELS),
        "classes": ("a", "b"),
        "data": bundle.DataFacts(uri="nowhere", version=0, fingerprint="0"),
        "epoch": epoch,
    }


def outcome(run):
    """What is left of a run that has ended: hash of the result, of the bundle, and the checkpoints' folders."""
    told = json.loads(storage.get(storage.join(run, "result.json")))
    described = bundle.read_facts(told["bundle"])
    bundle.read_weights(told["bundle"], described)
    folders = storage.list_names(storage.join(run, "checkpoints"))
    names = {folder: storage.list_names(storage.join(run, "checkpoints", folder)) for folder in folders}
    whole = hashlib.sha256(json.dumps(names, sort_keys=True).encode()).hexdigest()
    return told["weights_hash"], described.weights_hash, whole
