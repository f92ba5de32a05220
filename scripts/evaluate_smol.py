"""What a smol model says of pictures, with many prompts about one picture in a row.

`Reader` answers like `evaluate_bundled.Model`. A picture and its prompts are one packed row, as in
training: each prompt sees the picture and itself. Greedy decoding then adds a token to every prompt
of the row at once.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch
from bundled_smol import Smol, Texts
from bundled_smol_instructblip import InstructBlipTexts, SmolInstructBlip
from bundled_smol_llava import LlavaTexts, SmolLlava
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

ROWS = 12
"""Pictures in a batch."""


class Reader:
    """A smol model with its processor: greedy answers, and log-probabilities of captions."""

    def __init__(self, name: str, folder: Path):
        self.name = name
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.texts, self.module = self._parts()

    def _parts(self) -> tuple[Texts, Smol]:
        tokenizer = self.processor.tokenizer
        if self.model.config.model_type == "llava":
            return LlavaTexts(tokenizer), SmolLlava(self.model)
        return InstructBlipTexts(tokenizer, self.processor.qformer_tokenizer), SmolInstructBlip(self.model)

    def rows(self, images, texts, answers):
        """Batches of packed rows: numbers of the examples in each row, what the module takes, their
        segments, targets and weights, and the example at each position.
        """
        of_image = defaultdict(list)
        for i, image in enumerate(images):
            of_image[id(image)].append(i)
        members = list(of_image.values())
        for part in (members[i : i + ROWS] for i in range(0, len(members), ROWS)):
            batch, numbers = self.texts.pack([[(i, texts[i], answers[i]) for i in row] for row in part])
            shown = [images[row[0]] for row in part]
            batch["pixels"] = self.processor.image_processor(shown, return_tensors="pt").pixel_values
            told = {key: batch.pop(key) for key in ("segments", "targets", "weights")}
            yield part, batch, told, numbers

    @torch.no_grad()
    def answers(self, images, texts, n=32) -> list[str]:
        """Greedy answers of at most `n` tokens."""
        out = [""] * len(texts)
        for members, batch, told, _ in self.rows(images, texts, [None] * len(texts)):
            rows = self._greedy(batch, told["segments"], max(map(len, members)), n)
            for row, said in zip(members, rows, strict=True):
                for i, tokens in zip(row, said, strict=False):  # rows of fewer prompts are filled up
                    ids = tokens[: tokens.index(self.texts.end)] if self.texts.end in tokens else tokens
                    out[i] = self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return out

    def _greedy(self, batch, seen, n_prompts: int, n: int) -> list[list[list[int]]]:
        """The next `n` tokens of each row's prompts, [row][prompt][token]; fewer when all have ended."""
        embed, past, own = self.module.decoder.embed_tokens, DynamicCache(), torch.arange(1, n_prompts + 1)
        states, _ = self.module.states(**batch, past=past)
        ends = torch.stack([((seen == s) * torch.arange(seen.shape[1])).argmax(1) for s in own], 1)
        place = batch["positions"].gather(1, ends)
        next_states = states.gather(1, ends[..., None].expand(-1, -1, states.shape[-1]))
        said, ended = [], torch.stack([(seen != s).all(1) for s in own], 1)  # a row may have fewer prompts
        for _ in range(n):
            said.append(self.module.logits(next_states).argmax(-1))
            ended |= said[-1] == self.texts.end
            if ended.all():
                break
            place, seen = place + 1, torch.cat([seen, own.expand(len(seen), -1)], 1)
            mask = (seen[:, None] == 0) | (seen[:, None] == own[None, :, None])
            next_states = self.module.read(embed(said[-1]), mask, place, past)
        return torch.stack(said, -1).tolist()

    @torch.no_grad()
    def scores(self, images, text, captions) -> list[float]:
        """Log-probability of each image's caption in nats, with its end-of-sequence token."""
        out = [0.0] * len(images)
        for _, batch, told, numbers in self.rows(images, [text] * len(images), captions):
            states, _ = self.module.states(**batch)
            counts = told["weights"] > 0
            log_probs = self.module.logits(states[counts]).log_softmax(-1)
            each = log_probs.gather(1, told["targets"][counts][:, None])[:, 0].tolist()
            for i, value in zip(numbers[counts.numpy()], each, strict=True):
                out[i] += value
        return out
