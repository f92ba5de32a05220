"""Tokenizers of bytes with a family's own special tokens, and chat templates in its own words."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from .parts import IMAGE


def tokenizer(image: str = "<image>", *others: str, starts: bool = False, **names: str) -> PreTrainedTokenizerFast:
    """Every byte is a token; `image` is token 300, `others` follow it.

    Args:
        image: the image token.
        others: more special tokens.
        starts: whether every text starts with <s>, as Llama's do.
        names: attributes by which a processor asks for a special token, image_token="<image>".
    """
    pieces = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [f"<unused{i}>" for i in range(len(pieces), IMAGE)] + [image, *dict.fromkeys(others)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<pad>", "<s>", "</s>", *pieces[IMAGE:]])
    if starts:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left",
        extra_special_tokens=names or None,
    )  # fmt: skip


def template(image: str, user: str = "USER: ", assistant: str = "ASSISTANT:", end: str = "\n") -> str:
    """A chat template: `image` where an image is; before each turn `user` or `assistant`."""
    return (
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        + user
        + "{% else %}"
        + assistant
        + "{% endif %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}" + image + "{% else %}{{ part['text'] }}"
        "{% endif %}{% endfor %}" + end + "{% endfor %}{% if add_generation_prompt %}" + assistant + "{% endif %}"
    )


def turns(image: str) -> str:
    """The chat template of Qwen, InternVL and others: turns between <|im_start|> and <|im_end|>."""
    return template(image, "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n")


TURNS = ("<|im_start|>", "<|im_end|>")
