from functools import partial

import pytest

from tests.small import fields, fields_dataset, shapes, shapes_dataset, write_net

__all__ = ["fields", "fields_dataset", "shapes", "shapes_dataset"]


@pytest.fixture
def net(tmp_path, monkeypatch):
    """A function that writes a network of one's own which acts at some call, and gives the keys for it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return partial(write_net, tmp_path)
