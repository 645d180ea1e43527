"""Learning rate against torch's own schedules; decisions that follow the metric."""

import math

import pytest
import torch

from scalecv.config import Train
from scalecv.train import exact
from scalecv.train.optim import Progress, build_optimizer, learning_rate, match_layouts, set_rate


def test_cosine_with_warm_up_equals_torch():
    train = Train(epochs=5, lr=0.1, schedule="cosine", warmup_epochs=0)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    for update in range(50):
        assert math.isclose(learning_rate(train, update, 10), reference.get_last_lr()[0], rel_tol=1e-6, abs_tol=1e-9)
        optimizer.step()
        reference.step()


def test_warm_up_is_linear_and_reaches_the_rate():
    train = Train(epochs=5, lr=0.1, schedule="constant", warmup_epochs=2)
    rates = [learning_rate(train, update, 10) for update in range(25)]
    assert rates[:3] == pytest.approx([0.005, 0.01, 0.015])
    assert rates[19:] == pytest.approx([0.1] * 6)


def test_plateau_equals_torch():
    train = Train(lr=1.0, schedule="plateau", plateau_patience=2, plateau_factor=0.5, early_stop_min_delta=0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="max", patience=2, factor=0.5, threshold=0, threshold_mode="abs"
    )
    progress = Progress()
    for epoch, value in enumerate([0.1, 0.2, 0.2, 0.2, 0.2, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3]):
        progress = progress.after(value, epoch, train, larger_is_better=True)
        reference.step(value)
        assert progress.plateau_scale == optimizer.param_groups[0]["lr"]


def test_early_stopping_stops_at_the_exact_epoch():
    train = Train(early_stop_patience=3, early_stop_min_delta=0.01)
    progress, stopped = Progress(), None
    for epoch, value in enumerate([0.5, 0.6, 0.605, 0.6, 0.7, 0.7, 0.7, 0.7, 0.9]):
        progress = progress.after(value, epoch, train, larger_is_better=True)
        if progress.stops(train):
            stopped = epoch
            break
    assert (stopped, progress.best, progress.best_epoch) == (7, 0.7, 4)


def test_a_constant_rate_stays_constant_and_nan_is_never_best():
    train, progress = Train(lr=0.1, schedule="constant", plateau_patience=0), Progress()
    for epoch, value in enumerate([float("nan"), 0.5, 0.5, 0.5]):
        progress = progress.after(value, epoch, train, larger_is_better=True)
    assert progress.best == 0.5 and progress.best_epoch == 1
    assert learning_rate(train, 100, 10, progress.plateau_scale) == 0.1


def test_smaller_is_better_for_losses():
    progress = Progress().after(1.0, 0, Train(), larger_is_better=False).after(0.5, 1, Train(), larger_is_better=False)
    assert progress.best == 0.5


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_vectors_do_not_decay(name):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = build_optimizer(model, Train(optimizer=name, weight_decay=0.1))
    assert [len(g["params"]) for g in optimizer.param_groups] == [1, 3]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_a_gradient_in_another_memory_format_reaches_its_own_weights(name):
    """As torch's loop does it, one weight at a time."""
    torch.manual_seed(0)
    start, gradient = torch.randn(8, 4, 3, 3), torch.randn(8, 4, 3, 3)
    ends = []
    for memory in (torch.contiguous_format, torch.channels_last):
        model = torch.nn.Conv2d(4, 8, 3, bias=False).to(memory_format=memory)
        model.weight.data.copy_(start)
        optimizer = build_optimizer(model, Train(optimizer=name, lr=0.1))
        assert optimizer.defaults["fused"]
        for _ in range(3):
            model.weight.grad = gradient.clone()
            match_layouts(optimizer)
            optimizer.step()
        ends.append(model.weight.detach().clone())
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name]
    weight = torch.nn.Parameter(start.clone())
    more = {"momentum": 0.9, "nesterov": True} if name == "sgd" else {}
    plain = kind([weight], lr=0.1, weight_decay=Train().weight_decay, foreach=False, **more)
    for _ in range(3):
        weight.grad = gradient.clone()
        plain.step()
    for end in ends:
        assert torch.allclose(end, weight, rtol=1e-5, atol=1e-6)


def test_exact_gradients_lie_in_memory_as_their_weights():
    model = torch.nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    images = torch.randn(4, 4, 8, 8)

    def backward(rows, _):
        loss = model(images[rows]).square().sum()
        loss.backward()
        return loss.detach()

    exact.gradients(model, 4, 0, 1, backward)
    assert model.weight.grad.stride() == model.weight.stride()
    plain = torch.autograd.grad(model(images).square().sum(), model.weight)[0]
    assert torch.allclose(model.weight.grad, plain, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_factors_of_the_learning_rate_are_factors_of_the_update(kind):
    """With plain SGD an update is the gradient times the rate; a rate that is set anew keeps the factors."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    train = Train(optimizer=kind, lr=0.1, momentum=0.0, lr_factors={"0": 0.5, "0.bias": 0.25})
    optimizer = build_optimizer(model, train)
    set_rate(optimizer, 0.2)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    expected = {"0.weight": 0.1, "0.bias": 0.05, "1.weight": 0.2, "1.bias": 0.2}
    assert {name: rates[id(p)] for name, p in model.named_parameters()} == pytest.approx(expected)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        if kind == "sgd":
            torch.testing.assert_close(p.detach(), before[name] - expected[name] * p.grad)
        else:  # the first update of Adam is the rate, whatever the gradient
            torch.testing.assert_close(
                (p.detach() - before[name]).abs(), torch.full_like(p, expected[name]), rtol=1e-3, atol=1e-6
            )
