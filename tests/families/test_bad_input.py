"""What does not fit is refused: the error says what was asked, what is there, and what to do."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

import mechvlm as mv
from helpers import families
from mechvlm.families.known import LLAMA, known_record
from mechvlm.vlm.processors import foreign_types

FRAMES = np.zeros((5, 32, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def llava():
    return families.build("llava")


# -- processors of other families ------------------------------------------------------------------


@pytest.mark.parametrize("other", ["qwen2_5_vl", "internvl", "llava_onevision", "blip2_opt", "gemma3"])
def test_a_processor_of_another_family(llava, other):
    with pytest.raises(mv.ModelError, match="processor") as caught:
        mv.load(llava[0], families.build(other)[1])
    assert "processor" in str(caught.value).lower()
    assert any(advice in str(caught.value) for advice in ("Give the processor", "give the processor"))


def test_one_that_makes_as_many_tokens_of_the_same_pixels():
    """PaliGemma's makes what LLaVA's forward takes; only its pixels are normed otherwise."""
    hf, own = families.build("llava")
    other = families.build("paligemma")[1]
    image = families.picture(60, 44, seed=0)
    mine, theirs = (p(images=[image], text=["<image>a"], return_tensors="pt") for p in (own, other))
    assert mine["pixel_values"].shape == theirs["pixel_values"].shape
    assert (mine["pixel_values"] - theirs["pixel_values"]).abs().max() > 0.1
    with pytest.raises(
        mv.ModelError, match=r"of the type llava, and its PaliGemmaProcessor that of paligemma.*LlavaProc"
    ):
        mv.load(hf, other)
    assert mv.load(hf, other, check=False).processor is other


def test_a_known_class_and_an_unknown_decoder():
    """OPT's record is derived from a forward, which fails before anything is read."""
    with pytest.raises(mv.ModelError, match=r"the forward of Blip2\w+ fails on what this LlavaProcessor returns"):
        mv.load(families.build("blip2_opt")[0], families.build("llava")[1])


def test_which_processors_are_foreign(llava):
    """A relative that prepares images the same way is not, nor is one of other code."""
    hf, processor = llava
    qwen, own = families.build("qwen2_5_vl")
    assert foreign_types(processor, hf.config) == ()
    assert foreign_types(own, qwen.config) == ()
    assert foreign_types(processor, qwen.config) == ("llava", "vipllava")
    relative = type("Qwen2VLProcessor", (), {"image_processor": own.image_processor})()
    assert foreign_types(relative, qwen.config) == ()
    assert foreign_types(relative, hf.config) == ("qwen2_vl",)
    ours = type("OwnProcessor", (), {"image_processor": own.image_processor})()
    assert foreign_types(ours, hf.config) == ()
    # Its class is LLaVA's, its vision part and its processor are Pixtral's.
    pixtral, its = families.build("pixtral")
    assert type(pixtral).__name__ == type(hf).__name__
    assert foreign_types(its, pixtral.config) == ()


# -- records that do not fit -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (
            {"hf_class": "OtherForConditionalGeneration"},
            "it is of Other.*, the model is a LlavaForConditionalGeneration",
        ),
        ({"norm": "model.norm"}, r"the model has no module 'model.norm' \(norm\)"),
        ({"image_token_id": "image_id"}, "its config has no 'image_id', the image token's id"),
        ({"kinds": (LLAMA, LLAMA)}, "it has 2 kinds, the model 3 layers"),
        ({"kinds": (replace(LLAMA, mlp_out="ffn"),)}, r"layer 0 has no module 'ffn' \(mlp_out\); layer 1"),
        ({"kinds": (replace(LLAMA, q_proj="qkv"),)}, r"layer 0 has no module 'self_attn.qkv' \(q_proj\)"),
        (
            {"kinds": (replace(LLAMA, mlp_out="post_attention_layernorm"),)},
            "is not what the record that was given says",
        ),
        ({"kinds": (replace(LLAMA, v_proj="k_proj"),)}, r"v\[0\] are the values of the attention: off by"),
        ({"embed": "model.vision_tower"}, "cannot be traced by the record that was given"),
    ],
)
def test_a_record_that_does_not_fit(llava, wrong, says):
    with pytest.raises(mv.ModelError, match=says):
        mv.load(*llava, record=replace(known_record(llava[0]), **wrong))


def test_a_record_that_fits_is_used(llava):
    """A known class's own record, and a derived one, which may then serve where no weights are."""
    record = replace(known_record(llava[0]), template="Q: {images} {prompt}")
    vlm = mv.load(*llava, record=record)
    assert vlm.record is record
    hf, processor = families.build("llava_phi3")
    derived = mv.load(hf, processor).record
    assert derived.derived
    assert mv.load(hf, processor, record=derived).record is derived


# -- classes that cannot be read -------------------------------------------------------------------


@pytest.fixture
def own_code(tmp_path, llava):
    """A folder like MiniGPT-v2's: a class and a config of its own code."""
    config = (
        "from transformers import PreTrainedConfig\nclass XConfig(PreTrainedConfig):\n    model_type = 'minigpt_x'\n"
    )
    (tmp_path / "configuration_x.py").write_text(config)
    names = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.MiniGPTv2ForCausalLM"}
    settings = {"model_type": "minigpt_x", "architectures": ["MiniGPTv2ForCausalLM"], "auto_map": names}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    llava[1].save_pretrained(tmp_path)
    return tmp_path


def test_a_folder_with_a_class_of_its_own(own_code, monkeypatch):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(own_code / "modules"))
    with pytest.raises(mv.ModelError, match="comes with code of its own, which is not run by default"):
        mv.load(own_code)
    with pytest.raises(
        mv.ModelError, match=r"MiniGPTv2ForCausalLM, a class of its own code.*mechvlm\.load\(model, processor\)"
    ):
        mv.load(own_code, trust_remote_code=True)


def test_a_loaded_model_of_its_own_class(llava):
    """It is read by a derived record, which knows what its forward takes."""

    class Own(transformers.LlavaForConditionalGeneration):
        pass

    hf = Own(llava[0].config).eval()
    hf.load_state_dict(llava[0].state_dict())
    vlm, plain = mv.load(hf, llava[1]), mv.load(*llava)
    assert vlm.record.derived
    assert set(vlm.record.arguments) >= {"input_ids", "pixel_values"}
    image = families.picture(60, 44, seed=0)
    lens, same = (mv.logit_lens(v, v.inputs(image, "what"), k=3) for v in (vlm, plain))
    torch.testing.assert_close(lens.probs, same.probs)


def test_a_model_of_text_alone(tmp_path, llava):
    hf, processor = llava
    text = transformers.LlamaForCausalLM(hf.config.get_text_config()).eval()
    with pytest.raises(mv.ModelError, match="LlamaForCausalLM is a language model, which takes no images"):
        mv.load(text, processor)
    text.save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        mv.ModelError, match=r"LlamaForCausalLM is a language model, which takes no images.*vision part too"
    ):
        mv.load(tmp_path)


# -- videos ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_video_is_no_image(name, tmp_path):
    vlm = mv.load(*families.build(name))
    for video in (FRAMES, torch.zeros(5, 3, 32, 32), [FRAMES]):
        with pytest.raises(mv.InputError, match=r"several images, .*or a video: give one of its frames"):
            vlm.inputs(video, "what")
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(100))
    with pytest.raises(mv.InputError, match=r"a\.mp4 is a video, and mechvlm reads images: give one of its frames"):
        vlm.inputs(tmp_path / "a.mp4", "what")
    entries = [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "what"}]
    with pytest.raises(mv.InputError, match=r"an entry of type 'video'.*Of a video give frames, as images"):
        vlm.inputs(None, [{"role": "user", "content": entries}])
    two = vlm.inputs([[FRAMES[0], FRAMES[1]]], "what")  # frames are images like others
    assert len(two.images[0]) == 2


def test_a_video_in_the_prompt():
    vlm = mv.load(*families.build("qwen2_5_vl"))
    with pytest.raises(
        mv.InputError, match=r"cannot encode 1 images .*<\|video_pad\|> tokens in the text but no videos"
    ):
        vlm.inputs(FRAMES[0], "<|video_pad|>what")
