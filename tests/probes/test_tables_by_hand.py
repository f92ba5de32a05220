"""Parts of probes on values by hand: tables, names, which queries and which tokens count."""

import math

import pytest
import torch

import mechvlm as mv
from helpers.images import noise_image
from mechvlm.decoder.attention import Attention
from mechvlm.probes.likelihood import LikelihoodPlan
from mechvlm.probes.probe import Queried
from mechvlm.probes.query_reading import QueryPlan


def test_a_row_of_the_lens_table_is_one_entry():
    ids = torch.arange(2 * 3 * 2).reshape(2, 3, 2)
    lens = mv.LogitLensResult(
        ids, ids / 100, states=(0, 4), example=torch.tensor([0, 1, 1]), position=torch.tensor([7, 5, 9]),
        vocabulary=tuple((i, f" w{i}") for i in range(12)), final_norm=True, model="m",
    )  # fmt: skip
    frame = lens.to_frame()
    keys = ["state", "example", "position", "rank", "token"]
    expected = [
        (state, example, position, rank + 1, int(ids[s, point, rank]))
        for s, state in enumerate((0, 4))
        for point, (example, position) in enumerate([(0, 7), (1, 5), (1, 9)])
        for rank in range(2)
    ]
    assert list(frame[keys].itertuples(index=False, name=None)) == expected


def test_the_positions_of_one_name_are_numbered_from_0(llava_vlm):
    inputs = llava_vlm.inputs(noise_image(0), "what is this")
    plan = mv.NormAttention(dst="image").prepare(llava_vlm, inputs)
    assert plan.names == tuple(f"image {i}" for i in range(len(inputs.tokens.image)))
    assert plan.dest[0].tolist() == inputs.tokens.image.tolist()


def test_queries_stand_before_the_instruction():
    """Two queries and one token of the instruction, over the class token and a grid of 1 x 2."""
    q = torch.tensor([[[[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]]]])
    k = torch.tensor([[[[0.5, 0.0], [1.0, 0.0], [0.0, 1.0]]]])
    row = mv.QueryReading().at_queries(QueryPlan(2, 1, 2), Queried(0, Attention(q, k, k, None, 0.5)))
    naive = torch.stack([torch.tensor([0.25, 0.5, 0.0]), torch.tensor([0.0, 0.0, 1.0])]).softmax(-1)[:, 1:]
    torch.testing.assert_close(row["weight"][0, :, 0], naive)


def test_only_the_texts_own_tokens_count(llava_vlm):
    """The first text has one token, the second three."""
    logprob = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]])
    inputs = llava_vlm.inputs([noise_image(0), noise_image(1)], "what is this")
    plan = LikelihoodPlan(3, torch.zeros(2, 3, dtype=torch.long))
    result = mv.Likelihood((1, 3)).result(plan, [{"logprob": logprob}], llava_vlm, inputs)
    assert result.total.tolist() == pytest.approx([-3.0, -15.0])
    assert [math.isnan(value) for value in result.logprob[0].tolist()] == [True, True, False]
