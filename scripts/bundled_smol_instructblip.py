"""smol-instructblip: a Q-Former is trained between tiny-instructblip's tower and SmolLM2-135M.

Tower and decoder are frozen.

1. The Q-Former and its queries start as tiny-instructblip's. The projection starts as that of
   tiny-instructblip too, followed by the linear map from its decoder's words to SmolLM2's.
2. Q-Former, queries and projection are trained on captions and answers, as `bundled_smol` says.
3. Then again, on more captions of several objects, whose shapes weigh more: one-word answers are
   learned first, and which color belongs to which shape last.

As in every InstructBLIP, the queries stand before the text, and the prompt has no template. The
Q-Former reads the prompt too: each prompt has queries of its own.
"""

from __future__ import annotations

import torch
from bundled_models import QUERIES, llama_tokenizer
from bundled_models import processor as tiny_processor
from bundled_smol import SEVERAL, Smol, Texts, generation, save, tokenizer, train
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration, InstructBlipProcessor

from mechvlm import bundled
from mechvlm.bundled.smollm2 import Decoder, read_decoder


def processor(decoder: Decoder) -> InstructBlipProcessor:
    tiny = tiny_processor("tiny-instructblip")
    return InstructBlipProcessor(
        tiny.image_processor, tokenizer(decoder, named=False), tiny.qformer_tokenizer, num_query_tokens=QUERIES
    )


def build(decoder: Decoder, tiny: InstructBlipConfig) -> InstructBlipForConditionalGeneration:
    """The model with the decoder's weights; tower, Q-Former and projection of tiny's sizes, fresh."""
    config = InstructBlipConfig(
        vision_config=tiny.vision_config.to_dict(),
        qformer_config=tiny.qformer_config.to_dict(),
        text_config={"model_type": "llama", **decoder.settings},
        num_query_tokens=tiny.num_query_tokens,
        image_token_index=decoder.settings["vocab_size"] - 1,
        tie_word_embeddings=True,
    )
    model = InstructBlipForConditionalGeneration(config).eval()
    model.language_model.model.load_state_dict(decoder.weights)
    model.tie_weights()
    model.generation_config = generation(decoder)
    return model


class InstructBlipTexts(Texts):
    """Each prompt behind its own queries, with its ids for the Q-Former (`q_ids`, `q_mask`)."""

    def __init__(self, tokenizer, qformer_tokenizer):
        super().__init__(tokenizer)
        self.qformer_tokenizer = qformer_tokenizer

    def shared(self):
        return []

    def question(self, prompt):
        return [*[self.image] * QUERIES, *self.encode(prompt)]

    def answer(self, text):
        return self.encode(" " + text)  # no template ends in a space or a new line

    def pack(self, texts):
        batch, kinds = super().pack(texts)
        prompts = [prompt for row in texts for _, prompt, _ in row]
        asked = self.qformer_tokenizer(prompts, padding=True, return_tensors="pt")
        return batch | {"q_ids": asked.input_ids, "q_mask": asked.attention_mask, "row": _rows(texts)}, kinds


def _rows(texts: list[list[tuple]]) -> torch.Tensor:
    """The row of each prompt, [prompt]."""
    return torch.tensor([i for i, row in enumerate(texts) for _ in row])


class SmolInstructBlip(Smol):
    """The Q-Former and its projection between the frozen tower and decoder."""

    def __init__(self, full: InstructBlipForConditionalGeneration):
        super().__init__(full.language_model.model, full.config.image_token_index)
        self.tower, self.qformer = full.vision_model.requires_grad_(False), full.qformer
        self.query_tokens, self.projection = full.query_tokens, full.language_projection

    def image(self, pixels, q_ids, q_mask, row):
        """One for each query, [prompt, 16, 576]."""
        seen = self.tower(pixel_values=pixels.to(self.projection.weight.dtype)).last_hidden_state[row]
        query = self.query_tokens.expand(len(row), -1, -1)
        read = torch.cat([q_mask.new_ones(len(row), query.shape[1]), q_mask], 1)
        out = self.qformer(input_ids=q_ids, attention_mask=read, query_embeds=query, encoder_hidden_states=seen)
        return self.projection(out.last_hidden_state[:, : query.shape[1]])


def start_projection(
    full: InstructBlipForConditionalGeneration, tiny: InstructBlipForConditionalGeneration, decoder: Decoder
) -> float:
    """Set the projection to tiny's, then tiny's words to SmolLM2's by ridge regression. Returns R².

    Its outputs are of the size of words.
    """
    own, vocab = llama_tokenizer(False), tokenizer(decoder, named=False)
    words = [(i, w[1:]) for w, i in own.get_vocab().items() if w[0] == "▁" and len(w) > 2 and w[1:].isalpha()]
    x = tiny.language_model.model.embed_tokens.weight.detach()[[i for i, _ in words]].double()
    embedding = decoder.weights["embed_tokens.weight"]
    y = torch.stack([embedding[vocab(" " + w, add_special_tokens=False).input_ids].mean(0) for _, w in words]).double()
    ridge = x.T @ x + 0.1 * x.square().sum(0).mean() * torch.eye(x.shape[1]).double()
    to_smol = torch.linalg.solve(ridge, x.T @ y)
    with torch.no_grad():
        weight = (tiny.language_projection.weight.double().T @ to_smol).T
        scale = y.norm(dim=-1).mean() / weight.norm()  # what the Q-Former gives is of unit variance
        full.language_projection.weight.copy_(scale * weight)
        full.language_projection.bias.copy_(scale * (tiny.language_projection.bias.double() @ to_smol))
    return 1 - ((x @ to_smol - y).square().sum() / (y - y.mean(0)).square().sum()).item()


def stage(args) -> None:
    """Train the Q-Former and its projection, and write smol-instructblip's folder."""
    torch.manual_seed(args.seed + 4)
    decoder, name = read_decoder(), "tiny-instructblip"
    tiny = InstructBlipForConditionalGeneration.from_pretrained(bundled.path(name), dtype=torch.float32)
    full = build(decoder, tiny.config)
    for part in ("vision_model", "qformer"):
        getattr(full, part).load_state_dict(getattr(tiny, part).state_dict())
    full.query_tokens.data.copy_(tiny.query_tokens)
    r2 = start_projection(full, tiny, decoder)
    print(f"smol-instructblip: from words to words, R2 {r2:.3f}", flush=True)
    reads = processor(decoder)
    texts = InstructBlipTexts(reads.tokenizer, reads.qformer_tokenizer)
    module = SmolInstructBlip(full)
    train("smol-instructblip-words", module, texts, reads.image_processor, args, args.steps or 1600, 1e-3)
    texts.shape_weight = 5.0
    train(
        "smol-instructblip", module, texts, reads.image_processor, args, args.steps or 2000, 5e-4,
        objects=SEVERAL, captions=3, questions=2,
    )  # fmt: skip
    save(full, reads, args.out / "smol-instructblip")
