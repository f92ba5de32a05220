"""LiMBeR with a BEiT or CLIP's RN50x16, as a folder that transformers loads.

    python scripts/convert/limber.py limber_weights/beit_ft_linear/proj.ckpt \\
        --llm EleutherAI/gpt-j-6B --vision microsoft/beit-large-patch16-224-pt22k-ft22k \\
        --out limber-beit-ft

LiMBeR is one linear map from the patches of a frozen image encoder to the embeddings of a frozen
GPT-J; the checkpoint holds its weight and bias. The whole is a LLaVA whose second map is the
identity: `LlavaForConditionalGeneration` with a BEiT, `FastVlmForConditionalGeneration` with
CLIP's RN50x16 (--vision timm/resnet50x16_clip_gap.openai, which needs the package timm). The image
stands where the prompt says `<|image|>`:

    processor(images=image, text="<|image|>A picture of")

GPT-J has a bias at the unembedding and LLaVA has none: it goes into the final norm and the
unembedding, in float32, without a change of the logits (`fold_bias`). The encoder NF-ResNet50 is
not converted: its map reads the mean of the patches, and no class of transformers takes one.

Source: Merullo et al. 2023, and github.com/jmerullo/limber.
"""

import json
from dataclasses import dataclass

import torch
from command import command
from eva import CLIP_MEAN, CLIP_STD
from folder import LanguageModel, add_word, new_folder, write
from tensors import ConversionError, Source
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    BaseImageProcessor,
    CLIPImageProcessor,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

WORD = "<|image|>"
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<|image|>{% else %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


CLIP_SIZE, CLIP_STRIDE = 384, 32  # of RN50x16, in pixels: 12 x 12 patches


@dataclass
class Encoder:
    """An image encoder as it is published, and the class of transformers that reads its patches."""

    config: PreTrainedConfig
    tensors: dict[str, torch.Tensor]
    images: BaseImageProcessor
    patch_size: int
    n_patches: int
    class_token: bool
    model_class: type
    config_class: type

    @classmethod
    def load(cls, name: str) -> "Encoder":
        """Read a BEiT, or a CLIP ResNet of timm's.

        Raises:
            ConversionError: for another model, or one that cannot be read.
        """
        try:
            config = AutoConfig.from_pretrained(name)
            tower = AutoModel.from_pretrained(name, dtype=torch.float32)
        except (OSError, ValueError, ImportError) as error:
            raise ConversionError(f"--vision {name} cannot be read: {str(error).splitlines()[0]}") from error
        if (
            config.model_type == "beit" and config.use_mean_pooling
        ):  # else a norm would follow the states that LLaVA reads
            size, patch = config.image_size, config.patch_size
            images, classes = AutoImageProcessor.from_pretrained(name), (LlavaForConditionalGeneration, LlavaConfig)
        elif config.model_type == "timm_wrapper" and "_clip" in config.architecture:
            size, patch = CLIP_SIZE, CLIP_STRIDE
            images, classes = _clip_images(), (FastVlmForConditionalGeneration, FastVlmConfig)
            config.hidden_size = tower.timm_model.num_features
        else:
            kind = getattr(config, "architecture", config.model_type)
            raise ConversionError(
                f"--vision {name} is a {kind}; a BEiT without a last norm (use_mean_pooling) or timm's resnet50x16_clip_gap was "
                "expected. LiMBeR's NF-ResNet50 is not converted."
            )
        n_patches = (size // patch) ** 2
        return cls(config, tower.state_dict(), images, patch, n_patches, config.model_type == "beit", *classes)


def _clip_images() -> CLIPImageProcessor:
    """RN50x16's images: the short side to 384 pixels, bicubic, and a square from the middle."""
    return CLIPImageProcessor(
        size={"shortest_edge": CLIP_SIZE}, crop_size={"height": CLIP_SIZE, "width": CLIP_SIZE}, resample=3,
        image_mean=CLIP_MEAN, image_std=CLIP_STD, do_convert_rgb=True,
    )  # fmt: skip


def convert(checkpoint: str, llm: str, vision: str, out: str) -> None:
    """Write the folder.

    Args:
        checkpoint: proj.ckpt.
        llm: folder or hub id of GPT-J.
        vision: folder or hub id of the image encoder that the map was trained on.
        out: the folder to write; new or empty.

    Raises:
        ConversionError: when a file is not what it should be; nothing is written then.
    """
    folder, own = new_folder(out), Source(checkpoint)
    tensors = own.take({f"model.multi_modal_projector.linear_1.{kind}": kind for kind in ("weight", "bias")})
    own.finish()
    encoder, model = Encoder.load(vision), LanguageModel.load(llm, "gptj", dtype=torch.float32)
    out_width, in_width = tensors["model.multi_modal_projector.linear_1.weight"].shape
    if (in_width, out_width) != (encoder.config.hidden_size, model.config.n_embd):
        raise ConversionError(
            f"{checkpoint} maps {in_width} numbers to {out_width}; --vision has {encoder.config.hidden_size}, --llm "
            f"{model.config.n_embd}. LiMBeR's maps of 1024 numbers belong to a BEiT, of 3072 to CLIP RN50x16."
        )

    # The original cuts GPT-J's vocabulary, 50400 rows, to GPT-2's 50257 words and the image's.
    tokenizer = trim_added(model.tokenizer, model.tokenizer.eos_token_id + 1)
    image_id = add_word(tokenizer, WORD)
    for name in ("transformer.wte.weight", "lm_head.weight", "lm_head.bias"):
        model.tensors[name] = model.tensors[name][: image_id + 1].clone()
    model.config.vocab_size = image_id + 1
    fold_bias(model.tensors)

    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    tensors["model.multi_modal_projector.linear_2.weight"] = torch.eye(out_width)
    tensors["model.multi_modal_projector.linear_2.bias"] = torch.zeros(out_width)
    tensors |= {f"model.vision_tower.{name}": tensor for name, tensor in encoder.tensors.items()}
    tensors["lm_head.weight"] = model.tensors.pop("lm_head.weight")
    tensors |= {f"model.language_model.{n.removeprefix('transformer.')}": tensor for n, tensor in model.tensors.items()}
    strategy = "default" if encoder.class_token else "full"
    config = encoder.config_class(
        vision_config=encoder.config, text_config=model.config, image_token_index=image_id, projector_hidden_act="linear",
        vision_feature_layer=-1, vision_feature_select_strategy=strategy, image_seq_length=encoder.n_patches,
    )  # fmt: skip
    processor = LlavaProcessor(
        encoder.images, tokenizer, patch_size=encoder.patch_size, num_additional_image_tokens=int(encoder.class_token),
        vision_feature_select_strategy=strategy, image_token=WORD, chat_template=TEMPLATE,
    )  # fmt: skip
    write(folder, encoder.model_class, config, tensors, processor, model)


def trim_added(tokenizer: PreTrainedTokenizerBase, size: int) -> PreTrainedTokenizerFast:
    """The tokenizer with ids below `size` only: spare words that were added behind are dropped."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] < size]
    backend = type(tokenizer.backend_tokenizer).from_str(json.dumps(spec))
    end = tokenizer.eos_token
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=end, eos_token=end, unk_token=end, pad_token=end, padding_side="left"
    )


def fold_bias(tensors: dict[str, torch.Tensor]) -> None:
    """The unembedding's bias into the final norm and the unembedding's weight, in place.

    A LayerNorm gives y = g x + c, where x has mean 0. So u·y = u·c for u = 1 / g: a number that no
    state changes, and that carries a bias b as well as a constant 1 would:

        W y + b = (W + b uᵀ / u·c) y

    u·c may be small. So c is first moved along g, away from 0: c' = c ± g, which makes |u·c'| the
    width at least, and takes ± W g off the bias.

    Raises:
        ConversionError: where the logits of random states would differ by more than 1e-4 of the
            largest, as where g is 0 somewhere.
    """
    scale, shift, weight = (
        tensors[name] for name in ("transformer.ln_f.weight", "transformer.ln_f.bias", "lm_head.weight")
    )
    bias = tensors.pop("lm_head.bias")
    inverse = 1 / scale.double()
    step = scale if inverse @ shift.double() >= 0 else -scale
    moved, rest = shift + step, bias - weight @ step
    folded = (weight + torch.outer(rest.double(), inverse) / (inverse @ moved.double())).float()

    states = torch.nn.functional.layer_norm(torch.randn(64, len(scale)), scale.shape, scale, shift)
    want, got = states @ weight.T + bias, (states + step) @ folded.T
    if not (difference := float((got - want).abs().max() / want.abs().max())) < 1e-4:
        raise ConversionError(
            f"The bias of --llm's unembedding cannot be held by its final norm: the logits would differ by {difference:.1e} of "
            f"the largest. The norm's smallest weight is {float(scale.abs().min()):.1e}."
        )
    tensors |= {"transformer.ln_f.bias": moved, "lm_head.weight": folded}


OPTIONS = {
    "checkpoint": "the linear map: proj.ckpt",
    "llm": "folder or hub id of GPT-J",
    "vision": "folder or hub id of the image encoder that the map was trained on",
}


def main(arguments: list[str] | None = None) -> None:
    command(convert, OPTIONS, arguments)


if __name__ == "__main__":
    main()
