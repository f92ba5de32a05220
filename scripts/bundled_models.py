"""The bundled models' configurations, tokenizers and processors; `save` writes their folders."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    BertTokenizer,
    CLIPVisionConfig,
    GenerationConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

try:  # the PIL-backed classes need no torchvision; older transformers use the plain names for them
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil as BlipImageProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as CLIPImageProcessor
except ImportError:
    from transformers import BlipImageProcessor, CLIPImageProcessor

from mechvlm.datasets.scenes import sample_scenes

PIXELS, PATCH, WIDTH, QUERIES = 96, 12, 128, 16
GRID = PIXELS // PATCH
MEAN, STD = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]

LIST_PROMPTS = ("Describe the scene.", "Describe the image.", "What is in the picture?")
THERE_PROMPTS = ("What do you see?",)
RELATION_PROMPTS = ("Where are the objects?", "Describe where the objects are.")

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% for item in message['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for item in message['content'] | selectattr('type', 'equalto', 'text') %}{{ item['text'] }}{% endfor %}"
    "{% if message['role'] == 'user' %} {% else %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@lru_cache
def words() -> tuple[str, ...]:
    """All words and punctuation marks of the prompts, captions, questions and answers."""
    vocabulary = {"USER", "ASSISTANT", ":", "zero", "four", "five", "six", "seven"}
    texts = [*LIST_PROMPTS, *THERE_PROMPTS, *RELATION_PROMPTS]
    for scene in sample_scenes(3000, seed=1, split="train"):
        texts += scene.captions()
        texts += [f"{q.text} {q.answer}" for q in scene.questions()]
    for text in texts:
        vocabulary |= set(re.findall(r"\w+|[^\w\s]", text))
    return tuple(sorted(vocabulary))


def llama_tokenizer(image_token: bool) -> LlamaTokenizer:
    """A byte-fallback BPE with one token for each word of the scenes.

    Words that open a prompt also have a token without the leading space.
    """
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain = [w for w in words() if w.isalpha()]
    opening = sorted(
        {p.split()[0] for p in (*LIST_PROMPTS, *THERE_PROMPTS, *RELATION_PROMPTS)} | {"How", "Is", "What", "Where"}
    )
    corpus = ["▁" + w for w in plain] + opening * 3
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=4000, min_frequency=1, show_progress=False))
    merges = [
        tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in json.loads(bpe.to_str())["model"]["merges"]
    ]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    letters = sorted({c for w in corpus for c in w} | set(".,?:!'"))
    for token in [*letters, *(a + b for a, b in merges)]:
        vocab.setdefault(token, len(vocab))
    extra = {"extra_special_tokens": {"image_token": "<image>"}} if image_token else {}
    tokenizer = LlamaTokenizer(
        vocab=vocab, merges=merges, add_bos_token=True, pad_token="<pad>", model_max_length=512, **extra
    )
    if not image_token:
        tokenizer.add_tokens(["<image>"], special_tokens=True)
    for word in plain:
        assert len(tokenizer.tokenize(word)) == 1, (word, tokenizer.tokenize(word))
    return tokenizer


def qformer_tokenizer() -> BertTokenizer:
    """The Q-Former's tokenizer: whole lowercase words."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    entries = specials + sorted({w.lower() for w in words()} | {"[DEC]"})
    return BertTokenizer(vocab={w: i for i, w in enumerate(entries)}, model_max_length=512)


@lru_cache
def processor(name: str):
    """The processor of a bundled model, with its tokenizers."""
    pixel_options = {
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
        "do_convert_rgb": True,
        "resample": 3,
    }
    if name == "tiny-llava":
        images = CLIPImageProcessor(
            do_resize=True,
            size={"shortest_edge": PIXELS},
            do_center_crop=True,
            crop_size={"height": PIXELS, "width": PIXELS},
            **pixel_options,
        )
        return LlavaProcessor(
            image_processor=images,
            tokenizer=llama_tokenizer(True),
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=TEMPLATE,
        )
    images = BlipImageProcessor(do_resize=True, size={"height": PIXELS, "width": PIXELS}, **pixel_options)
    return InstructBlipProcessor(images, llama_tokenizer(False), qformer_tokenizer(), num_query_tokens=QUERIES)


def decoder_config(vocab_size: int) -> LlamaConfig:
    """Both models' decoder: 8 layers, 4 heads, width 128."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=vocab_size - 1,
        initializer_range=0.05,
    )


_TOWER = {
    "hidden_size": WIDTH,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": PIXELS,
    "patch_size": PATCH,
    "initializer_range": 0.05,
}


def build(name: str) -> torch.nn.Module:
    """The model with fresh weights, in float32."""
    tokenizer = processor(name).tokenizer
    vocab, image = len(tokenizer), tokenizer.convert_tokens_to_ids("<image>")
    text = decoder_config(vocab)
    text.pad_token_id = tokenizer.pad_token_id
    if name == "tiny-llava":
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**_TOWER, hidden_act="gelu"),
            text_config=text,
            image_token_index=image,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            image_seq_length=GRID**2,
            tie_word_embeddings=False,
        )
        cls = LlavaForConditionalGeneration
    else:
        config = InstructBlipConfig(
            vision_config={**_TOWER, "hidden_act": "gelu", "qkv_bias": True},
            qformer_config={
                "vocab_size": len(processor(name).qformer_tokenizer),
                "hidden_size": WIDTH,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "intermediate_size": 384,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
                "max_position_embeddings": 64,
                "cross_attention_frequency": 1,
                "encoder_hidden_size": WIDTH,
                "initializer_range": 0.05,
            },
            text_config=text.to_dict(),
            num_query_tokens=QUERIES,
            image_token_index=image,
            tie_word_embeddings=False,
        )
        cls = InstructBlipForConditionalGeneration
    config._attn_implementation = "eager"  # the fastest to train on a CPU in bfloat16
    model = cls(config)
    if name == "tiny-instructblip":
        torch.nn.init.normal_(model.query_tokens, std=0.2)  # the library starts all queries at zero
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(**ids, do_sample=False, max_new_tokens=32)
    return model


def fourier_positions() -> torch.Tensor:
    """A 2-D sine and cosine code of each patch's row and column, [64, width].

    Random position embeddings would be nearly lost against the pixels.
    """
    angles = torch.arange(GRID)[:, None] * torch.pi * 2.0 ** torch.linspace(-1, 2, WIDTH // 4)[None] / GRID
    code = torch.cat([angles.sin(), angles.cos()], 1)
    grid = torch.cat([code[:, None].expand(-1, GRID, -1), code[None].expand(GRID, -1, -1)], 2)
    return 0.3 * grid.reshape(GRID**2, WIDTH)


def start_from_clip(blip, clip, pixels):
    """Copy a CLIP tower's weights into InstructBLIP's, which has no norm after the embeddings.

    CLIP's norm is folded into the embeddings at its mean scale over `pixels`. The result is
    approximate, so the tower is tuned afterwards.
    """
    clip_embeddings, norm = clip.embeddings, clip.pre_layrnorm
    with torch.no_grad():
        sigma = clip_embeddings(pixels).std(-1).mean()
        center = torch.eye(WIDTH) - 1 / WIDTH
        fold = torch.diag(norm.weight) @ center / sigma
        blip_embeddings = blip.embeddings
        patches = torch.einsum("de,echw->dchw", fold, clip_embeddings.patch_embedding.weight)
        blip_embeddings.patch_embedding.weight.copy_(patches)
        blip_embeddings.patch_embedding.bias.zero_()
        positions = clip_embeddings.position_embedding.weight @ fold.T + norm.bias
        blip_embeddings.position_embedding.copy_(positions[None])
        blip_embeddings.class_embedding.copy_((fold @ clip_embeddings.class_embedding)[None, None])
        for to, source in zip(blip.encoder.layers, clip.encoder.layers, strict=True):
            qkv = [source.self_attn.q_proj, source.self_attn.k_proj, source.self_attn.v_proj]
            to.self_attn.qkv.weight.copy_(torch.cat([m.weight for m in qkv]))
            to.self_attn.qkv.bias.copy_(torch.cat([m.bias for m in qkv]))
            to.self_attn.projection.load_state_dict(source.self_attn.out_proj.state_dict())
            for part in ("layer_norm1", "layer_norm2", "mlp"):
                getattr(to, part).load_state_dict(getattr(source, part).state_dict())


def save(model: torch.nn.Module, name: str, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Save all that `from_pretrained` needs.

    Weights in `dtype`, configuration, tokenizers and processor.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fresh = build(name)
    fresh.load_state_dict(model.state_dict())
    fresh.to(dtype).save_pretrained(folder)
    processor(name).save_pretrained(folder)
