"""What a smol model says of pictures, with many prompts behind one picture.

`Reader` answers like `evaluate_bundled.Model`. A picture and its prompts are one packed row, as in
training: each prompt sees the picture and itself. Greedy decoding then adds a token to every prompt
of the row at once.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch
from bundled_smol import Smol, Texts
from transformers import AutoProcessor, DynamicCache, LlavaForConditionalGeneration

ROWS = 12
"""Pictures in a batch."""


class Reader:
    """A smol model with its processor: greedy answers, and log-probabilities of captions."""

    def __init__(self, name: str, folder: Path):
        self.name = name
        self.model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.texts = Texts(self.processor.tokenizer)
        self.module = Smol(self.model, len(self.texts.prefix))

    def rows(self, images, texts, answers):
        """Batches of packed rows: (numbers of the examples in each row, batch, kinds)."""
        of_image = defaultdict(list)
        for i, image in enumerate(images):
            of_image[id(image)].append(i)
        members = list(of_image.values())
        for part in (members[i : i + ROWS] for i in range(0, len(members), ROWS)):
            batch, numbers = self.texts.pack([[(i, texts[i], answers[i]) for i in row] for row in part])
            shown = [images[row[0]] for row in part]
            batch["pixels"] = self.processor.image_processor(shown, return_tensors="pt").pixel_values
            yield part, batch, numbers

    @torch.no_grad()
    def answers(self, images, texts, n=32) -> list[str]:
        """Greedy answers of at most `n` tokens."""
        out = [""] * len(texts)
        for members, batch, _ in self.rows(images, texts, [None] * len(texts)):
            for row, said in zip(members, self._greedy(batch, max(map(len, members)), n), strict=True):
                for i, tokens in zip(row, said, strict=False):  # rows of fewer prompts are filled up
                    ids = tokens[: tokens.index(self.texts.end)] if self.texts.end in tokens else tokens
                    out[i] = self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return out

    def _greedy(self, batch, n_prompts: int, n: int) -> list[list[list[int]]]:
        """The next `n` tokens of each row's prompts, [row][prompt][token]; fewer when all have ended."""
        embed, past, own = self.module.decoder.embed_tokens, DynamicCache(), torch.arange(1, n_prompts + 1)
        seen, positions = batch["segments"], batch["positions"]
        states, _ = self.module.states(batch["pixels"], batch["ids"], batch["mask"], positions, past)
        ends = torch.stack([((seen == s) * torch.arange(seen.shape[1])).argmax(1) for s in own], 1)
        place = positions.gather(1, ends)
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
        for _, batch, numbers in self.rows(images, [text] * len(images), captions):
            states, _ = self.module.states(batch["pixels"], batch["ids"], batch["mask"], batch["positions"])
            counts = batch["weights"] > 0
            log_probs = self.module.logits(states[counts]).log_softmax(-1)
            each = log_probs.gather(1, batch["targets"][counts][:, None])[:, 0].tolist()
            for i, value in zip(numbers[counts.numpy()], each, strict=True):
                out[i] += value
        return out
