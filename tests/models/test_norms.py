"""What replaces batch normalisation: statistics, gradients, names of weights, and workers that agree."""

import copy

import pytest
import torch
from torch import nn

from scalecv.models import build_model
from scalecv.models.norms import BatchNorm, FrozenBatchNorm2d, SyncBatchNorm, change_norm, groups_of
from tests.pair import on_two_ranks


def learns_from_batches(model):
    return any(isinstance(m, BatchNorm) and not isinstance(m, FrozenBatchNorm2d) for m in model.modules())


ARCHITECTURES = ["resnet10", "timm/resnet18", "timm/efficientnet_b0", "unet"]


@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (48, 24), (33, 11), (7, 7), (37, 1), (1280, 32)])
def test_groups_divide_the_channels(channels, groups):
    assert groups_of(channels) == groups


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("norm", ["sync", "group", "frozen"])
def test_names_and_kinds_of_layers(arch, norm):
    torch.manual_seed(0)
    plain = build_model(arch, in_channels=3, outputs=2)
    torch.manual_seed(0)
    other = build_model(arch, in_channels=3, outputs=2, norm=norm)
    assert learns_from_batches(plain) and learns_from_batches(other) == (norm == "sync")
    assert [n for n, _ in other.named_parameters()] == [n for n, _ in plain.named_parameters()]
    if norm != "group":
        assert set(other.state_dict()) == set(plain.state_dict())
        x = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(other.eval()(x), plain.eval()(x))
    assert torch.isfinite(other.train()(torch.randn(2, 3, 32, 32))).all()


def test_group_norm_takes_a_batch_of_one_and_is_the_same_for_any_batch():
    model = build_model("resnet10", in_channels=3, outputs=2, norm="group").train()
    x = torch.randn(4, 3, 32, 32)
    one_by_one = torch.cat([model(x[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(model(x), one_by_one, atol=1e-5, rtol=1e-5)


def test_frozen_statistics_survive_training():
    model = build_model("resnet10", in_channels=3, outputs=2, norm="frozen").train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    after = model.state_dict()
    assert torch.equal(before["bn1.running_mean"], after["bn1.running_mean"])
    assert torch.equal(before["bn1.num_batches_tracked"], after["bn1.num_batches_tracked"])
    assert not torch.equal(before["bn1.weight"], after["bn1.weight"])
    assert model.training and not model.bn1.training


def test_an_activation_that_lives_in_the_norm_stays():
    from timm.layers import BatchNormAct2d

    x = torch.randn(4, 8, 5, 5)
    for norm in ("sync", "group", "frozen"):
        layer = change_norm(nn.Sequential(BatchNormAct2d(8)), norm)
        assert float(layer(x).detach().min()) == 0.0, norm


def test_sync_is_batch_norm_for_one_worker():
    x = torch.randn(4, 8, 5, 5)
    plain = nn.BatchNorm2d(8)
    sync = change_norm(copy.deepcopy(plain), "sync")
    assert isinstance(sync, SyncBatchNorm)
    torch.testing.assert_close(sync(x), plain(x))
    torch.testing.assert_close(sync.running_var, plain.running_var)


def _half(rank):
    torch.manual_seed(0)
    layer = change_norm(nn.Sequential(nn.BatchNorm2d(3)), "sync")
    network = nn.parallel.DistributedDataParallel(layer)
    x = torch.randn(4, 3, 5, 5) * 2 + 1
    share = x[rank * 2 : rank * 2 + 2].clone().requires_grad_()
    out = network(share)
    out.pow(3).sum().backward()
    norm = layer[0]
    results = (out.detach(), share.grad, norm.weight.grad, norm.running_mean, norm.running_var)
    return [value.tolist() for value in results]


def test_two_workers_on_cpus_normalise_like_one(tmp_path):
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(3)
    x = (torch.randn(4, 3, 5, 5) * 2 + 1).requires_grad_()
    out = layer(x)
    out.pow(3).sum().backward()
    got = on_two_ranks(_half, tmp_path)
    for place, expected in enumerate((out.detach(), x.grad)):
        joined = torch.tensor(got[0][place] + got[1][place])
        torch.testing.assert_close(joined, expected, atol=1e-5, rtol=1e-5)
    for rank in range(2):
        # DistributedDataParallel gives the mean over ranks of the gradients, which are sums here.
        torch.testing.assert_close(torch.tensor(got[rank][2]) * 2, layer.weight.grad, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(torch.tensor(got[rank][3]), layer.running_mean)
        torch.testing.assert_close(torch.tensor(got[rank][4]), layer.running_var)
