"""States that are not finite: the examples and the first layer are named; padding is not."""

import pytest
import torch

from helpers.uneven import uneven
from mechvlm.errors import NonFiniteError
from mechvlm.tracing.reading import _refuse_nonfinite, is_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_seen_and_padding_is_not(dtype, value):
    real = torch.tensor([[False, True, True], [True, True, True], [False, False, True]])
    resid = uneven(3, 3, 4).to(dtype)
    assert is_finite(resid, real).tolist() == [True] * 3
    resid[0, 0, 3] = resid[2, 1, 0] = value  # padding
    assert is_finite(resid, real).tolist() == [True] * 3
    resid[1, 0, 2] = value
    assert is_finite(resid, real).tolist() == [True, False, True]


def test_large_halves_are_finite():
    assert is_finite(torch.full((1, 1, 8), 60000.0, dtype=torch.float16), torch.ones(1, 1, dtype=torch.bool)).all()


def test_the_examples_and_the_first_layer_are_named(llava_vlm):
    finite = torch.ones(4, 5, dtype=torch.bool)  # states, examples
    finite[2:, 1] = finite[3:, 4] = False
    where = r"from the output of layer 1 \(of layers 0 to 2\) on, in example\(s\) \[1, 4\]. The weights of that layer"
    with pytest.raises(NonFiniteError, match=where) as raised:
        _refuse_nonfinite(finite, llava_vlm, 0)
    assert raised.value.examples == (1, 4)
    finite[0, 4] = False
    where = r"from the embeddings that enter the decoder on, in example\(s\) \[11, 14\]. The decoder's input"
    with pytest.raises(NonFiniteError, match=where) as raised:
        _refuse_nonfinite(finite, llava_vlm, 10)  # the examples of a later batch
    assert raised.value.examples == (11, 14)
