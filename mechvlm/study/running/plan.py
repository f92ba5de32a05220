"""Plan: how a study's work is cut into shards, and where each one is written.

A shard is a run of consecutive examples, read by one model. Where the examples are Winoground's
sides of pairs, further shards hold runs of pairs; their numbers continue those of the examples.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mechvlm.datasets import Dataset, Example, Pair, pairs_of
from mechvlm.errors import InputError
from mechvlm.study.running.settings import pair_shard_size

GALLERY_EXAMPLES = 6
"""Examples that the report shows."""


@dataclass(frozen=True)
class Plan:
    """What a worker needs to make any of a study's shards.

    Attributes:
        folder: where the shards go.
        names: of the models, in order; a model's index here is its number.
        data: the examples, in order.
        prompt: of every example.
        batch_size: examples in a forward.
        shard_size: examples in a shard; a model's last shard may hold fewer.
        views: whether the gallery has patch views.
        answers: whether the models' answers are read too.
        settings: the digest of the study's settings; empty for a study without a folder.
        seed: of the study.
    """

    folder: Path
    names: tuple[str, ...]
    data: Dataset
    prompt: str
    batch_size: int
    shard_size: int
    views: bool
    answers: bool = False
    settings: str = ""
    seed: int = 0

    def __len__(self) -> int:
        """The number of each model's shards of examples."""
        return -(-len(self.data) // self.shard_size)

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """Winoground's pairs with both sides among the examples; empty for other data sets."""
        try:
            return tuple(pairs_of(self.data.examples))
        except InputError:
            return ()

    @property
    def pair_shards(self) -> range:
        """The numbers of each model's shards of pairs, after those of its shards of examples."""
        return range(len(self), len(self) + -(-len(self.pairs) // pair_shard_size(self.batch_size)))

    @property
    def n_readings(self) -> int:
        """Examples that each model reads: all of them, and both sides of each pair once more."""
        return len(self.data) + 2 * len(self.pairs)

    def shard_folder(self, model: int, number: int) -> Path:
        """Where the shard `number` of model number `model` lies."""
        if number < len(self):
            return self.folder / f"{model}-{number:05}"
        return self.folder / f"{model}-pairs-{number - len(self):05}"

    def gallery_folder(self, model: int) -> Path:
        """Where the gallery of model number `model` lies, and the controls of its curve."""
        return self.folder / f"{model}-gallery"

    def example_indices(self, number: int) -> Sequence[int]:
        """The indices in `data` of a shard's examples; for a shard of pairs, of their sides."""
        if number < len(self):
            return range(number * self.shard_size, min((number + 1) * self.shard_size, len(self.data)))
        ids = {self.pairs[index].id for index in self.pair_indices(number)}
        return [index for index, example in enumerate(self.data.examples) if example.meta.get("pair") in ids]

    def identity(self, folder: Path, examples: Iterable[Example]) -> dict[str, Any]:
        """What a shard's or a gallery's about.json says on where it belongs."""
        return {"part": folder.name, "settings": self.settings, "examples": [example.id for example in examples]}

    def shard_identity(self, model: int, number: int) -> dict[str, Any]:
        """The same of the shard `number` of model number `model`."""
        examples = (self.data.examples[index] for index in self.example_indices(number))
        return self.identity(self.shard_folder(model, number), examples)

    def batches(self, number: int) -> list[range]:
        """The indices in `data` of each batch of a shard of examples; none of a shard of pairs."""
        if number not in range(len(self)):
            return []
        indices = self.example_indices(number)
        starts = range(indices[0], indices[-1] + 1, self.batch_size)
        return [range(start, min(start + self.batch_size, indices[-1] + 1)) for start in starts]

    def pair_indices(self, number: int) -> range:
        """The indices in `pairs` of the pairs in a shard of pairs."""
        first, size = number - len(self), pair_shard_size(self.batch_size)
        return range(first * size, min((first + 1) * size, len(self.pairs)))


def missing_shards(plan: Plan, model: int) -> list[int]:
    """The numbers of a model's shards that are not written yet."""
    return [n for n in (*range(len(plan)), *plan.pair_shards) if not plan.shard_folder(model, n).is_dir()]
