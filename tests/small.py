"""Fixtures: small datasets and experiments on them; and a network that does something at a call."""

from textwrap import indent

import pytest
import torch

from scalecv import config
from scalecv.shards.ingest import IngestOptions, ingest
from tests import make


@pytest.fixture(scope="session")
def shapes_dataset(tmp_path_factory):
    """90 pictures of three shapes: train, val and test."""
    folder = tmp_path_factory.mktemp("shapes")
    make.shapes(folder / "images")
    ingest(IngestOptions(source=str(folder / "images"), to=str(folder / "data"), layout="imagefolder", concurrency=0))
    return str(folder / "data")


@pytest.fixture(scope="session")
def fields_dataset(tmp_path_factory):
    """24 tiles of 4 bands with masks: train and val."""
    folder = tmp_path_factory.mktemp("fields")
    make.fields(folder / "tiles")
    ingest(IngestOptions(source=str(folder / "tiles"), to=str(folder / "data"), layout="masks", concurrency=0))
    return str(folder / "data")


@pytest.fixture
def shapes(shapes_dataset, tmp_path, monkeypatch):
    """A function that gives a small experiment on shapes, with dotted keys set (a__b for a.b)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    threads = torch.get_num_threads()
    yield lambda **keys: _experiment(
        SHAPES | {"data.uri": shapes_dataset, "track.storage": str(tmp_path / "runs")}, keys
    )
    torch.set_num_threads(threads)


@pytest.fixture
def fields(fields_dataset, tmp_path, monkeypatch):
    """A function that gives a small experiment on fields."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield lambda **keys: _experiment(
        FIELDS | {"data.uri": fields_dataset, "track.storage": str(tmp_path / "runs")}, keys
    )


def _experiment(base, keys):
    return config.build(config.with_overrides({}, base | {k.replace("__", "."): v for k, v in keys.items()}), "test")


SHAPES = {
    "name": "shapes",
    "task": "classify",
    "data.augment.hflip": 0.5,
    "data.augment.rotate_deg": 10,
    "model.arch": "resnet10",
    "model.stem": "small",
    "train.epochs": 3,
    "train.batch": 16,
    "train.lr": 3e-3,
    "train.threads": 1,
    "data.decode_threads": 1,
    "scale.workers": 0,
    "track.pictures": 4,
    "track.pictures_every": 0,
    "track.log_every": 2,
}
FIELDS = {
    "name": "fields",
    "task": "segment",
    "model.arch": "unet",
    "model.encoder": "resnet18",
    "train.epochs": 2,
    "train.batch": 8,
    "train.threads": 1,
    "data.decode_threads": 1,
    "scale.workers": 0,
    "track.pictures": 4,
}
NET = """
import os, signal, threading, time, torch
from torch import nn
def build(in_channels, outputs, marker="", pause_s=0.0):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(in_channels, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(),
                                      nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, outputs))
            self.register_buffer("seen", torch.zeros(1))
            self.calls = 0
        def forward(self, x):
            self.calls += self.training
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
{act}
            return self.body(x)
    return Net()
"""


def write_net(folder, name, act):
    """Write a module with a network that runs `act` in each forward pass, and give the keys of an experiment on it."""
    (folder / f"{name}.py").write_text(NET.replace("{act}", indent(act, " " * 12)))
    return {"model__arch": f"{name}:build", "model__stem": "default", "model__norm": "group"}
