"""A checkpoint is whole or not there, and a flipped bit is never loaded."""

import os
import shutil

import pytest
import torch

from scalecv.config import Train
from scalecv.errors import IntegrityError
from scalecv.train import checkpoint
from scalecv.train.optim import build_optimizer

PARTS = {"model.safetensors": b"w" * 1000, "bundle.json": b"{}", "resume.json": b'{"a": 1}'}


def folder(run, found):
    return run / "checkpoints" / found.uri.rpartition("/")[2]


def test_newest_and_best(tmp_path):
    for updates, metric in ((10, 0.5), (20, 0.9), (30, 0.7), (40, None)):
        checkpoint.save(str(tmp_path), {**PARTS, "n": str(updates).encode()}, updates, metric)
    found, parts, skipped = checkpoint.newest(str(tmp_path))
    assert found.updates == 40 and parts["n"] == b"40" and not skipped
    every, _ = checkpoint.complete(str(tmp_path))
    assert checkpoint.best(every).updates == 20
    assert checkpoint.best(every, larger_is_better=False).updates == 10


def test_of_two_after_one_step_the_validated_one_is_newest(tmp_path):
    run = str(tmp_path)
    for number in range(20):
        checkpoint.save(run, {"a.json": b"%d" % number}, 5, None)
    scored = checkpoint.save(run, {"a.json": b"scored"}, 5, 0.5)
    assert checkpoint.complete(run)[0][0].uri == scored.uri


def test_collect_keeps_the_newest_and_the_best(tmp_path):
    for updates, metric in ((10, 0.9), (20, 0.5), (30, 0.7), (40, 0.6)):
        checkpoint.save(str(tmp_path), {**PARTS, "n": str(updates).encode()}, updates, metric)
    checkpoint.collect(str(tmp_path), keep=2)
    assert sorted(c.updates for c in checkpoint.complete(str(tmp_path))[0]) == [10, 30, 40]
    assert len(os.listdir(tmp_path / "checkpoints")) == 3, "no empty folders stay"


def test_death_at_any_file_leaves_the_one_before(tmp_path):
    """Each prefix of the files that a save writes, with the last one whole or cut in half."""
    good = checkpoint.save(str(tmp_path), PARTS, 10, 0.5)
    whole = folder(tmp_path, checkpoint.save(str(tmp_path), {**PARTS, "n": b"2"}, 20, 0.6))
    names = [*PARTS, "n", checkpoint.MANIFEST]
    kept = {name: (whole / name).read_bytes() for name in names}
    for count in range(len(names)):
        for cut in (0, 1, 2):
            shutil.rmtree(whole)
            whole.mkdir()
            for name in names[:count]:
                (whole / name).write_bytes(kept[name])
            if cut and count < len(names):
                (whole / names[count]).write_bytes(kept[names[count]][: len(kept[names[count]]) // 2 * (cut - 1)])
            found, parts, _ = checkpoint.newest(str(tmp_path))
            assert found.uri == good.uri, (count, cut)
            assert parts == PARTS


@pytest.mark.parametrize("name", [*PARTS, checkpoint.MANIFEST])
def test_a_flipped_bit_is_noticed_and_the_one_before_is_taken(tmp_path, name):
    good = checkpoint.save(str(tmp_path), PARTS, 10, 0.5)
    bad = folder(tmp_path, checkpoint.save(str(tmp_path), {**PARTS, "n": b"2"}, 20, 0.6))
    data = bytearray((bad / name).read_bytes())
    data[len(data) // 2] ^= 4
    (bad / name).write_bytes(data)
    found, _, skipped = checkpoint.newest(str(tmp_path))
    assert found.uri == good.uri
    assert len(skipped) == 1 and bad.name in skipped[0]


def test_reading_a_damaged_one_is_an_error(tmp_path):
    saved = checkpoint.save(str(tmp_path), PARTS, 10, 0.5)
    (folder(tmp_path, saved) / "resume.json").unlink()
    with pytest.raises(IntegrityError, match=r"resume.json is missing"):
        checkpoint.read(saved)


def test_no_checkpoint_is_no_error(tmp_path):
    assert checkpoint.newest(str(tmp_path)) == (None, None, [])


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_optimizer_state_survives(name):
    def stepped(count, state=None):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        optimizer = build_optimizer(model, Train(optimizer=name, lr=0.1))
        if state:
            model.load_state_dict(state[0])
            checkpoint.unpack_optimizer(optimizer, state[1])
        for _ in range(count):
            model(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    whole, _ = stepped(5)
    half, optimizer = stepped(3)
    state = ({k: v.clone() for k, v in half.state_dict().items()}, checkpoint.pack_optimizer(optimizer))
    rest, _ = stepped(2, state)
    assert torch.equal(whole.weight, rest.weight)


def test_optimizer_state_keeps_the_memory_format_of_its_weights():
    def stepped():
        model = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        optimizer = build_optimizer(model, Train(optimizer="adam", lr=0.1))
        model(torch.ones(2, 3, 8, 8)).square().sum().backward()
        optimizer.step()
        return model, optimizer

    (_, first), (model, second) = stepped(), stepped()
    wanted = second.state[model.weight]["exp_avg"].stride()
    checkpoint.unpack_optimizer(second, checkpoint.pack_optimizer(first))
    assert second.state[model.weight]["exp_avg"].stride() == wanted == model.weight.stride()
