"""Workers make a study's shards.

`LocalWorker` makes them in this process, `mechvlm.study.running.ray_workers` on a cluster.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from mechvlm.datasets import Example
from mechvlm.study.running.plan import Plan
from mechvlm.study.running.shards import check_prompt, make_gallery, make_shard
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
        """Write the model's gallery of these examples."""

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

    def __enter__(self) -> "LocalWorker":
        return self

    def __exit__(self, *_) -> None:
        self.vlm = None

    def load(self, model: int, report: Callable[[], None]) -> None:
        report()
        self.vlm = None  # the previous model goes first: two may not fit into memory
        source = self.models[model]
        if isinstance(source, VLM):
            self.vlm = source
        else:
            # The commit in settings.json, even if the hub has a newer one by now.
            self.vlm = load(source, revision=self.weights.get(source, {}).get("revision"), **self.options)
        check_prompt(self.vlm, self.plan.prompt)

    def make_shards(self, model: int, numbers: list[int], progress: Callable[[int], None]) -> None:
        assert self.vlm is not None
        before = 0
        for number in numbers:
            make_shard(self.plan, self.vlm, model, number, lambda done: progress(before + done))  # noqa: B023
            before += len(self.plan.example_indices(number))

    def make_gallery(self, model: int, examples: list[Example], progress: Callable[[int], None]) -> None:
        assert self.vlm is not None
        make_gallery(self.plan, self.vlm, model, examples, progress)
