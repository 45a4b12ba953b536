"""Random programs on random modules: a scan has the shapes of what plain hooks give, and leaves the model alone."""

from __future__ import annotations

import torch
from hypothesis import given
from torch import nn

from tests import leaks
from tests.properties.test_live_programs import SETTINGS, SHAPE, Program, RunByHooks, RunLive, _cases


class RunScan(RunLive):
    def __init__(self, model: nn.Module, program: Program) -> None:
        super().__init__(model, program)
        # The program is the same; only the way in is another.
        object.__setattr__(self.model, "trace", self.model.scan)


@SETTINGS
@given(_cases())
def test_a_scan_has_the_shapes_of_what_hooks_give(case: tuple[nn.Module, Program]) -> None:
    model, program = case
    x = torch.linspace(-1, 1, 6).reshape(SHAPE)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with leaks.watching([model]) as watch:
        hooked, scanned = RunByHooks(model, program), RunScan(model, program)
        hooked.run(x)
        scanned.run(x)
        for one, other in zip(scanned.saved, hooked.saved, strict=True):
            assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
            assert one.requires_grad == other.requires_grad
    assert not watch.complaints()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
