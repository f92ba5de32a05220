"""Small checkpoints of the older systems, in the layout and with the names of the public ones."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BeitImageProcessor,
    BeitModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from helpers.models import llama_tokenizer, randomise, text_config

WIDTH, QUERY_WIDTH, LLM_WIDTH, PATCH = 176, 128, 32, 14
BLOCKS, LAYERS, QUERIES = 2, 4, 6


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Norm weights around 1, all else around 0: none is a value that would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    scale = {name: 0.3 if len(shape) < 2 else min(0.3, shape[-1] ** -0.5) for name, shape in shapes.items()}
    is_norm = {name: name.lower().endswith("norm.weight") or ".norm" in name or "ln_vision" in name for name in shapes}
    return {
        name: scale[name] * values + (1 if is_norm[name] and name.endswith("weight") else 0)
        for name, values in noise.items()
    }


def _linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def eva_file(path: Path, grid: int, seed: int = 1) -> dict[str, Tensor]:
    """eva_vit_g.pth: a block more than is read, a norm and a classifier; tensors at the top."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH), "pos_embed": (1, 1 + grid**2, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH), "patch_embed.proj.bias": (WIDTH,),
    }  # fmt: skip
    for b in (f"blocks.{i}" for i in range(BLOCKS + 1)):
        shapes |= _norm(f"{b}.norm1", WIDTH) | _norm(f"{b}.norm2", WIDTH)
        shapes |= {
            f"{b}.attn.qkv.weight": (3 * WIDTH, WIDTH),
            f"{b}.attn.q_bias": (WIDTH,),
            f"{b}.attn.v_bias": (WIDTH,),
        }
        shapes |= _linear(f"{b}.attn.proj", WIDTH, WIDTH)
        shapes |= _linear(f"{b}.mlp.fc1", 768, WIDTH) | _linear(f"{b}.mlp.fc2", WIDTH, 768)
    tensors = random_tensors(shapes | _norm("norm", WIDTH) | _linear("head", 10, WIDTH), seed)
    torch.save(tensors, path)
    return tensors


def qformer_file(path: Path, seed: int = 2) -> dict[str, Tensor]:
    """blip2_pretrained_flant5xxl.pth: Q-Former, queries, ln_vision, and a projection to T5."""
    shapes: dict[str, tuple[int, ...]] = {"query_tokens": (1, QUERIES, QUERY_WIDTH)}
    shapes |= _norm("ln_vision", WIDTH) | _norm("Qformer.bert.embeddings.LayerNorm", QUERY_WIDTH)
    for i in range(LAYERS):
        layer = f"Qformer.bert.encoder.layer.{i}"
        for kind, width in (("attention", QUERY_WIDTH), ("crossattention", WIDTH))[: 2 if i % 2 == 0 else 1]:
            shapes |= _linear(f"{layer}.{kind}.self.query", QUERY_WIDTH, QUERY_WIDTH)
            shapes |= _linear(f"{layer}.{kind}.self.key", QUERY_WIDTH, width)
            shapes |= _linear(f"{layer}.{kind}.self.value", QUERY_WIDTH, width)
            shapes |= _linear(f"{layer}.{kind}.output.dense", QUERY_WIDTH, QUERY_WIDTH)
            shapes |= _norm(f"{layer}.{kind}.output.LayerNorm", QUERY_WIDTH)
        shapes |= _linear(f"{layer}.intermediate_query.dense", 256, QUERY_WIDTH)
        shapes |= _linear(f"{layer}.output_query.dense", QUERY_WIDTH, 256)
        shapes |= _norm(f"{layer}.output_query.LayerNorm", QUERY_WIDTH)
    tensors = random_tensors(shapes | _linear("t5_proj", 20, QUERY_WIDTH), seed)
    tensors["Qformer.bert.embeddings.position_ids"] = torch.arange(512)[None]
    torch.save({"model": tensors}, path)
    return tensors


def trained_file(path: Path, tensors: dict[str, Tensor], **settings) -> None:
    """A system's own checkpoint: what was trained, with the optimizer's state and the settings.

    Buffers are never frozen, so the tables of LLaMA's rotary embeddings are among them.
    """
    inside = "base_model.model." if any(".lora_" in name for name in tensors) else ""
    tables = {f"llama_model.{inside}model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(4) for i in range(2)}
    optimizer = {"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": [{"lr": 1e-5}]}
    config = {"run": {"task": "image_text_pretrain"}, "model": settings}
    torch.save({"model": tensors | tables, "optimizer": optimizer, "config": config, "scaler": None, "epoch": 3}, path)


def projection(columns: int, rows: int = LLM_WIDTH, seed: int = 3) -> dict[str, Tensor]:
    return random_tensors(_linear("llama_proj", rows, columns), seed)


def llama_folder(path: Path, seed: int = 4) -> LlamaForCausalLM:
    """A LLaMA with its real tokenizer, as its published folders name it."""
    model = randomise(LlamaForCausalLM(text_config(2, LLM_WIDTH, 4, 4, False, 32000)), seed)
    model.save_pretrained(path)
    llama_tokenizer(()).save_pretrained(path)
    settings = path / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("TokenizersBackend", "LlamaTokenizer"))
    return model


def lora(rank: int = 3, seed: int = 5) -> dict[str, Tensor]:
    """LoRA's pairs on the queries and values of `llama_folder`'s model, with peft's names."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(2):
        for part in ("q_proj", "v_proj"):
            name = f"llama_model.base_model.model.model.layers.{layer}.self_attn.{part}"
            shapes |= {f"{name}.lora_A.weight": (rank, LLM_WIDTH), f"{name}.lora_B.weight": (LLM_WIDTH, rank)}
    return random_tensors(shapes, seed)


def gptj_folder(path: Path, seed: int = 6) -> tuple[GPTJForCausalLM, PreTrainedTokenizerFast]:
    """A GPT-J: words of GPT-2's kind, the last of them <|endoftext|>, then spare words and rows.

    Returns:
        the model, and the tokenizer of GPT-2's words alone that LiMBeR uses, with the image's word.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(["a picture of a house"], trainers.BpeTrainer(vocab_size=270, initial_alphabet=letters))
    bpe.add_special_tokens(["<|endoftext|>"])
    end = bpe.token_to_id("<|endoftext|>")
    plain = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    spare = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    spare.add_tokens([f"<|extratoken_{i}|>" for i in range(1, 8)])
    spare.save_pretrained(path)
    plain.add_special_tokens({"cls_token": "<|image|>"})
    config = GPTJConfig(vocab_size=end + 12, n_embd=LLM_WIDTH, n_layer=2, n_head=4, rotary_dim=4, n_positions=128)
    model = randomise(GPTJForCausalLM(config), seed)
    with torch.no_grad():
        model.lm_head.bias.copy_(torch.randn(end + 12, generator=torch.Generator().manual_seed(seed)))
    model.save_pretrained(path)
    return model, plain


def beit_folder(path: Path, shared: bool, seed: int = 7, **settings) -> BeitModel:
    """A BEiT with its classifier, as it is published; 16 patches of 8 pixels."""
    config = BeitConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48, image_size=32, patch_size=8,
        use_relative_position_bias=not shared, use_shared_relative_position_bias=shared, use_mask_token=shared, **settings,
    )  # fmt: skip
    randomise(BeitForImageClassification(config), seed).save_pretrained(path)
    size = {"height": 32, "width": 32}
    BeitImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(path)
    return BeitModel.from_pretrained(path).eval()
