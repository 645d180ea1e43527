"""Losses against hand-worked cases, against torch, and at their edges."""

import math

import numpy as np
import pytest
import torch

from scalecv.config import Loss
from scalecv.models import losses
from scalecv.schema import IGNORE
from scalecv.tasks import TASKS

SEGMENT = {
    "cross_entropy": losses.cross_entropy,
    "bce": losses.bce,
    "dice": losses.dice,
    "jaccard": losses.jaccard,
    "tversky": losses.tversky,
    "lovasz": losses.lovasz,
    "pos_neg_iou": losses.pos_neg_iou,
    "focal": losses.focal,
    "weighted_bce": lambda z, y: losses.bce(z, y, 3.0, 0.5),
    "focal_alpha": lambda z, y: losses.focal(z, y, 2.0, 0.25),
}
TWO_CLASSES = ("bce", "weighted_bce", "pos_neg_iou", "focal_alpha")


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


FITTING = [(name, classes) for name in SEGMENT for classes in (1, 3) if classes == 1 or name not in TWO_CLASSES]


@pytest.mark.parametrize(("name", "classes"), FITTING)
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


SQUARE = [[math.log(3.0), 0.0], [-math.log(3.0), math.log(3.0)]]
"""Logits of 2x2 pixels with p = 3/4, 1/2, 1/4, 3/4."""
TRUTH = [[1, 0], [0, 0]]


def square(dtype=torch.float64):
    return torch.tensor(SQUARE, dtype=dtype).view(1, 1, 2, 2), torch.tensor(TRUTH).view(1, 2, 2)


def test_bce_focal_neg_iou_by_hand():
    """0.3 BCE (pos 2, neg 1) + 0.3 focal (gamma 2, no alpha) + 0.4 (0.85 IoU+ + 0.15 IoU-), each IoU as 1 - IoU."""
    z, y = square()
    loss = Loss(name="bce_focal_neg_iou")
    batch = {"mask": y, "valid": torch.tensor([True])}
    terms = TASKS["segment"].losses(z, batch, loss, None)
    ln = math.log
    bce = (-2 * ln(3 / 4) - ln(1 / 2) - ln(3 / 4) - ln(1 / 4)) / 4
    focal = (-(1 / 16) * ln(3 / 4) - (1 / 4) * ln(1 / 2) - (1 / 16) * ln(3 / 4) - (9 / 16) * ln(1 / 4)) / 4
    # Foreground: 0.75 inside, 2.25 predicted, 1 true. Background: 0.5 + 0.75 + 0.25 inside, 1.75 predicted, 3 true.
    pos = (0.75 + 1) / (2.25 + 1 - 0.75 + 1)
    neg = (1.5 + 1) / (1.75 + 3 - 1.5 + 1)
    areas = 0.85 * (1 - pos) + 0.15 * (1 - neg)
    assert loss.terms() == {"bce": 0.3, "focal": 0.3, "pos_neg_iou": 0.4}
    for name, expected in {"bce": bce, "focal": focal, "pos_neg_iou": areas}.items():
        close(terms[name], [expected])
    close(losses.weighted(terms, loss.terms()), [0.3 * bce + 0.3 * focal + 0.4 * areas])


def test_tversky_and_the_weights_by_hand():
    z, y = square()
    # 0.75 inside, 1.5 false alarms, 0.25 missed.
    close(losses.tversky(z, y, 0.3, 0.7), [1 - 1.75 / (0.75 + 0.3 * 1.5 + 0.7 * 0.25 + 1)])
    close(losses.tversky(z, y, 1.0, 1.0), losses.jaccard(z, y))
    close(losses.tversky(z, y, 0.5, 0.5, 0.5), losses.dice(z, y, 1.0))
    close(losses.jaccard(z, y, smooth=0.5), [1 - 1.25 / 3.0])
    close(losses.bce(z, y, 1.0, 0.5), [(-math.log(3 / 4) + 0.5 * math.log(2 * 4 / 3 * 4)) / 4])
    one = losses.focal(z[..., :1, :1], y[:, :1, :1], 2.0)
    close(losses.focal(z[..., :1, :1], y[:, :1, :1], 2.0, 0.25), 0.25 * one)
    close(losses.focal(z, 0 * y, 2.0, 0.25), 0.75 * losses.focal(z, 0 * y, 2.0))


def test_lovasz_by_hand():
    z = torch.tensor([[0.5, 2.0], [-3.0, -0.25]], dtype=torch.float64).view(1, 1, 2, 2)
    # Hinge errors 0.5 (a positive), 3, 0 and 0.75 (negatives): sorted 3, 0.75, 0.5 lose 1/2, 2/3, 1 of the IoU.
    close(losses.lovasz(z, torch.tensor(TRUTH).view(1, 2, 2)), [3 / 2 + 0.75 * (2 / 3 - 1 / 2) + 0.5 / 3])
    nothing = torch.zeros(1, 2, 2, dtype=torch.long)
    close(losses.lovasz(z, nothing), [3.0])


@pytest.mark.parametrize("classes", [1, 3])
def test_lovasz_tversky_and_focal_are_those_of_segmentation_models_pytorch(classes):
    from segmentation_models_pytorch.losses import FocalLoss, LovaszLoss, TverskyLoss

    mode = "binary" if classes == 1 else "multiclass"
    z, y = torch.randn(1, classes, 8, 8), torch.randint(0, max(2, classes), (1, 8, 8))
    truth = y.unsqueeze(1).float() if classes == 1 else y
    marked = y.clone()
    marked[:, :3] = IGNORE
    close(losses.lovasz(z, y), [LovaszLoss(mode, per_image=True)(z, truth).item()])
    other = LovaszLoss(mode, per_image=True, ignore_index=IGNORE)(z, marked.float() if classes == 1 else marked)
    close(losses.lovasz(z, marked), [other.item()])
    theirs = TverskyLoss(mode, smooth=1.0, alpha=0.3, beta=0.7)(z, truth).item()
    close(losses.tversky(z, y, 0.3, 0.7), [theirs])
    if classes == 1:
        close(losses.focal(z, y, 2.0, 0.25), [FocalLoss(mode, alpha=0.25, gamma=2.0)(z, truth).item()])


@pytest.mark.parametrize("size", [-50.0, 0.0, 50.0])
@pytest.mark.parametrize("name", SEGMENT)
def test_no_gradient_is_lost_on_an_empty_tile(name, size):
    """Right at -50, wrong at 50: finite at both, and no pixel is without a gradient while any is wrong."""
    z = torch.full((2, 1, 16, 16), size, requires_grad=True)
    value = SEGMENT[name](z, torch.zeros(2, 16, 16, dtype=torch.long))
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(z.grad).all() and (z.grad >= 0).all()
    if name == "lovasz":  # a hinge: nothing where the margin is kept, and the largest error alone elsewhere
        assert (z.grad != 0).any() == (size > -1)
    else:
        assert (z.grad != 0).all()


@pytest.mark.parametrize(("name", "classes"), FITTING)
def test_ignored_pixels_have_exactly_no_gradient(name, classes):
    z = (5 * torch.randn(2, classes, 8, 8)).requires_grad_()
    y = torch.randint(0, max(2, classes), (2, 8, 8))
    y[:, :3], y[1] = IGNORE, IGNORE
    SEGMENT[name](z, y).sum().backward()
    assert (z.grad[0, :, :3] == 0).all() and (z.grad[1] == 0).all() and (z.grad[0, :, 3:] != 0).any()


def test_balanced_weights_are_those_of_scikit_learn():
    from sklearn.utils.class_weight import compute_class_weight

    labels = [0] * 6 + [1] * 3 + [2]
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    close(losses.balanced_weights([6, 3, 1]), expected)
    close(losses.balanced_weights([6, 0, 2]), [8 / 12, 0.0, 2.0])
