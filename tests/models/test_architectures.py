"""Every architecture by name: it takes a training step, and ONNX and torch.export give its logits."""

import pytest

from tests.reference import architectures

pytestmark = [pytest.mark.chaos, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("arch", architectures.names())
def test_it_trains_and_is_exported(arch):
    line = architectures.row(arch)
    assert line.count("| yes") == 3, line
