"""Losses against hand-worked cases, against torch, and at their edges."""

import math

import numpy as np
import pytest
import torch

from scalecv.models import losses
from scalecv.schema import IGNORE

SEGMENT = {
    "cross_entropy": losses.cross_entropy,
    "bce": losses.bce,
    "dice": losses.dice,
    "jaccard": losses.jaccard,
    "focal": losses.focal,
}


def binary(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype).view(1, 1, 1, -1)


def mask(values):
    return torch.tensor(values).view(1, 1, -1)


def close(found, expected):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), atol=1e-6, rtol=0)


def test_cross_entropy_by_hand():
    logits = torch.log(torch.tensor([[0.7, 0.2, 0.1], [0.25, 0.5, 0.25]]))
    close(losses.cross_entropy(logits, torch.tensor([0, 2])), [-math.log(0.7), -math.log(0.25)])
    weights = torch.tensor([2.0, 1.0, 0.5])
    close(
        losses.cross_entropy(logits, torch.tensor([0, 2]), weights),
        [-2 * math.log(0.7), -0.5 * math.log(0.25)],
    )
    smooth = -(0.9 * math.log(0.7) + 0.1 / 3 * (math.log(0.7) + math.log(0.2) + math.log(0.1)))
    close(losses.cross_entropy(logits[:1], torch.tensor([0]), None, 0.1), [smooth])


def test_cross_entropy_is_averaged_over_labelled_pixels():
    logits = torch.log(torch.tensor([0.5, 0.25, 0.25])).view(1, 3, 1, 1).expand(1, 3, 1, 4)
    close(losses.cross_entropy(logits, mask([0, 1, IGNORE, IGNORE])), [(math.log(2) + math.log(4)) / 2])


def test_one_logit_stands_for_two_classes():
    z, y = torch.randn(3, 1, 4, 5), torch.randint(0, 2, (3, 4, 5))
    two = torch.cat([torch.zeros_like(z), z], 1)
    close(losses.cross_entropy(z, y), losses.bce(z, y))
    for term in SEGMENT.values():
        close(term(z, y), term(two, y))
    weights = torch.tensor([0.3, 2.0])
    close(losses.cross_entropy(z, y, weights, 0.1), losses.cross_entropy(two, y, weights, 0.1))


def test_bce_by_hand():
    z = binary([math.log(3.0), 0.0])  # p = 0.75 and 0.5
    close(losses.bce(z, mask([1, 0])), [(-math.log(0.75) + math.log(2)) / 2])
    close(losses.bce(z, mask([1, 0]), pos_weight=4.0), [(-4 * math.log(0.75) + math.log(2)) / 2])
    close(losses.bce(torch.tensor([[1.0, 1.0 + math.log(3.0)]]), torch.tensor([1])), [-math.log(0.75)])


def test_dice_and_jaccard_by_hand():
    z = binary([math.log(3.0), 0.0, math.log(3.0)])  # p = 0.75, 0.5, 0.75
    y = mask([1, 0, IGNORE])
    close(losses.dice(z, y), [1 - (2 * 0.75 + 1) / (1.25 + 1 + 1)])
    close(losses.jaccard(z, y), [1 - (0.75 + 1) / (1.25 + 1 - 0.75 + 1)])
    three = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]).T.reshape(1, 3, 1, 2))
    # Sums of p: 0.75, 0.75, 0.5; truth is class 0, then class 1.
    dice = [1 - (2 * 0.5 + 1) / (0.75 + 1 + 1), 1 - (2 * 0.5 + 1) / (0.75 + 1 + 1), 1 - 1 / (0.5 + 1)]
    close(losses.dice(three, mask([0, 1])), [sum(dice) / 3])


def test_focal_by_hand():
    z = binary([math.log(3.0), 0.0])
    expected = (0.25**2 * -math.log(0.75) + 0.5**2 * math.log(2)) / 2
    close(losses.focal(z, mask([1, 0]), gamma=2.0), [expected])
    close(losses.focal(z, mask([1, 0]), gamma=0.0), losses.bce(z, mask([1, 0])))
    scores = torch.log(torch.tensor([[0.7, 0.2, 0.1]]))
    close(losses.focal(scores, torch.tensor([1]), gamma=1.0), [0.8 * -math.log(0.2)])


@pytest.mark.parametrize(("name", "classes"), [(n, k) for n in SEGMENT for k in (1, 3) if (n, k) != ("bce", 3)])
def test_gradients_are_right(name, classes):
    z = torch.randn(2, classes, 2, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, max(2, classes), (2, 2, 3))
    y[0, 0, 0] = IGNORE
    assert torch.autograd.gradcheck(lambda x: SEGMENT[name](x, y), (z,))


@pytest.mark.parametrize("name", SEGMENT)
@pytest.mark.parametrize("size", [-50.0, 0.0, 50.0])
@pytest.mark.parametrize("target", [0, 1, IGNORE])
def test_finite_with_finite_gradient_everywhere(name, size, target):
    z = torch.full((2, 1, 4, 4), size, requires_grad=True)
    loss = SEGMENT[name](z, torch.full((2, 4, 4), target))
    loss.sum().backward()
    assert loss.shape == (2,) and loss.dtype == torch.float32
    assert torch.isfinite(loss).all() and torch.isfinite(z.grad).all()
    if target == IGNORE:
        assert (loss == 0).all() and (z.grad == 0).all()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_has_a_finite_gradient_where_it_is_sure(gamma):
    z = torch.tensor([[50.0, -50.0], [-50.0, 50.0]], requires_grad=True)
    losses.focal(z, torch.tensor([0, 0]), gamma).sum().backward()
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("name", ["dice", "jaccard"])
def test_an_image_without_positives_has_a_gradient(name):
    z = torch.full((1, 1, 16, 16), -1.0, requires_grad=True)
    SEGMENT[name](z, torch.zeros(1, 16, 16, dtype=torch.long)).sum().backward()
    assert (z.grad > 0).all()


@pytest.mark.parametrize("name", SEGMENT)
def test_what_lies_under_ignored_pixels_does_not_matter(name):
    z, y = torch.randn(2, 1, 4, 4), torch.randint(0, 2, (2, 4, 4))
    y[:, :2] = IGNORE
    other = z.clone()
    other[:, :, :2] = 30.0
    close(SEGMENT[name](z, y), SEGMENT[name](other, y))
    close(SEGMENT[name](z, y), SEGMENT[name](z[:, :, 2:], y[:, 2:]))


@pytest.mark.parametrize("name", SEGMENT)
def test_float32_also_under_autocast(name):
    z, y = torch.randn(2, 1, 4, 4), torch.randint(0, 2, (2, 4, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = SEGMENT[name](z, y)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, SEGMENT[name](z, y))
    assert SEGMENT[name](z.bfloat16(), y).dtype == torch.float32


def test_weighted_is_the_sum_of_terms():
    terms = {"bce": torch.tensor([1.0, 2.0]), "dice": torch.tensor([0.5, 0.25])}
    close(losses.weighted(terms, {"bce": 0.3, "dice": 2.0}), [1.3, 1.1])
    with pytest.raises(ValueError, match="need a weight"):
        losses.weighted(terms, {"bce": 1.0})


def test_balanced_weights_are_those_of_scikit_learn():
    from sklearn.utils.class_weight import compute_class_weight

    labels = [0] * 6 + [1] * 3 + [2]
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    close(losses.balanced_weights([6, 3, 1]), expected)
    close(losses.balanced_weights([6, 0, 2]), [8 / 12, 0.0, 2.0])
