"""Options that a study refuses, and what it leaves unchanged."""

from dataclasses import replace

import pytest
import torch

from mechvlm.datasets import load_dataset
from mechvlm.errors import InputError, ModelError
from mechvlm.study import run

LLAVA = "LlavaForConditionalGeneration"


def test_a_folder_that_holds_something_is_left_alone(llava_vlm, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="not empty"):
        run([llava_vlm], "scenes", n=2, out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_that_cannot_be_made(llava_vlm, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Nothing can be written to"):
        run([llava_vlm], "scenes", n=2, out=tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "nowhere"}, "cannot be put on the device 'nowhere'"),
        ({"batch_size": 0}, "at least 1"),
        ({"n": 0}, "at least 1"),
        ({"dataset": "imagenet"}, "no data set"),
    ],
)
def test_settings_that_cannot_be(llava_vlm, options, message):
    with pytest.raises((InputError, ModelError), match=message):
        run([llava_vlm], **options)


def test_the_same_model_twice(llava_vlm):
    with pytest.raises(InputError, match="each once"):
        run([llava_vlm, llava_vlm], n=2)
    with pytest.raises(InputError, match="one or more"):
        run([], n=2)
    with pytest.raises(InputError, match="seed -1"):
        run([llava_vlm], n=2, seed=-1)


def test_captions_without_a_word_are_set_aside(llava_vlm):
    """Their precision would be 0 whatever is decoded, and their recall undefined."""
    data = load_dataset("scenes", 3)
    examples = (*data.examples, replace(data.examples[0], id="wordless", captions=("the of", "a")))
    study = run([llava_vlm], replace(data, examples=examples))
    assert study.skipped.example.tolist() == ["wordless"]
    assert "no word that counts" in study.skipped.reason[0]
    assert "wordless" not in set(study.tables["contextualization"].example)


def test_a_small_model_runs_on_one_thread_and_leaves_the_number_as_it_was(llava_vlm):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert run([llava_vlm], "scenes", n=2).models[LLAVA]["threads"] == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
