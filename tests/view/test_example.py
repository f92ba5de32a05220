"""One example as its page counts it: rows, sources, what is shown first, what can be picked."""

from dataclasses import replace

import torch

from helpers.images import noise_image
from helpers.patch_results import uneven
from mechvlm.explore import destinations
from mechvlm.view.example import match_example


def test_what_is_shown_first():
    inputs, lens, norms = uneven()
    shown = match_example(inputs, lens, norms, None, None)
    assert [pick.positions for pick in shown.picks] == [(13,), (17,), (19,), (20,)], "by position"
    assert shown.first_pick.positions == (20,)
    assert shown.sources.tolist() == [*range(4, 10), *range(11, 17), 2, 3, 10, 17, 18, 19, 20]
    assert shown.first_layer == 5
    read = norms.norm[5, 0, 1, inputs.tokens.image]
    assert shown.first_source == int(read.argmax())
    raw, first = norms.weight[5, 0, :, 1, inputs.tokens.image].mean(0), norms.norm[0, 0, 1, inputs.tokens.image]
    assert int(read.argmax()) not in (int(raw.argmax()), int(first.argmax())), "the test tells them apart"
    few = replace(norms, layers=(0, 1, 2, 3), **{f: getattr(norms, f)[:4] for f in ("norm", "weight", "value_norm")})
    lens = replace(lens, states=lens.states[:2], ids=lens.ids[:2], probs=lens.probs[:2])
    assert match_example(inputs, lens, few, None, None).first_layer == 1, "of 0 to 3"
    assert [(view["image"], view["rows"], view["cols"], view["sheet"]) for view in shown.page_views()] == [
        (0, 2, 3, 0), (1, 3, 2, 0),
    ]  # fmt: skip
    assert [image["size"] for image in shown.page_images()] == [[300, 150], [250, 300]]


def test_destinations_are_the_text_after_the_image_while_there_is_room(llava_vlm):
    tokens = llava_vlm.inputs(noise_image(0), "what is this").tokens
    after = torch.arange(int(tokens.image[-1]) + 1, len(tokens)).tolist()
    assert destinations(llava_vlm, tokens).tolist() == after
    row = 4 * llava_vlm.n_layers * llava_vlm.n_heads * len(tokens)
    assert destinations(llava_vlm, tokens, 3 * row).tolist() == after[-3:]
    assert destinations(llava_vlm, tokens, 0).tolist() == after[-1:]
