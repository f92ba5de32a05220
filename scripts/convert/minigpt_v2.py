"""MiniGPT-v2, and MiniGPT-4 for Llama 2, as a folder that transformers loads with its code.

    python scripts/convert/minigpt_v2.py minigptv2_checkpoint.pth --llm Llama-2-7b-chat-hf \\
        --vision eva_vit_g.pth --out minigpt-v2

The checkpoint holds a linear map from 4 joined patches to Llama 2, and low-rank changes (LoRA) of
Llama's queries and values, which are merged here. MiniGPT-4's checkpoint for Llama 2 holds the map
alone. The image tower is BLIP-2's published file.

transformers has no class for it: the folder carries modeling_minigpt_v2.py, a LLaVA with another
projector, and loads with trust_remote_code=True. The image stands where the prompt says
`<ImageHere>`:

    processor(images=image, text="[INST] <Img><ImageHere></Img> [vqa] What is it? [/INST]")

Source: Chen et al. 2023, and github.com/Vision-CAIR/MiniGPT-4.
"""

import re

import eva
import torch
from command import command
from folder import LanguageModel, add_word, leave_tables, new_folder, with_llama_spaces, with_rows, write
from modeling_minigpt_v2 import MiniGPTv2Config, MiniGPTv2ForConditionalGeneration
from tensors import ConversionError, Source
from transformers import LlavaProcessor

WORD = "<ImageHere>"
ALPHA = 16  # the original's default, where the checkpoint's settings do not say
SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. "
    "Please answer my questions."
)
TURNS = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] {% endif %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<Img><ImageHere></Img> {% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'user' %} [/INST]{% endif %}{% endfor %}"
)
LORA = re.compile(r"llama_model\.base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")


def convert(checkpoint: str, llm: str, vision: str, out: str, blocks: int = eva.BLOCKS) -> None:
    """Write the folder.

    The size of the images is what the checkpoint's settings say, or else the published one: 448
    with LoRA (MiniGPT-v2), 224 without (MiniGPT-4).

    Args:
        checkpoint: the system's own file.
        llm: folder or hub id of its Llama 2.
        vision: eva_vit_g.pth.
        out: the folder to write; new or empty.
        blocks: of the tower; for tests.

    Raises:
        ConversionError: when a file is not what it should be; nothing is written then.
    """
    folder, own = new_folder(out), Source(checkpoint)
    tensors = own.take({f"multi_modal_projector.linear.{kind}": f"llama_proj.{kind}" for kind in ("weight", "bias")})
    changes, alpha = _changes(own), own.settings.get("lora_alpha", ALPHA)
    size = own.settings.get("image_size", 448 if changes else 224)
    norm = _norm(own)
    leave_tables(own)
    own.finish()
    vision_config, tower = eva.tower(Source(vision), blocks, size)
    width = vision_config.hidden_size
    if (wide := tensors["multi_modal_projector.linear.weight"].shape[1]) != 4 * width:
        raise ConversionError(
            f"The projection of {checkpoint} reads {wide} numbers a token; 4 joined patches are 4 x {width}. A projection of "
            "768 numbers reads a Q-Former: that is MiniGPT-4 for Vicuna, use minigpt4.py."
        )
    norm = norm or {"weight": torch.ones(width), "bias": torch.zeros(width)}
    tensors |= {f"multi_modal_projector.ln_vision.{kind}": tensor for kind, tensor in norm.items()}
    tensors |= {f"vision_tower.{name}": tensor for name, tensor in tower.items()}
    # The class's norm behind the tower is not read: the projector norms what lies before it.
    tensors |= {f"vision_tower.post_layernorm.{kind}": tensor for kind, tensor in norm.items()}

    model = LanguageModel.load(llm, "llama")
    _merge(model.tensors, changes, alpha)
    tokenizer = with_llama_spaces(model.tokenizer)
    image_id = add_word(tokenizer, WORD)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        model.tensors[name] = with_rows(model.tensors[name], image_id + 1, like=tokenizer.unk_token_id)
    head = model.tensors.pop("lm_head.weight")
    model.config.vocab_size = len(head)
    config = MiniGPTv2Config(
        vision_config=vision_config, text_config=model.config, image_token_index=image_id, vision_feature_layer=-1,
        vision_feature_select_strategy="default", image_seq_length=(size // vision_config.patch_size) ** 2 // 4,
    )  # fmt: skip
    tensors = {f"model.{name}": tensor.to(model.dtype).clone() for name, tensor in tensors.items()} | {
        "lm_head.weight": head
    }
    tensors |= {f"model.language_model.{name.removeprefix('model.')}": tensor for name, tensor in model.tensors.items()}
    template = TURNS if changes else SYSTEM + TURNS.replace("[/INST]", "[/INST] ")
    processor = LlavaProcessor(
        # Counts squares as large as 4 patches: as many as there are strips of 4.
        eva.image_processor(size), tokenizer, patch_size=2 * vision_config.patch_size, num_additional_image_tokens=0,
        vision_feature_select_strategy="full", image_token=WORD, chat_template=template,
    )  # fmt: skip
    write(folder, MiniGPTv2ForConditionalGeneration, config, tensors, processor, model)


def _norm(own: Source) -> dict[str, torch.Tensor]:
    """`ln_vision`, where the checkpoint holds it; {} otherwise.

    The published ones do not: it is not trained and comes from no other file, so the original runs
    with the values of a new norm.
    """
    if "ln_vision.weight" not in own.tensors:
        return {}
    return own.take({kind: f"ln_vision.{kind}" for kind in ("weight", "bias")})


def _changes(own: Source) -> dict[str, dict[str, torch.Tensor]]:
    """LoRA's pairs by the weight they change: {"...q_proj.weight": {"A": ..., "B": ...}}.

    Raises:
        ConversionError: for one without its partner.
    """
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name in [name for name in own.tensors if LORA.fullmatch(name)]:
        layer, side = LORA.fullmatch(name).groups()  # type: ignore[union-attr]
        pairs.setdefault(f"{layer}.weight", {})[side] = own.tensors.pop(name)
    if single := [name for name, pair in pairs.items() if len(pair) != 2]:
        raise ConversionError(f"{own.path} holds half of the LoRA pair of {', '.join(single[:8])}.")
    return pairs


def _merge(weights: dict[str, torch.Tensor], changes: dict[str, dict[str, torch.Tensor]], alpha: float) -> None:
    """W + alpha / r · B A, in place, in float32; r is the rank of the pair (Hu et al. 2021).

    Raises:
        ConversionError: for a change of a weight that the language model does not have.
    """
    for name, pair in changes.items():
        if name not in weights or weights[name].shape != (len(pair["B"]), pair["A"].shape[1]):
            shape = tuple(weights[name].shape) if name in weights else "not there"
            raise ConversionError(
                f"The checkpoint changes {name} by {len(pair['B'])} x {pair['A'].shape[1]}; in the language model it is {shape}. "
                "Is --llm the model it was trained with?"
            )
        change = alpha / len(pair["A"]) * (pair["B"].float() @ pair["A"].float())
        weights[name] = (weights[name].float() + change).to(weights[name].dtype)


OPTIONS = {
    "checkpoint": "the system's own file, such as minigptv2_checkpoint.pth",
    "llm": "folder or hub id of the Llama 2 chat model that it belongs to",
    "vision": "the image tower: eva_vit_g.pth, as BLIP-2 publishes it",
}


def main(arguments: list[str] | None = None) -> None:
    command(convert, OPTIONS, arguments)


if __name__ == "__main__":
    main()
