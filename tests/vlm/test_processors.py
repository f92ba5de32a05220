"""Processors on a machine without torchvision; with it, they are transformers' own."""

import copy
import json
import pickle
import sys

import numpy as np
import pytest
import torch
import transformers
from transformers.utils import is_torchvision_available

import mechvlm as mv
from helpers import families
from helpers.families.parts import IMAGE
from helpers.families.tokenizers import tokenizer
from mechvlm.errors import InputError, ModelError
from mechvlm.vlm.processors import FILES, NoVideos, load_processor, processor_class

without_torchvision = pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
VIDEO = ["llava_onevision", "qwen2_5_vl", "internvl", "smolvlm"]
PICTURE = families.picture(60, 44, seed=0)


@pytest.fixture(params=VIDEO)
def name(request) -> str:
    return request.param


@pytest.fixture
def folder(name, tmp_path):
    """A folder as a model's: its config and its processor's files."""
    config, processor = families.FAMILIES[name].make()
    processor.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    return tmp_path


def change(path, **settings) -> None:
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (stored | settings).items() if value is not None}))


def encode(processor, name):
    return processor(images=[PICTURE], text=[families.prompt(name, "what")], return_tensors="pt")


def assert_same_encoding(encoding, other):
    assert encoding.keys() == other.keys()
    for key in encoding:  # torchvision rounds otherwise when it resizes
        torch.testing.assert_close(encoding[key], other[key], rtol=0, atol=0.05)


def test_a_saved_processor_loads(name, folder):
    _, processor = families.FAMILIES[name].make()
    loaded = load_processor(folder)
    assert type(loaded).__name__ == type(processor).__name__
    assert isinstance(loaded, getattr(transformers, type(processor).__name__))
    assert loaded.chat_template == processor.chat_template
    assert loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert_same_encoding(encode(loaded, name), encode(processor, name))


def test_its_class_is_read_from_the_config_where_no_file_names_it(name, folder):
    change(folder / "processor_config.json", processor_class=None)
    change(folder / "tokenizer_config.json", processor_class=None)
    assert_same_encoding(encode(load_processor(folder), name), encode(families.FAMILIES[name].make()[1], name))


@pytest.mark.parametrize("file", ["processor_config.json", "preprocessor_config.json", "tokenizer_config.json"])
def test_one_of_three_files_names_its_class(file, tmp_path):
    families.FAMILIES["qwen2_5_vl"].make()[1].save_pretrained(tmp_path)
    for path in (tmp_path / name for name in FILES):
        path.touch()
        path.write_text(path.read_text() or "{}")
        change(path, processor_class="Qwen2_5_VLProcessor" if path.name == file else None)
    assert isinstance(load_processor(tmp_path), transformers.Qwen2_5_VLProcessor)


def test_a_folder_of_older_files_loads(name, folder, tmp_path_factory):
    """Qwen2.5-VL's repository, for one: a file for images, at times another for videos."""
    path = folder / "processor_config.json"
    stored = json.loads(path.read_text())
    images = stored.pop("image_processor") | {"processor_class": stored["processor_class"]}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    if "image_seq_length" in stored or "image_seq_len" in stored or "num_image_tokens" in stored:
        path.write_text(json.dumps({key: value for key, value in stored.items() if key != "video_processor"}))
    else:
        path.unlink()
    assert_same_encoding(encode(load_processor(folder), name), encode(families.FAMILIES[name].make()[1], name))
    if is_torchvision_available():
        return
    (folder / "video_preprocessor_config.json").write_text('{"num_frames": 7}')
    again = tmp_path_factory.mktemp("again")
    load_processor(folder).save_pretrained(again)
    assert json.loads((again / "processor_config.json").read_text())["video_processor"] == {"num_frames": 7}


def test_images_are_prepared_as_by_hand():
    """Qwen: 60 x 44 pixels become 64 x 48, 8 x 6 patches, of which four make a token."""
    processor = families.FAMILIES["qwen2_5_vl"].make()[1]
    encoding = encode(processor, "qwen2_5_vl")
    assert encoding["image_grid_thw"].tolist() == [[1, 6, 8]]
    pixels = torch.from_numpy(np.array(PICTURE.resize((64, 48), 3))).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(getattr(processor.image_processor, f"image_{what}")) for what in ("mean", "std"))
    first = ((pixels - mean[:, None, None]) / std[:, None, None])[:, :8, :8]
    patch = encoding["pixel_values"][0].view(3, 2, 8, 8)
    torch.testing.assert_close(patch[:, 0], first, rtol=0, atol=0.02)
    torch.testing.assert_close(patch[:, 1], first, rtol=0, atol=0.02)
    start, end = processor.tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
    assert encoding["input_ids"].tolist() == [[start, *[IMAGE] * 12, end, *processor.tokenizer("what")["input_ids"]]]


@without_torchvision
def test_a_video_is_refused(name, folder):
    loaded = load_processor(folder)
    assert isinstance(loaded.video_processor, NoVideos)
    word = getattr(loaded, "video_token", "<video>")
    with pytest.raises(InputError, match="pip install torchvision"):
        loaded(videos=[torch.zeros(4, 3, 32, 32, dtype=torch.uint8)], text=[word])


@without_torchvision
def test_settings_for_videos_are_kept(name, folder, tmp_path_factory):
    """A folder that a machine with torchvision wrote loses nothing when it is saved again."""
    change(folder / "processor_config.json", video_processor={"video_processor_type": "Some", "num_frames": 5})
    loaded = load_processor(folder)
    assert loaded.video_processor.num_frames == 5
    assert loaded.video_processor.fps is None
    again = tmp_path_factory.mktemp("again")
    loaded.save_pretrained(again)
    first, second = (json.loads((place / "processor_config.json").read_text()) for place in (folder, again))
    assert first == second


def test_it_is_copied_pickled_and_shown(name):
    processor = families.FAMILIES[name].make()[1]
    assert_same_encoding(encode(copy.deepcopy(processor), name), encode(processor, name))
    travelled = pickle.loads(pickle.dumps(processor))
    assert type(travelled) is type(processor)
    assert_same_encoding(encode(travelled, name), encode(processor, name))
    assert type(processor).__name__ in repr(processor)


@without_torchvision
def test_pixtral_loads_and_leaves_transformers_as_it_was(tmp_path):
    processor = families.FAMILIES["pixtral"].make()[1]
    processor.save_pretrained(tmp_path)
    loaded = load_processor(tmp_path)
    assert_same_encoding(encode(loaded, "pixtral"), encode(processor, "pixtral"))
    assert "transformers.models.pixtral.image_processing_pixtral" not in sys.modules


@without_torchvision
@pytest.mark.parametrize("kind", ["Cohere2Vision", "Llama4", "Molmo2", "Sam3Video"])
def test_what_needs_torchvision_says_so(kind, tmp_path):
    tokenizer().save_pretrained(tmp_path)
    stored = {
        "processor_class": f"{kind}Processor",
        "image_processor": {"image_processor_type": f"{kind}ImageProcessor"},
    }
    (tmp_path / "processor_config.json").write_text(json.dumps(stored))
    with pytest.raises(ModelError, match=r"needs torchvision.*`pip install torchvision`"):
        load_processor(tmp_path)


@without_torchvision
def test_load_says_so_too(tmp_path):
    """A model's processor is loaded here, and its error reaches the user as it is."""
    for part in families.build("llava"):
        part.save_pretrained(tmp_path)
    images = {"image_processor_type": "Cohere2VisionImageProcessor"}
    change(tmp_path / "processor_config.json", processor_class="Cohere2VisionProcessor", image_processor=images)
    with pytest.raises(ModelError, match=r"^The processor of .* needs torchvision"):
        mv.load(tmp_path)


def test_another_missing_package_is_named(tmp_path, monkeypatch):
    families.FAMILIES["smolvlm"].make()[1].save_pretrained(tmp_path)
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", None)
    with pytest.raises(ModelError, match="pip install num2words"):
        load_processor(tmp_path)


def test_an_ordinary_processor_is_transformers_own(tmp_path):
    processor = families.FAMILIES["llava"].make()[1]
    processor.save_pretrained(tmp_path)
    assert type(load_processor(tmp_path)) is transformers.LlavaProcessor
    assert processor_class("LlavaProcessor") is transformers.LlavaProcessor


def test_a_folder_without_a_processor_is_an_error_as_before(tmp_path):
    with pytest.raises((OSError, ValueError)):
        load_processor(tmp_path)


def test_a_processor_with_code_of_its_own_is_left_to_transformers(tmp_path):
    """It is not run unless that is asked for."""
    tokenizer().save_pretrained(tmp_path)
    stored = {"processor_class": "MyProcessor", "auto_map": {"AutoProcessor": "mine.MyProcessor"}}
    (tmp_path / "processor_config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_processor(tmp_path)


def test_with_torchvision_nothing_is_changed(monkeypatch, tmp_path):
    monkeypatch.setattr("mechvlm.vlm.processors.is_torchvision_available", lambda: True)
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda source, **options: (source, options))
    assert load_processor(tmp_path, revision="main") == (tmp_path, {"revision": "main"})
    assert processor_class.__wrapped__("InternVLProcessor") is transformers.InternVLProcessor
