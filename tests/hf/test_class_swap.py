"""The class of one instance is swapped and restored; copies and pickles of the instance are swapped too."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from patchkernels.hf.class_swap import SwappedClass, restore_class, swap_class


class Doubled(SwappedClass):
    """Doubles what a module returns, and counts the calls in the state."""

    @classmethod
    def attributes_for(cls, original_class):
        return {"name_of_original": original_class.__name__}

    def forward(self, input):
        self._patch_state["calls"] += 1
        return 2 * super().forward(input)


def test_swapped_and_restored():
    linear, other, state = nn.Linear(3, 2), nn.Linear(3, 2), {"calls": 0}
    x, keys = torch.randn(4, 3), list(linear.state_dict())
    expected = linear(x)
    swap_class(linear, Doubled, state)
    assert torch.equal(linear(x), 2 * expected)
    assert state["calls"] == 1
    assert isinstance(linear, nn.Linear) and list(linear.state_dict()) == keys
    assert type(linear).__name__ == type(linear).name_of_original == "Linear"
    swap_class(other, Doubled, state)
    assert type(other) is type(linear)
    with pytest.raises(ValueError, match="a Linear of this model is part of another enabled model"):
        swap_class(linear, Doubled, {"calls": 0})
    assert linear._patch_state is state
    for _ in range(2):  # the second time has no effect
        restore_class(linear)
        assert type(linear) is nn.Linear
        assert not any(name.startswith("_patch") for name in vars(linear))
    assert torch.equal(linear(x), expected)


def test_copies_run_on_their_own_weights_and_state():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    x, state = torch.randn(4, 3), {"calls": 0}
    for linear in model:
        swap_class(linear, Doubled, state)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other[0]) is type(model[0])
        assert torch.equal(other(x), expected)
        assert other[0]._patch_state is other[1]._patch_state is not state
        with torch.no_grad():
            other[1].weight.zero_(), other[1].bias.zero_()
        assert not other(x).any()
    assert state["calls"] == 2
    assert torch.equal(model(x), expected)
