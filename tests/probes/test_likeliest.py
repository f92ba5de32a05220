"""The likeliest tokens, found by groups of logits, against one sort of all logits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechvlm.probes.likeliest import LOGITS_PER_GROUP, largest, top_tokens


@given(
    st.integers(0, 10**6),
    st.integers(1, 9),
    st.sampled_from([1, 50, 128, 1000, 1024, 1300, 9217, 12_000]),
    st.booleans(),
)
def test_the_largest_are_those_of_a_sort(seed, k, d_vocab, clustered):
    """Also where all large logits lie in one group, or in what is left over behind the groups."""
    k, draw = min(k, d_vocab), torch.Generator().manual_seed(seed)
    logits = torch.stack([torch.randperm(d_vocab, generator=draw) for _ in range(3)]).float()
    if clustered:
        logits = torch.cat([logits.sort(-1).values, logits.sort(-1, descending=True).values])
    assert torch.equal(largest(logits, k), logits.sort(-1, descending=True).indices[:, :k])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 5])
def test_top_tokens_are_those_of_the_softmax_of_all_states(dtype, k):
    draw = torch.Generator().manual_seed(0)
    states, unembed = torch.randn(70, 16, generator=draw), torch.randn(16, 40 * LOGITS_PER_GROUP + 7, generator=draw)
    logits = (states.to(dtype) @ unembed.to(dtype)).float()
    ids, probs = top_tokens(states.to(dtype), lambda x: x @ unembed.to(dtype), k)
    expected = logits.softmax(-1).topk(k)
    torch.testing.assert_close(probs, expected.values, rtol=1e-6, atol=1e-7)
    assert probs.dtype == torch.float32
    # In half precision logits are equal now and then; any of them may then stand first.
    torch.testing.assert_close(logits.gather(-1, ids), logits.gather(-1, expected.indices), rtol=0, atol=0)
    if dtype == torch.float32:
        assert torch.equal(ids, expected.indices)


def test_equal_logits_give_tokens_that_differ():
    ids = largest(torch.zeros(2, 40 * LOGITS_PER_GROUP), 4)
    assert all(len(set(row)) == 4 for row in ids.tolist())


def test_a_chance_too_small_for_float32_still_has_its_token():
    """The order is that of the logits, where probabilities are all 0 but one."""
    logits = torch.full((1, 40 * LOGITS_PER_GROUP), -1000.0)
    logits[0, 7], logits[0, 3000], logits[0, 500] = 1000.0, 500.0, 400.0
    ids, probs = top_tokens(logits, lambda x: x, 3)
    assert ids.tolist() == [[7, 3000, 500]]
    assert probs.tolist() == [[1.0, 0.0, 0.0]]
