"""The decoder's own call, recorded and made again: by hand, on arguments of every shape."""

import pytest
import torch

from helpers.uneven import uneven
from mechvlm.decoder.replay import can_start_late, recorded, repeated

N_POS = 5


class Decoder(torch.nn.Module):
    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, inputs_embeds=None, **kwargs):
        raise NotImplementedError


def test_a_call_is_recorded_by_name_and_without_its_cache():
    mask, states, features = torch.ones(1, N_POS), uneven(1, N_POS, 2), [uneven(3, 2)]
    given = {"past_key_values": object(), "inputs_embeds": states, "features": features, "use_cache": True}
    call = recorded(Decoder(), (None, mask), given)
    assert call.keys() == {"attention_mask", "inputs_embeds", "features", "use_cache"}
    assert call["attention_mask"] is mask
    assert call["features"] is features


def test_a_call_with_features_of_all_positions_starts_at_the_first():
    masks = {"full_attention": torch.ones(1, 1, N_POS, N_POS), "sliding_attention": None}
    call = {"inputs_embeds": uneven(1, N_POS, 2), "attention_mask": masks, "use_cache": True, "sizes": [1, (2, "a")]}
    assert can_start_late(call)
    assert not can_start_late(call | {"image_mask": torch.ones(1, N_POS)})
    assert not can_start_late(call | {"features": {"of layer 0": [uneven(3, 2)]}})


@pytest.mark.parametrize("pos", [0, 2])
def test_rows_are_copies_from_a_position_on(pos):
    call = {
        "inputs_embeds": uneven(1, N_POS, 2),
        "attention_mask": {"full_attention": uneven(1, 1, N_POS, N_POS), "sliding_attention": None},
        "position_ids": uneven(3, 1, N_POS),
        "cache_position": torch.arange(N_POS),
        "use_cache": True,
    }  # fmt: skip
    got = repeated(call, 2, pos)
    assert got.keys() == call.keys()
    assert got["use_cache"] is True
    for row in range(2):
        assert torch.equal(got["inputs_embeds"][row], call["inputs_embeds"][0, pos:])
        full = got["attention_mask"]["full_attention"]
        assert torch.equal(full[row], call["attention_mask"]["full_attention"][0, :, pos:])
        # M-RoPE has three axes before the rows.
        assert torch.equal(got["position_ids"][:, row], call["position_ids"][:, 0, pos:])
    assert got["attention_mask"]["sliding_attention"] is None
    assert got["cache_position"].tolist() == list(range(pos, N_POS))
    assert [len(got["inputs_embeds"]), got["position_ids"].shape[1], len(full)] == [2, 2, 2]


def test_a_mask_of_padding_keeps_the_positions_of_the_cache():
    call = {"attention_mask": uneven(1, N_POS), "position_ids": uneven(1, N_POS)}
    got = repeated(call, 3, pos=2)
    assert torch.equal(got["attention_mask"], call["attention_mask"].expand(3, -1))
    assert torch.equal(got["position_ids"], call["position_ids"][:, 2:].expand(3, -1))


def test_images_of_each_row_stay_together():
    """A row's two images follow each other, and then those of the next row."""
    features, number = uneven(2, 4), torch.tensor(7)
    got = repeated({"features": [features], "sizes": (features,), "number": number}, 2)
    assert torch.equal(got["features"][0], torch.cat([features, features]))
    assert isinstance(got["sizes"], tuple)
    assert got["number"] is number
