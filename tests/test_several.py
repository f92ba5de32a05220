"""Several batches at once: every method and experiment gives what one batch of all examples gives.

So do results that are joined by `concat`, and batches that were halved for lack of memory.
"""

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import mechvlm as mv
from helpers.forwards import out_of_memory_above
from helpers.images import noise_image
from helpers.unchecked import unchecked
from mechvlm.datasets import Pair
from mechvlm.tracing.memory import out_of_memory

PROMPTS = ["what is this", "describe the scene . a what is this", "a", "is this a what"]
NAMES = ["cat", "dog", "eel", "fox"]
ANSWERS = ["what", "is", "this", "scene"]
PICTURES = [noise_image(i) for i in range(4)]
BOXES = [(10, 10, 60, 50)] * 4


def made(vlm, batch_size=None):
    return vlm.inputs(PICTURES, PROMPTS, batch_size, NAMES)


def others(vlm, batch_size):
    """The same questions of other pictures."""
    return vlm.inputs([noise_image(i) for i in range(4, 8)], PROMPTS, batch_size)


def likelihood(vlm, inputs, numbers):
    answered, lengths = vlm.answered(inputs, [["a", "what is", "this", "scene ."][i] for i in numbers])
    return mv.read(vlm, answered, mv.Likelihood(lengths))[0]


METHODS = {
    "lens": lambda vlm, inputs, _: mv.logit_lens(vlm, inputs, k=2, positions="text"),
    "contextualization": lambda vlm, inputs, _: mv.contextualization(vlm, inputs),
    "less baseline": lambda vlm, inputs, _: mv.contextualization(vlm, inputs, subtract_baseline=True),
    "norms": lambda vlm, inputs, _: mv.norm_attention(vlm, inputs),
    "all pairs": lambda vlm, inputs, _: mv.norm_attention(vlm, inputs, dst="all pairs"),
    "reading": lambda vlm, inputs, _: mv.query_reading(vlm, inputs),
    "attribution": lambda vlm, inputs, i: mv.logit_attribution(vlm, inputs, [ANSWERS[n] for n in i], "a"),
    "flow": lambda vlm, inputs, i: mv.information_flow(vlm, inputs, [ANSWERS[n] for n in i], window=2),
    "trace": lambda vlm, inputs, _: mv.causal_trace(vlm, inputs, "a", corrupt="blank"),
    "heads": lambda vlm, inputs, i: mv.head_ablation(vlm, inputs, [ANSWERS[n] for n in i], positions="last"),
}  # fmt: skip
ALL_AT_ONCE = {
    "other image": lambda vlm, inputs: mv.causal_trace(vlm, inputs, ANSWERS, corrupt="image"),
    "noise": lambda vlm, inputs: mv.causal_trace(vlm, inputs),
    "ablation": lambda vlm, inputs: mv.object_ablation(vlm, inputs, BOXES, ANSWERS, margins=[0], draws=2),
    "mean heads": lambda vlm, inputs: mv.head_ablation(vlm, inputs, ANSWERS, "mean", sets={"a": [(0, 1), (1, 2)]}, draws=1),
    "resampled heads": lambda vlm, inputs: mv.head_ablation(vlm, inputs, ANSWERS, "resample", sets={"a": [(0, 1)]}, draws=1),
    "grid": lambda vlm, inputs: mv.patch_grid(vlm, inputs, others(vlm, len(inputs)), 7, 9, positions=["image", "last"]),
    "neurons": lambda vlm, inputs: mv.multimodal_neurons(vlm, inputs, ANSWERS, k=2),
}  # fmt: skip


def close(result, expected) -> None:
    """Equal in type, settings, texts and whole numbers; other numbers to rounding."""
    assert type(result) is type(expected)
    for f in dataclasses.fields(expected):
        got, want = getattr(result, f.name), getattr(expected, f.name)
        if isinstance(want, Tensor) and want.is_floating_point():
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)
        elif isinstance(want, Tensor):
            assert torch.equal(got, want), f.name
        else:
            assert got == want, f.name


@pytest.fixture(scope="module", params=["llava_vlm", "blip_vlm"])
def vlm(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def four(vlm):
    return made(vlm)


@pytest.mark.parametrize("name", METHODS)
def test_joined_parts_are_the_whole(vlm, four, name):
    """Wherever the batch is split: the parts are padded less than the whole."""
    method = METHODS[name]
    if name == "reading" and not vlm.cross_attentions:
        return
    whole = method(vlm, four, range(4))
    for cuts in ([1], [2], [1, 3]) if name not in ("flow", "trace", "heads") else ([2],):
        if name == "less baseline" and cuts != [2]:
            continue  # a single example has no baseline
        ends = [0, *cuts, 4]
        parts = [method(vlm, four[a:b], range(a, b)) for a, b in pairwise(ends)]
        joined = mv.concat(parts)
        close(joined, whole)
        assert joined.example_ids == tuple(NAMES)
    close(method(vlm, made(vlm, batch_size=3), range(4)), whole)
    if name == "lens":
        close(method(vlm, [four[:3], four[3]], range(4)), whole)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_joined_likelihoods_are_the_whole(vlm, four, cut):
    joined = mv.concat([likelihood(vlm, four[:cut], range(cut)), likelihood(vlm, four[cut:], range(cut, 4))])
    close(joined, likelihood(vlm, four, range(4)))
    batches, lengths = zip(
        vlm.answered(four[:cut], ANSWERS[:cut]), vlm.answered(four[cut:], ANSWERS[cut:]), strict=True
    )
    (read,) = mv.read(vlm, list(batches), mv.Likelihood([n for part in lengths for n in part]))
    answered, lengths = vlm.answered(four, ANSWERS)
    close(read, mv.read(vlm, answered, mv.Likelihood(lengths))[0])


@pytest.mark.parametrize("name", ALL_AT_ONCE)
def test_experiments_take_batches(vlm, four, name):
    method = ALL_AT_ONCE[name]
    close(method(vlm, made(vlm, batch_size=3)), method(vlm, four))


def test_winoground_results_are_joined_by_pair(llava_vlm):
    pairs = [Pair(f"p{i}", (noise_image(2 * i), noise_image(2 * i + 1)), ("a what", "what a")) for i in range(3)]
    whole = mv.winoground(llava_vlm, pairs)
    close(mv.concat([mv.winoground(llava_vlm, pairs[:1]), mv.winoground(llava_vlm, pairs[1:])]), whole)


def test_tables_number_examples_through_and_name_them(llava_vlm, four_llava):
    batches = made(llava_vlm, batch_size=3)
    results = [
        *mv.read(llava_vlm, batches, mv.LogitLens(k=1), mv.Contextualization(), mv.NormAttention(), mv.LogitAttribution("a")),
        mv.information_flow(llava_vlm, batches, "a"), mv.causal_trace(llava_vlm, batches, "a"),
        mv.object_ablation(llava_vlm, batches, BOXES, "a", margins=[0], draws=1),
        mv.multimodal_neurons(llava_vlm, batches, "a", k=1),
    ]  # fmt: skip
    for result in results:
        frame = result.to_frame()
        assert dict(zip(frame["example"], frame["id"], strict=True)) == dict(enumerate(NAMES))
        assert list(frame.columns).index("id") == list(frame.columns).index("example") + 1
    without = mv.logit_lens(llava_vlm, llava_vlm.inputs(PICTURES, PROMPTS, batch_size=2)).to_frame()
    assert "id" not in without
    assert sorted(set(without["example"])) == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def four_llava(llava_vlm):
    return made(llava_vlm)


def test_words_of_a_joined_lens_are_those_of_the_example_alone(llava_vlm):
    lens = mv.logit_lens(llava_vlm, made(llava_vlm, batch_size=3), k=3)
    for i in range(4):
        alone = mv.logit_lens(llava_vlm, llava_vlm.inputs(PICTURES[i], PROMPTS[i]), k=3)
        for state, by_position in alone.pieces().items():
            assert list(lens.pieces(i)[state].values()) == list(by_position.values())


def test_ids_are_saved_and_loaded(llava_vlm, four_llava, tmp_path):
    lens = mv.logit_lens(llava_vlm, four_llava)
    lens.save(tmp_path / "lens.safetensors")
    again = mv.LogitLensResult.load(tmp_path / "lens.safetensors")
    close(again, lens)
    assert again.example_ids == tuple(NAMES)


class LastNorm:
    """A probe of a user's own; `join` says how parts become one."""

    def prepare(self, vlm, inputs):
        return [tokens.last for tokens in inputs.token_maps]

    def at_state(self, plan, state):
        return {"norm": state.resid[range(len(plan)), plan].float().norm(dim=-1)}

    def result(self, plan, rows, vlm, inputs):
        return torch.stack([row["norm"].cpu() for row in rows])


class JoinedNorm(LastNorm):
    def join(self, results):
        return torch.cat(results, dim=1)


def test_a_probe_of_ones_own_says_how_its_results_are_joined(llava_vlm, four_llava):
    batches = made(llava_vlm, batch_size=3)
    (whole,), (joined,) = mv.read(llava_vlm, four_llava, LastNorm()), mv.read(llava_vlm, batches, JoinedNorm())
    torch.testing.assert_close(joined, whole, rtol=1e-5, atol=1e-6)
    with pytest.raises(mv.InputError, match=r"LastNorm gives a Tensor, .*Give LastNorm a method join\(results\)"):
        mv.read(llava_vlm, batches, LastNorm())


def test_reading_shows_one_bar(llava_vlm, monkeypatch):
    bars = []

    def track(items, label):
        bars.append((len(items), label))
        return iter(items)

    monkeypatch.setattr("mechvlm.tracing.memory.track", track)
    mv.read(llava_vlm, made(llava_vlm, batch_size=3), mv.LogitLens(), mv.Contextualization())
    assert bars == [(2, "reading, batches")]


# -- what cannot be joined -------------------------------------------------------------------------


def test_what_cannot_be_joined_is_refused_with_the_difference(llava_vlm, blip_vlm, four_llava):
    lens = mv.logit_lens(llava_vlm, four_llava[0], k=2)
    norms = mv.norm_attention(llava_vlm, four_llava[0], dst="last")
    for results, message in [
        ([], "concat\\(\\) was given no result"),
        ([lens, norms], "results of one type, not LogitLensResult and NormAttentionResult"),
        ([(lens,), (lens,)], r"not tuple\. mv\.read gives a tuple per call: \[mv\.concat\(parts\) for parts in zip"),
        ([lens, mv.logit_lens(llava_vlm, four_llava[1], k=3)], r"`ids` of results 0 and 1 differ in shape"),
        (
            [lens, mv.logit_lens(llava_vlm, four_llava[1], k=2, states=[0])],
            r"Results 0 and 1 differ in `states`: \(0, 1",
        ),
        (
            [lens, mv.logit_lens(llava_vlm, four_llava[1], k=2, final_norm=False)],
            "differ in `final_norm`: True and False",
        ),
        ([lens, dataclasses.replace(lens, model="other")], "differ in `model`: 'LlavaForC.* and 'other'"),
        ([lens, dataclasses.replace(lens, example_ids=None)], r"Results \[1\] have no ids and the others do"),
        ([lens, dataclasses.replace(lens, n_positions=None)], "from an earlier version.*Read it again"),
        ([mv.logit_lens(llava_vlm, four_llava).of(2), lens], r"holds only the examples \[2\] of its batch"),
        ([norms, mv.norm_attention(llava_vlm, four_llava[1], dst="last_image")], "differ in `names`: .'last'.* and"),
        (
            [mv.norm_attention(llava_vlm, four_llava[i], dst=9) for i in (0, 1)],
            "dst=9 are positions by number, in batches",
        ),
    ]:
        with unchecked(), pytest.raises(mv.InputError, match=message):
            mv.concat(results)
    for name, method in (("object_ablation", ALL_AT_ONCE["ablation"]), ("multimodal_neurons", ALL_AT_ONCE["neurons"])):
        result = method(llava_vlm, four_llava)
        with pytest.raises(mv.InputError, match=f"are not joined: .*Give {name} all batches at once"):
            mv.concat([result, result])
        assert mv.concat([result]) is result
    phases = mv.fit_phases(mv.contextualization(llava_vlm, four_llava))
    with pytest.raises(mv.InputError, match="Give fit_phases the curves of all batches"):
        mv.concat([phases, phases])


def test_bad_batches_are_refused(llava_vlm, four_llava):
    for inputs, message in [
        ([], "not an empty list"),
        ([four_llava, llava_vlm.inputs(PICTURES[0], "a")], r"Batches \[1\] have no ids and the others do"),
    ]:
        with pytest.raises(mv.InputError, match=message):
            mv.read(llava_vlm, inputs, mv.LogitLens())
    with pytest.raises(mv.InputError, match="2 answers were given for 4 examples"):
        mv.read(llava_vlm, made(llava_vlm, batch_size=2), mv.LogitAttribution(["a", "what"]))
    with pytest.raises(ValueError, match="n_tokens holds 1 numbers for 4 examples"):
        mv.read(llava_vlm, made(llava_vlm, batch_size=2), mv.Likelihood([1]))
    with pytest.raises(
        mv.InputError, match=r"blocking=False sends one job, and 2 batches were given\. Send one job a batch"
    ):
        mv.read(llava_vlm, made(llava_vlm, batch_size=2), mv.LogitLens(), blocking=False)


def test_errors_count_examples_over_all_batches(llava_vlm, monkeypatch):
    batches = [batch for batch in made(llava_vlm, batch_size=2)]
    batches[1].encoding["pixel_values"][1] = math.nan
    with pytest.raises(mv.NonFiniteError, match=r"in example\(s\) \[3\]") as caught:
        mv.read(llava_vlm, batches, mv.LogitLens())
    assert caught.value.examples == (3,)
    with pytest.raises(ValueError, match="are not tokens") as refused:
        mv.read(llava_vlm, made(llava_vlm, batch_size=2), mv.LogitLens(positions=[len(batches[0].token_maps[0]) - 1]))
    assert refused.value.__notes__ == ["Examples are counted within their batch here: its first is example 2 of all."]


# -- phases of several results ---------------------------------------------------------------------


def test_phases_of_several_results_are_those_of_all_examples(llava_vlm, four_llava):
    whole = mv.contextualization(llava_vlm, four_llava)
    parts = [mv.contextualization(llava_vlm, four_llava[:3]), mv.contextualization(llava_vlm, four_llava[3])]
    expected = mv.fit_phases(mv.concat(parts))
    close(mv.fit_phases(parts), expected)
    assert expected.n_examples == 4
    torch.testing.assert_close(expected.mean, whole.inter.double().mean(1), rtol=0, atol=1e-6)
    curves = [part.inter.T for part in parts]
    close(mv.fit_phases(curves), mv.fit_phases(torch.cat(curves)))
    close(
        mv.fit_phases([c.numpy() for c in curves], image=curves),
        mv.fit_phases(torch.cat(curves), image=torch.cat(curves)),
    )
    for wrong, message in [
        ([parts[0], curves[1]], "not some of both"),
        ([], "There is no curve"),
        (
            [curves[0], curves[1][:, 1:]],
            r"over the same layers; their shapes \(example, layer\) are \[\(3, 4\), \(1, 3\)\]",
        ),
    ]:
        with pytest.raises(mv.InputError, match=message):
            mv.fit_phases(wrong)


# -- batches that do not fit into memory -----------------------------------------------------------

PROBES = (
    mv.LogitLens(k=1),
    mv.Contextualization(subtract_baseline=True),
    mv.NormAttention(),
    mv.LogitAttribution(ANSWERS, "a"),
)
LACKING = [
    (torch.OutOfMemoryError, "CUDA out of memory."),
    (RuntimeError, "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory:"),
    (RuntimeError, "DefaultCPUAllocator: not enough memory: you tried to allocate"),
]


@pytest.mark.parametrize(("error", "text"), LACKING)
def test_a_batch_without_room_is_halved(llava_vlm, four_llava, monkeypatch, error, text):
    whole = mv.read(llava_vlm, four_llava, *PROBES)
    sizes = out_of_memory_above(llava_vlm, monkeypatch, 2, error, text)
    with pytest.warns(
        UserWarning, match=r"4 examples at once did not fit .* of cpu: they were read 2 at a time\..*batch_size=2"
    ):
        halved = mv.read(llava_vlm, four_llava, *PROBES)
    assert sizes == [4, 2, 2]
    for got, want in zip(halved, whole, strict=True):
        close(got, want)


def test_positions_by_number_mean_the_same_where_a_batch_is_halved(llava_vlm, four_llava, monkeypatch):
    number = len(four_llava.token_maps[0]) - 2
    probes = mv.LogitLens(k=1, positions=[number]), mv.NormAttention(dst=number)
    whole = mv.read(llava_vlm, four_llava, *probes)
    out_of_memory_above(llava_vlm, monkeypatch, 1)
    with pytest.warns(UserWarning, match="read 1 at a time"):
        halved = mv.read(llava_vlm, four_llava, *probes)
    for got, want in zip(halved, whole, strict=True):
        close(got, want)


def test_later_batches_come_in_parts_of_the_size_that_fitted(llava_vlm, monkeypatch):
    twice = llava_vlm.inputs(PICTURES * 2, PROMPTS * 2, batch_size=4)
    whole = mv.logit_lens(llava_vlm, twice)
    sizes = out_of_memory_above(llava_vlm, monkeypatch, 2)
    with pytest.warns(UserWarning, match="4 examples at once"):
        close(mv.logit_lens(llava_vlm, twice), whole)
    assert sizes == [4, 2, 2, 2, 2]


def test_neurons_of_a_halved_batch_are_the_same(llava_vlm, four_llava, monkeypatch):
    whole = ALL_AT_ONCE["neurons"](llava_vlm, four_llava)
    out_of_memory_above(llava_vlm, monkeypatch, 2)
    with pytest.warns(UserWarning, match="read 2 at a time"):
        close(ALL_AT_ONCE["neurons"](llava_vlm, four_llava), whole)


def test_an_example_without_room_of_its_own_is_an_error_that_says_what_to_do(llava_vlm, monkeypatch):
    out_of_memory_above(llava_vlm, monkeypatch, 0)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"Example 0 does not fit .* even alone \(CUDA out.*dtype="
    ) as caught:
        mv.logit_lens(llava_vlm, made(llava_vlm, batch_size=2))
    assert out_of_memory(caught.value)
    assert caught.value.__context__ is None, "the failed forward's tensors are not held"


def test_own_results_of_a_halved_batch_need_a_way_to_be_joined(llava_vlm, four_llava, monkeypatch):
    out_of_memory_above(llava_vlm, monkeypatch, 2)
    with pytest.raises(mv.InputError, match="LastNorm gives a Tensor"):
        mv.read(llava_vlm, four_llava, LastNorm())


def test_other_errors_halve_nothing(llava_vlm, four_llava, monkeypatch):
    sizes = out_of_memory_above(llava_vlm, monkeypatch, 2, ValueError, "a bug")
    with pytest.raises(ValueError, match="a bug"):
        mv.read(llava_vlm, four_llava, mv.LogitLens())
    assert sizes == [4]


def test_pairs_without_room_are_halved(llava_vlm, monkeypatch):
    pairs = [Pair(f"p{i}", (noise_image(2 * i), noise_image(2 * i + 1)), ("a what", "what a")) for i in range(2)]
    whole = mv.winoground(llava_vlm, pairs)
    out_of_memory_above(llava_vlm, monkeypatch, 4)
    close(mv.winoground(llava_vlm, pairs), whole)
    assert np.isfinite(whole.logprob.numpy()).all()
