"""MiniGPT-4 (Vicuna v0, with a Q-Former) as a folder that transformers loads.

    python scripts/convert/minigpt4.py pretrained_minigpt4_7b.pth --llm vicuna-7b-v0 \\
        --vision eva_vit_g.pth --qformer blip2_pretrained_flant5xxl.pth --out minigpt4-7b

MiniGPT-4's own checkpoint holds one linear map, from the Q-Former to Vicuna. The image tower and
the Q-Former are BLIP-2's published files, which the original downloads by itself. The whole is a
`Blip2ForConditionalGeneration` with a LLaMA, whose queries stand where the prompt says
`<ImageHere>`:

    processor(images=image, text="###Human: <Img><ImageHere></Img> What is it?###Assistant: ")

Source: Zhu et al. 2023, and github.com/Vision-CAIR/MiniGPT-4.
"""

import re

import eva
import torch
from command import command
from folder import LanguageModel, add_word, leave_tables, new_folder, with_llama_spaces, with_rows, write
from tensors import ConversionError, Source
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2QFormerConfig, LlavaProcessor

WORD = "<ImageHere>"
HEAD_WIDTH = 64  # of the Q-Former, which is a BERT
CROSSING = 2  # every second layer of it reads the image, from the first on
TEMPLATE = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. "
    "Please answer my questions.###{% for message in messages %}{{ 'Human: ' if message['role'] == 'user' else 'Assistant: ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<Img><ImageHere></Img> {% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% if not loop.last or message['role'] == 'user' %}###{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)


def convert(checkpoint: str, llm: str, vision: str, qformer: str, out: str, blocks: int = eva.BLOCKS) -> None:
    """Write the folder.

    The size of the images is what the checkpoint's settings say, or else the tower's: 224.

    Args:
        checkpoint: MiniGPT-4's own file.
        llm: folder or hub id of its Vicuna.
        vision: eva_vit_g.pth.
        qformer: blip2_pretrained_flant5xxl.pth.
        out: the folder to write; new or empty.
        blocks: of the tower; for tests.

    Raises:
        ConversionError: when a file is not what it should be; nothing is written then.
    """
    folder, own, blip = new_folder(out), Source(checkpoint), Source(qformer)
    projection = own.take({f"language_projection.{kind}": f"llama_proj.{kind}" for kind in ("weight", "bias")})
    leave_tables(own)
    own.finish()
    qformer_config, tensors = _qformer(blip)
    if (wide := projection["language_projection.weight"].shape[1]) != qformer_config.hidden_size:
        raise ConversionError(
            f"The projection of {checkpoint} reads {wide} numbers a token; the Q-Former gives {qformer_config.hidden_size}. A "
            "projection of 4 joined patches is MiniGPT-4's for Llama 2, which has no Q-Former: use minigpt_v2.py."
        )
    vision_config, tower = eva.tower(Source(vision), blocks, own.settings.get("image_size"))
    tensors |= {f"vision_model.{name}": tensor for name, tensor in tower.items()} | projection

    model = LanguageModel.load(llm, "llama")
    tokenizer = with_llama_spaces(model.tokenizer)
    image_id = add_word(tokenizer, WORD)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        model.tensors[name] = with_rows(model.tensors[name], image_id + 1, like=tokenizer.unk_token_id)
    model.config.vocab_size = len(model.tensors["lm_head.weight"])
    # The class keeps the Q-Former in float32, in whatever format the rest is.
    tensors = {
        k: v.float() if k.startswith(("qformer.", "query_tokens")) else v.to(model.dtype) for k, v in tensors.items()
    }
    tensors |= {f"language_model.{name}": tensor for name, tensor in model.tensors.items()}

    n_queries = tensors["query_tokens"].shape[1]
    config = Blip2Config(
        vision_config=vision_config, qformer_config=qformer_config, text_config=model.config,
        num_query_tokens=n_queries, image_token_index=image_id,
    )  # fmt: skip
    write(
        folder, Blip2ForConditionalGeneration, config, tensors, _processor(tokenizer, vision_config, n_queries), model
    )


def _qformer(source: Source) -> tuple[Blip2QFormerConfig, dict[str, torch.Tensor]]:
    """The Q-Former, its queries, and BLIP-2's norm behind the tower; the file is accounted for."""
    source.leave(r"t5_proj\.", "BLIP-2's projection to T5, in whose place MiniGPT-4 has its own")
    leave_tables(source)
    layers = {int(m[1]) for m in map(re.compile(r"Qformer\.bert\.encoder\.layer\.(\d+)\.").match, source.tensors) if m}
    names = {_renamed(name): name for name in _names(len(layers))}
    names |= {f"vision_model.post_layernorm.{kind}": f"ln_vision.{kind}" for kind in ("weight", "bias")}
    tensors = source.take(names | {"query_tokens": "query_tokens"})
    source.finish()
    width = tensors["query_tokens"].shape[-1]
    config = Blip2QFormerConfig(
        hidden_size=width, num_hidden_layers=len(layers), num_attention_heads=width // HEAD_WIDTH,
        intermediate_size=len(tensors["qformer.encoder.layer.0.intermediate_query.dense.weight"]),
        cross_attention_frequency=CROSSING, encoder_hidden_size=len(tensors["vision_model.post_layernorm.weight"]),
    )  # fmt: skip
    return config, tensors


def _names(n_layers: int) -> list[str]:
    """The tensors of a Q-Former without its text branch, as BLIP-2 names them."""
    attention = ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")
    modules = ["embeddings.LayerNorm"]
    for layer in (f"encoder.layer.{i}" for i in range(max(n_layers, 1))):
        modules += [f"{layer}.attention.{part}" for part in attention]
        if int(layer.rsplit(".", 1)[1]) % CROSSING == 0:
            modules += [f"{layer}.crossattention.{part}" for part in attention]
        modules += [
            f"{layer}.{part}" for part in ("intermediate_query.dense", "output_query.dense", "output_query.LayerNorm")
        ]
    return [f"Qformer.bert.{module}.{kind}" for module in modules for kind in ("weight", "bias")]


def _renamed(name: str) -> str:
    """Of a tensor of the Q-Former."""
    name = name.replace("Qformer.bert.", "qformer.").replace("qformer.embeddings.LayerNorm.", "qformer.layernorm.")
    return name.replace("attention.self.", "attention.attention.")


def _processor(tokenizer, vision_config, n_queries: int) -> LlavaProcessor:
    """LLaVA's processor, which writes the image's word as often as needed, where the prompt has it.

    It counts one token per patch and adds a constant: one "patch" as large as the image, and the
    other queries on top. BLIP-2's own processor puts all queries before the text.
    """
    size = vision_config.image_size
    return LlavaProcessor(
        eva.image_processor(size), tokenizer, patch_size=size, num_additional_image_tokens=n_queries - 1,
        vision_feature_select_strategy="full", image_token=WORD, chat_template=TEMPLATE,
    )  # fmt: skip


OPTIONS = {
    "checkpoint": "MiniGPT-4's own file, such as pretrained_minigpt4_7b.pth",
    "llm": "folder or hub id of the Vicuna v0 that it belongs to",
    "vision": "the image tower: eva_vit_g.pth, as BLIP-2 publishes it",
    "qformer": "the Q-Former: blip2_pretrained_flant5xxl.pth",
}


def main(arguments: list[str] | None = None) -> None:
    command(convert, OPTIONS, arguments)


if __name__ == "__main__":
    main()
