"""Controls of the contextualization curve: against plain forwards, and verdicts on made curves."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import mechvlm as mv
from helpers import families
from helpers.forwards import first_states, naive_curve
from helpers.images import noise_image
from mechvlm.experiments import contextualization_controls as experiment
from mechvlm.experiments.contextualization_controls import _chosen, _text_ids, _vocabulary, with_noise, with_words
from mechvlm.inputs.tokens import Modality, image_mask

WORDS = "a red circle and a blue square of the dog is what this describe the scene a cat on the left of a man"


@pytest.fixture(scope="module")
def inputs(llava_vlm):
    """Three examples of different prompts, so that two are padded."""
    return llava_vlm.inputs([noise_image(i) for i in range(3)], ["what is this", "a", "describe the scene . a"])


@pytest.fixture(scope="module")
def controls(llava_vlm, inputs):
    return mv.contextualization_controls(llava_vlm, inputs, text=WORDS)


@pytest.mark.parametrize("kind", ["words", "text"])
def test_words_stand_where_the_image_stood(llava_vlm, inputs, controls, kind):
    vlm, image = llava_vlm, image_mask(inputs.token_maps)
    choices = _vocabulary(vlm) if kind == "words" else _text_ids(vlm, WORDS)
    chosen = _chosen(kind, choices, image, seed=0)
    assert len(chosen) == image.sum()
    embeddings = first_states(vlm, inputs).clone()
    embeddings[image] = vlm.hf.get_input_embeddings().weight[chosen].detach()
    own = controls.controls[controls.kinds.index(kind)]
    assert own == pytest.approx(naive_curve(vlm, inputs, embeddings), abs=1e-5)
    assert (own - controls.inter).abs().max() > 0.01


def test_the_images_curve_and_baseline_are_the_methods_own(llava_vlm, inputs, controls):
    own = mv.contextualization(llava_vlm, inputs)
    assert torch.equal(controls.inter, own.inter)
    assert torch.equal(controls.baseline, own.baseline[0])
    again = mv.contextualization_controls(llava_vlm, inputs, ["text", "noise"], text=WORDS)
    assert again.controls == pytest.approx(controls.controls[[2, 0]], abs=1e-6)
    other = mv.contextualization_controls(llava_vlm, inputs, ["noise"], seed=1)
    assert (other.controls[0] - controls.controls[0]).abs().max() > 1e-4


def test_running_text_runs(llava_vlm, inputs):
    """Each example's words follow each other in the text and round its end, from its own place."""
    ids, image = _text_ids(llava_vlm, WORDS), image_mask(inputs.token_maps)
    chosen = _chosen("text", ids, image, seed=3).split(image.sum(-1).tolist())
    next_of = {tuple(pair) for pair in torch.stack([ids, ids.roll(-1)], 1).tolist()}
    for own in chosen:
        assert {tuple(pair) for pair in torch.stack([own[:-1], own[1:]], 1).tolist()} <= next_of
    assert len({int(own[0]) for own in chosen}) > 1
    special = set(llava_vlm.tokenizer.all_special_ids)
    assert not special & set(_vocabulary(llava_vlm).tolist())
    random = _chosen("words", _vocabulary(llava_vlm), image, seed=3)
    assert len(random.unique()) > len(random) / 2


def test_noise_has_the_visual_tokens_mean_and_covariance():
    generator = torch.Generator().manual_seed(0)
    image = torch.zeros(4, 1003, dtype=torch.bool)
    image[:, 2:-1] = True
    mix = torch.tensor([[2.0, 0, 0], [1, 0.5, 0], [-1, 0, 0.2]])
    states = torch.randn(4, 1003, 3, generator=generator) @ mix.T + torch.tensor([1.0, -2, 5])
    noisy = with_noise(states, image, seed=1)
    assert torch.equal(noisy[~image], states[~image])
    old, new = states[image], noisy[image]
    assert new.mean(0) == pytest.approx(old.mean(0), abs=0.1)
    assert torch.cov(new.T) == pytest.approx(torch.cov(old.T), abs=0.3)
    assert abs(torch.corrcoef(torch.stack([old[:, 0], new[:, 0]]))[0, 1]) < 0.06, "no token is its own noise"


def test_words_are_scaled_as_the_text_is():
    """As Gemma does; and a decoder that adds positions is told."""
    generator = torch.Generator().manual_seed(0)
    table, ids = torch.randn(30, 8, generator=generator), torch.randint(30, (2, 6), generator=generator)
    text = torch.tensor([[0, 1, 1, 0, 0, 1]] * 2).bool()
    image = torch.tensor([[0, 0, 0, 1, 1, 0]] * 2).bool()
    states = 5 * table[ids]
    new, error = with_words(states, table, ids, text, image, torch.tensor([3, 4, 5, 6]))
    assert float(error) < 1e-5
    assert new[image] == pytest.approx(5 * table[[3, 4, 5, 6]], rel=1e-5)
    assert torch.equal(new[~image], states[~image])
    assert (
        float(with_words(states + torch.randn(6, 8, generator=generator), table, ids, text, image, ids[0, :4])[1]) > 0.1
    )


@pytest.mark.families
@pytest.mark.parametrize("name", ["gemma3", "paligemma", "qwen2_5_vl", "llava_next"])
def test_families_whose_text_is_scaled_or_images_differ(name):
    vlm = mv.load(*families.build(name))
    inputs = vlm.inputs([families.picture(60, 44, seed=0), families.picture(44, 80, seed=1)], ["what", "hi what"])
    controls = mv.contextualization_controls(vlm, inputs, ["words", "noise"])
    assert controls.inter == pytest.approx(mv.contextualization(vlm, inputs).inter, abs=1e-6)
    # Gemma's embeddings are scaled: by what, one text token's own entries say.
    states = first_states(vlm, inputs)
    text = torch.stack([tokens.modality == Modality.TEXT for tokens in inputs.token_maps])
    ids = torch.stack([tokens.ids for tokens in inputs.token_maps])
    scale = (states[text][0] / vlm.W_E[ids[text][0]]).detach().median()
    assert (float(scale) > 1.5) == (name in ("gemma3", "paligemma"))
    image = image_mask(inputs.token_maps)
    states = states.clone()
    states[image] = scale * vlm.W_E[_chosen("words", _vocabulary(vlm), image, seed=0)].detach()
    assert controls.controls[0] == pytest.approx(naive_curve(vlm, inputs, states), abs=1e-5)


@pytest.mark.families
@pytest.mark.parametrize(("name", "message"), [("qwen3_vl", "deepstack"), ("blip2_opt", "positions are added")])
def test_decoders_in_which_it_cannot_be_are_refused(name, message):
    vlm = mv.load(*families.build(name))
    inputs = vlm.inputs(families.picture(60, 44, seed=0), "what")
    with pytest.raises(mv.ModelError, match=message):
        mv.contextualization_controls(vlm, inputs)


def test_bad_settings_are_named(llava_vlm, inputs):
    with pytest.raises(mv.InputError, match=r"no control \['shuffled'\]\. Known: noise, words, text"):
        mv.contextualization_controls(llava_vlm, inputs, ["noise", "shuffled"])
    with pytest.raises(mv.InputError, match="no control given"):
        mv.contextualization_controls(llava_vlm, inputs, [])
    with pytest.raises(mv.InputError, match="knows 2 tokens of the running text, and 20 are needed"):
        mv.contextualization_controls(llava_vlm, inputs, ["text"], text="a dog")
    assert len(experiment.PASSAGE.split()) > 100


# --- verdicts ---

OWN = np.interp(np.arange(17), [0, 3, 8, 14, 16], [0.0, 0.5, 0.35, 0.6, 0.45])
"""A decoder's curve of four phases."""
PHASES = np.interp(np.arange(17), [0, 3, 8, 14, 16], [0.0, 0.3, -0.3, 0.3, -0.2])
"""What an image adds to each of them."""


def made(image: np.ndarray, controls: list[np.ndarray], n: int = 30, noise: float = 0.02, seed: int = 0):
    """A result whose examples lie around these curves."""
    rng = np.random.default_rng(seed)

    def draw(curve):
        return torch.from_numpy(curve[:, None] + 0.05 * rng.normal(size=n) + noise * rng.normal(size=(17, n))).float()

    return mv.ContextualizationControlsResult(
        inter=draw(image), controls=torch.stack([draw(curve) for curve in controls]), baseline=torch.full((17,), 0.1),
        kinds=("noise", "words", "text")[: len(controls)], seed=0, model="made",
    )  # fmt: skip


def test_a_curve_that_the_controls_share_is_the_decoders_own():
    result = made(OWN, [OWN, OWN + 0.1, 0.9 * OWN])
    assert result.phases.shows_pattern, "the order alone would be the paper's"
    assert result.exceeding == (False,) * 4
    assert not result.shows_pattern
    assert result.verdict.startswith(
        "The curve is the decoder's own: none of its segments exceeds the controls (noise,"
    )


def test_phases_beyond_the_controls_are_found_with_their_size():
    result = made(OWN + PHASES, [OWN, np.zeros(17), 0.5 * OWN])
    assert result.exceeding == (True,) * 4
    assert result.shows_pattern
    frame = result.excess
    assert len(frame) == 12
    row = frame[(frame["first_state"] == 3) & (frame["control"] == "noise")].iloc[0]
    change = result.inter[row.last_state] - result.inter[3]
    control = result.controls[0, row.last_state] - result.controls[0, 3]
    assert row.excess == pytest.approx(float((control - change).mean()), abs=1e-6), "of a fall"
    assert row.low < row.excess < row.high
    assert row.excess == pytest.approx(0.6, abs=0.05)
    assert (
        "The paper's four phases show, each beyond the controls: the rise over states 0-3 exceeds every"
        in result.verdict
    )


def test_one_control_that_does_the_same_is_enough():
    half = made(OWN + PHASES, [np.zeros(17), OWN + np.where(np.arange(17) < 3, PHASES, PHASES[3])])
    assert half.exceeding == (False, True, True, True)
    assert half.verdict.startswith(
        "The curve is in part the decoder's own: the rise over states 0-3 does not exceed the controls (noise, words);"
    )
    assert not half.shows_pattern


def test_a_control_that_turns_elsewhere_nearby_is_enough():
    """Two states later: over the images' own segments it changes less."""
    later = np.interp(np.arange(17) - 2, np.arange(17), OWN)
    result = made(OWN, [later], noise=0.002)
    rise = result.excess.iloc[0]
    same_states = float((result.controls[0, rise.last_state] - result.controls[0, 0]).mean())
    assert rise.change - same_states > 0.2 * float(np.ptp(OWN))
    assert rise.control_change == pytest.approx(0.5, abs=0.01)
    assert result.exceeding[:3] == (False,) * 3, "the last fall has no state to come later at"


def test_the_controls_change_is_the_largest_of_all_pairs_of_states_nearby():
    result = made(OWN + PHASES, [np.zeros(17), 0.5 * OWN, PHASES[::-1].copy()], noise=0.2)
    ends = result.phases.intervals
    assert len(ends) == 4
    for (first, last), rows in result.excess.groupby(["first_state", "last_state"]):
        i = ends.index((first, last))
        low = ends[i - 1][0] if i else 0
        high = ends[i + 1][1] if i < 3 else 16
        for row in rows.itertuples():
            mean = result.controls[result.kinds.index(row.control)].mean(-1)
            pairs = [float(mean[b] - mean[a]) for a in range(low, high + 1) for b in range(a, high + 1)]
            assert row.control_change == pytest.approx(max(pairs) if row.direction == "rise" else min(pairs), abs=1e-6)


def test_a_sure_and_small_excess_is_none():
    """A tenth of the range, from examples that hardly differ."""
    result = made(1.1 * OWN, [OWN], n=200, noise=0.001)
    assert (result.excess["low"] > 0).any()
    assert not any(result.exceeding)


@pytest.mark.parametrize(("height", "exceeds"), [(1.9, True), (2.1, False)])
def test_an_excess_counts_beside_what_the_decoders_curves_do_elsewhere(height, exceeds):
    """The first rise is half. The control rises elsewhere: a quarter of that must be exceeded."""
    result = made(OWN, [np.where(np.arange(17) < 14, 0, height)], noise=0.001)
    rise = result.excess.iloc[0]
    assert rise.excess == pytest.approx(0.5, abs=0.01)
    assert result.exceeding[0] == exceeds


@pytest.mark.long
def test_false_alarms_and_power():
    """Curves of the decoder's own with ripples: below 5 %. Phases of half the range: above 80 %.

    Of 60 such curves and of 30: alarms are rare, so that their rate needs more curves.
    """
    alarms, hits, n = 0, 0, 60
    for seed in range(n):
        rng = np.random.default_rng(seed)
        ripple = rng.normal(0, 0.03, size=(4, 17))
        alarms += any(made(OWN + ripple[0], [OWN + r for r in ripple[1:]], seed=seed).exceeding)
        if seed < 30:
            hits += made(OWN + PHASES + ripple[0], [OWN + r for r in ripple[1:]], seed=seed).shows_pattern
    assert alarms <= 0.05 * n
    assert hits >= 0.8 * 30


def test_it_is_drawn_saved_and_tabled(controls, tmp_path):
    ax = controls.plot()
    labels = [line.get_label() for line in ax.lines]
    assert labels == ["image", "noise instead", "words instead", "text instead", "different examples"]
    for line, values in zip(ax.lines, [controls.inter, *controls.controls], strict=False):
        assert line.get_ydata() == pytest.approx(values.mean(-1), abs=1e-6)
    assert ax.lines[-1].get_ydata() == pytest.approx(controls.baseline, abs=1e-6)
    _ = controls.verdict  # what is computed once is not saved
    controls.save(tmp_path / "controls.safetensors")
    loaded = mv.ContextualizationControlsResult.load(tmp_path / "controls.safetensors")
    assert torch.equal(loaded.controls, controls.controls)
    assert loaded.verdict == controls.verdict
    frame = controls.to_frame()
    assert len(frame) == 4 * controls.inter.numel()
    words = frame[(frame["curve"] == "words") & (frame["state"] == 2) & (frame["example"] == 1)]["value"].item()
    assert words == pytest.approx(float(controls.controls[1, 2, 1]))
    alone = replace(controls, inter=controls.inter[:, :1], controls=controls.controls[..., :1])
    assert alone.verdict.startswith("From one example nothing tells")
    with pytest.raises((mv.InputError, ValueError), match="Give contextualization_controls all batches"):
        mv.concat([controls, controls])
