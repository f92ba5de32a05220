"""Images cut into tiles, with a thumbnail or markers, and rows of patches with breaks between."""

from .parts import IMAGE, SIDE, config, family, image_processor, processor, text, vision
from .tokenizers import TURNS, template, tokenizer, turns

# -- InternVL: tiles, then a thumbnail -------------------------------------------------------------


def intern(text_config):
    hf = config(
        "internvl", vision_config=vision("internvl_vision", image_size=[32, 32], patch_size=[8, 8]),
        text_config=text_config, image_token_id=IMAGE, image_seq_length=4,
    )  # fmt: skip
    names = {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }  # fmt: skip
    words = tokenizer("<IMG_CONTEXT>", "<img>", "</img>", "<video>", *TURNS, **names)
    images = image_processor("GotOcr2ImageProcessor", size=SIDE, crop_to_patches=True, min_patches=1, max_patches=4)
    return hf, processor(
        "InternVLProcessor", images, words, video="InternVLVideoProcessor", image_seq_length=4,
        chat_template=turns("<IMG_CONTEXT>\n"),
    )  # fmt: skip


@family("InternVLForConditionalGeneration", word="<IMG_CONTEXT>")
def internvl():
    return intern(text("qwen2"))


@family("InternVLForConditionalGeneration", word="<IMG_CONTEXT>")
def internvl_qwen3():
    return intern(text("qwen3"))


# -- Idefics 2 and 3, SmolVLM: tiles between tags --------------------------------------------------

TAGS = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
TAGGED = template("<image>", "User:", "Assistant:", "<end_of_utterance>\n")


@family("Idefics2ForConditionalGeneration")
def idefics2():
    """Six latents stand for an image."""
    perceiver = {
        "hidden_size": 64, "resampler_n_latents": 6, "resampler_depth": 2, "resampler_n_heads": 4,
        "resampler_head_dim": 8, "num_key_value_heads": 2,
    }  # fmt: skip
    hf = config(
        "idefics2", vision_config=vision("idefics2_vision"), perceiver_config=perceiver, text_config=text("mistral"),
        image_token_id=IMAGE,
    )  # fmt: skip
    size = {"longest_edge": 48, "shortest_edge": 32}
    images = image_processor("Idefics2ImageProcessor", size=size, do_image_splitting=False)
    words = tokenizer("<image>", *TAGS, starts=True)
    return hf, processor("Idefics2Processor", images, words, image_seq_len=6, chat_template=TAGGED)


def third(name: str, kind: str, video: str | None):
    """Idefics 3: tiles of 32 x 32, each after <row_1_col_1>, then the whole image."""
    hf = config(
        name, vision_config=vision(f"{name}_vision"), text_config=text("llama"), image_token_id=IMAGE, scale_factor=2
    )
    places = [f"<row_{row}_col_{col}>" for row in range(1, 5) for col in range(1, 5)]
    images = image_processor(f"{kind}ImageProcessor", size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    words = tokenizer("<image>", *TAGS, *places, starts=True)
    return hf, processor(f"{kind}Processor", images, words, video=video, image_seq_len=4, chat_template=TAGGED)


@family("Idefics3ForConditionalGeneration")
def idefics3():
    return third("idefics3", "Idefics3", None)


@family("SmolVLMForConditionalGeneration")
def smolvlm():
    return third("smolvlm", "SmolVLM", "SmolVLMVideoProcessor")


# -- Pixtral and Mistral 3: rows of patches, a break after each ------------------------------------


def rows_of_patches(hf, merge: int):
    """Images of up to 64 pixels a side; `merge` x `merge` patches of 8 pixels to a token."""
    images = image_processor("PixtralImageProcessor", size={"longest_edge": 64}, patch_size=8 * merge)
    words = tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]", starts=True)
    return hf, processor(
        "PixtralProcessor", images, words, patch_size=8, spatial_merge_size=merge, image_token="[IMG]",
        chat_template=template("[IMG]", "[INST]", "", "[/INST]"),
    )  # fmt: skip


@family("LlavaForConditionalGeneration", word="[IMG]")
def pixtral():
    return rows_of_patches(
        config(
            "llava", vision_config=vision("pixtral", image_size=64), text_config=text("mistral"), image_token_index=IMAGE,
            vision_feature_layer=-1, vision_feature_select_strategy="full",
        ),
        merge=1,
    )  # fmt: skip


@family("Mistral3ForConditionalGeneration", word="[IMG]")
def mistral3():
    return rows_of_patches(
        config(
            "mistral3", vision_config=vision("pixtral", image_size=64), text_config=text("mistral"), image_token_index=IMAGE,
            spatial_merge_size=2, vision_feature_layer=-1,
        ),
        merge=2,
    )  # fmt: skip
