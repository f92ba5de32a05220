"""A small random decoder in SmolLM2's place: grouped queries, tied embeddings, byte-level BPE."""

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaModel

from mechvlm.bundled.smollm2 import IMAGE_TOKEN, Decoder
from mechvlm.datasets.scenes import sample_scenes

WIDTH = 48


def small_decoder() -> Decoder:
    """The same weights and the same tokenizer every time."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    tokenizer.train_from_iterator([c for s in sample_scenes(3, 0, "train", (1, 2)) for c in s.captions()], trainer)
    tokenizer.add_special_tokens([AddedToken(IMAGE_TOKEN, normalized=False)])
    settings = {
        "vocab_size": tokenizer.get_vocab_size(), "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lm = LlamaModel(LlamaConfig(**settings, initializer_range=0.3))
    return Decoder(settings, {name: value.detach() for name, value in lm.state_dict().items()}, tokenizer)
