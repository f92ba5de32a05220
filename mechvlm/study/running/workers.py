"""Workers make a study's shards.

`LocalWorker` makes them in this process, `mechvlm.study.running.ray_workers` on a cluster.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch

from mechvlm.datasets import Example
from mechvlm.measures.vocabulary import VocabularyWords
from mechvlm.study.running.beside import Beside
from mechvlm.study.running.plan import Plan
from mechvlm.study.running.shards import check_prompt, inputs_of, make_gallery, make_shard, threads_for
from mechvlm.vlm.loading import load
from mechvlm.vlm.vlm import VLM


@runtime_checkable
class Workers(Protocol):
    """The interface through which a study has its shards made, one model after the other.

    `model` is always the model's number in the plan.
    """

    def load(self, model: int, report: Callable[[], None]) -> None:
        """Load the model; `report` is called at the beginning, and perhaps again meanwhile."""

    def make_shards(self, model: int, numbers: list[int], progress: Callable[[int], None]) -> None:
        """Write these shards of the loaded model; `progress` is called with the examples done."""

    def make_gallery(self, model: int, examples: list[Example], progress: Callable[[int], None]) -> None:
        """Write the model's controls of these examples, and its gallery of the first of them."""

    def __enter__(self) -> "Workers": ...

    def __exit__(self, *_) -> None: ...


class LocalWorker:
    """Makes everything in this process, with one model at a time in memory.

    Args:
        plan: of the study.
        models: names or loaded models, in the order of `plan.names`.
        weights: by model name, `weights_identity` of each; a hub id is loaded at its revision.
        options: of `mechvlm.load`.
    """

    def __init__(self, plan: Plan, models: Sequence[str | VLM], weights: dict[str, dict], options: dict[str, Any]):
        self.plan, self.models, self.weights, self.options = plan, tuple(models), weights, options
        self.vlm: VLM | None = None
        self.words: VocabularyWords | None = None

    def __enter__(self) -> "LocalWorker":
        return self

    def __exit__(self, *_) -> None:
        self.vlm = self.words = None

    def load(self, model: int, report: Callable[[], None]) -> None:
        report()
        self.vlm = self.words = None  # the previous model goes first: two may not fit into memory
        source = self.models[model]
        if isinstance(source, VLM):
            self.vlm = source
        else:
            # The commit in settings.json, even if the hub has a newer one by now.
            self.vlm = load(source, revision=self.weights.get(source, {}).get("revision"), **self.options)
        to_str_tokens = self.vlm.to_str_tokens
        self.words = VocabularyWords(lambda ids: to_str_tokens(torch.from_numpy(ids)))
        check_prompt(self.vlm, self.plan.prompt)

    def make_shards(self, model: int, numbers: list[int], progress: Callable[[int], None]) -> None:
        assert self.vlm is not None
        assert self.words is not None
        before = 0
        batches = [batch for number in numbers for batch in self.plan.batches(number)]
        # torch's own threads come first: in a forked process, two threads that ask for its pool at
        # once would find none.
        with threads_for(self.vlm), Beside(partial(inputs_of, self.plan, self.vlm), batches) as beside:
            for number in numbers:
                report = lambda done: progress(before + done)  # noqa: B023, E731
                make_shard(self.plan, self.vlm, model, number, report, beside, self.words)
                before += len(self.plan.example_indices(number))
            beside.finish()

    def make_gallery(self, model: int, examples: list[Example], progress: Callable[[int], None]) -> None:
        assert self.vlm is not None
        make_gallery(self.plan, self.vlm, model, examples, progress)
