"""The noise of causal tracing: on which positions, how strong, and by which seed."""

import pytest
import torch

from helpers.images import noise_image
from helpers.uneven import ending_vlm
from mechvlm.experiments.cases import Examples
from mechvlm.experiments.causal_trace import _noisy_embeddings


@pytest.fixture(scope="module")
def examples():
    """Two prompts that begin and end in a special token."""
    vlm = ending_vlm()
    return Examples(vlm, vlm.inputs([noise_image(i) for i in range(2)], "what is this </s> a"))


def noise_of(example, corrupt: str, seed: int = 0) -> torch.Tensor:
    """What is added to the embeddings [pos d_model], whose spread is 0.02."""
    old = 0.02 * torch.randn(1, len(example.inputs.tokens), 64, generator=torch.Generator().manual_seed(5))
    pos = example.inputs.tokens.image if corrupt == "noise" else example.inputs.tokens.text
    return (_noisy_embeddings(example, old, corrupt, seed) - old)[0] / old[:, pos].std()


@pytest.mark.parametrize("corrupt", ["noise", "words"])
def test_noise_lies_on_its_own_positions(examples, corrupt):
    tokens = examples[0].inputs.tokens
    noise = noise_of(examples[0], corrupt)
    text = [position for position in tokens.text.tolist() if position != tokens.last]
    want = tokens.image.tolist() if corrupt == "noise" else text
    assert noise.abs().amax(-1).nonzero().flatten().tolist() == want
    assert len(tokens.special) == 3
    # Three standard deviations of these embeddings.
    assert noise[want].std().item() == pytest.approx(3, rel=0.1)
    assert noise[want].mean().item() == pytest.approx(0, abs=0.5)


def test_examples_and_seeds_have_noise_of_their_own(examples):
    first = noise_of(examples[0], "noise")
    torch.testing.assert_close(first, noise_of(examples[0], "noise"))
    assert not torch.allclose(first, noise_of(examples[1], "noise"))
    assert not torch.allclose(first, noise_of(examples[0], "noise", seed=1))
