"""The confusion matrix and its numbers against scikit-learn."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from scalecv.metrics import confusion as numbers
from scalecv.schema import IGNORE

pairs = st.integers(2, 6).flatmap(
    lambda k: st.tuples(
        st.just(k), st.lists(st.tuples(st.integers(0, k - 1), st.integers(0, k - 1)), min_size=1, max_size=60)
    )
)


@settings(max_examples=60, deadline=None)
@given(pairs)
def test_equal_to_scikit_learn(drawn):
    k, rows = drawn
    truth, said = (np.array(column) for column in zip(*rows, strict=True))
    matrix = numbers.confusion(torch.tensor(said), torch.tensor(truth), k)
    assert np.array_equal(matrix.numpy(), reference.confusion_matrix(truth, said, labels=range(k)))
    options = {"zero_division": 0.0}
    assert numbers.accuracy(matrix) == pytest.approx(reference.accuracy_score(truth, said))
    assert numbers.macro_f1(matrix) == pytest.approx(reference.f1_score(truth, said, average="macro", **options))
    recall = reference.recall_score(truth, said, labels=np.unique(truth), average="macro", **options)
    assert numbers.macro_accuracy(matrix) == pytest.approx(recall)
    iou = reference.jaccard_score(truth, said, average="macro", **options)
    if k == 2:
        iou = reference.jaccard_score(truth, said, pos_label=1, labels=[0, 1], **options)
    assert numbers.mean_iou(matrix) == pytest.approx(iou)
    precision, recall, f1, support = reference.precision_recall_fscore_support(truth, said, labels=range(k), **options)
    each = numbers.per_class(matrix)
    for name, expected in (("precision", precision), ("recall", recall), ("f1", f1), ("support", support)):
        assert each[name].numpy() == pytest.approx(expected)


def test_what_is_not_labelled_or_not_valid_counts_nowhere():
    truth = torch.tensor([[[0, 1], [IGNORE, 1]], [[0, 0], [1, 1]]])
    said = torch.tensor([[[0, 0], [1, 1]], [[1, 1], [0, 0]]])
    matrix = numbers.confusion(said, truth, 2, torch.tensor([True, False]))
    assert matrix.tolist() == [[1, 0], [1, 1]]
    assert matrix.dtype == torch.int64


def test_empty_is_zero():
    matrix = numbers.confusion(torch.zeros(2, dtype=torch.long), torch.full((2,), IGNORE), 3)
    assert matrix.sum() == 0
    assert numbers.accuracy(matrix) == numbers.macro_accuracy(matrix) == numbers.macro_f1(matrix) == 0
    assert numbers.mean_iou(matrix) == 0


def test_a_target_that_is_no_class_is_an_error():
    with pytest.raises(ValueError, match=r"outside 0\.\.1"):
        numbers.confusion(torch.tensor([0]), torch.tensor([7]), 2)
    with pytest.raises(ValueError, match="differ in shape"):
        numbers.confusion(torch.tensor([0, 1]), torch.tensor([1]), 2)


def test_always():
    matrix = torch.tensor([[5, 1, 0], [4, 2, 0], [0, 0, 9]])
    assert numbers.always(matrix, 0).tolist() == [[6, 0, 0], [6, 0, 0], [9, 0, 0]]
