"""A layer's reading of a micro-batch is a value: nobody changes it after it was said."""

from dataclasses import FrozenInstanceError

import pytest
import torch

from megatron_idpo.plugin.layer_output import LayerOutput


def test_an_output_is_immutable():
    output = LayerOutput(3, 0, torch.zeros(2), None, None)
    assert (output.layer, output.micro_batch, output.loss_P) == (3, 0, None)
    with pytest.raises(FrozenInstanceError):
        output.layer = 4
