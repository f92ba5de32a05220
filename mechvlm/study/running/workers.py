"""Who makes a study's shards: this process (`Here`), or many on a cluster (`mechvlm.study.running.ray_workers`)."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from mechvlm.datasets import Example
from mechvlm.study.running.shards import Plan, check_prompt, make_gallery, make_shard
from mechvlm.vlm.loading import load
from mechvlm.vlm.vlm import VLM


@runtime_checkable
class Workers(Protocol):
    """What a study asks of whoever makes its shards, one model after the other; `model` is its number in the plan."""

    def load(self, model: int, say: Callable[[], None]) -> None:
        """Be ready to read with a model; `say` is called while that goes on."""

    def shards(self, model: int, todo: list[int], progress: Callable[[int], None]) -> None:
        """Write these shards of the model that was loaded; `progress` is called with the examples done so far."""

    def gallery(self, model: int, shown: list[Example], progress: Callable[[int], None]) -> None:
        """Write the model's gallery, of these examples."""

    def __enter__(self) -> "Workers": ...

    def __exit__(self, *_) -> None: ...


class Here:
    """Makes everything in this process, with one model at a time in memory.

    Args:
        plan: of the study.
        models: names, or models that are loaded, as the plan numbers them.
        weights: by name, what is known of them; of a hub id its revision.
        options: of `mechvlm.load`.
    """

    def __init__(self, plan: Plan, models: Sequence[str | VLM], weights: dict[str, dict], options: dict[str, Any]):
        self.plan, self.models, self.weights, self.options = plan, tuple(models), weights, options
        self.vlm: VLM | None = None

    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *_) -> None:
        self.vlm = None

    def load(self, model: int, say: Callable[[], None]) -> None:
        say()
        self.vlm = None  # the one before goes first: two may not fit
        asked = self.models[model]
        if isinstance(asked, VLM):
            self.vlm = asked
        else:
            # The commit that settings.json names, whatever the hub holds by now.
            self.vlm = load(asked, revision=self.weights.get(asked, {}).get("revision"), **self.options)
        check_prompt(self.vlm, self.plan.prompt)

    def shards(self, model: int, todo: list[int], progress: Callable[[int], None]) -> None:
        assert self.vlm is not None
        at = 0
        for shard in todo:
            make_shard(self.plan, self.vlm, model, shard, lambda done: progress(at + done))  # noqa: B023
            at += len(self.plan.examples(shard))

    def gallery(self, model: int, shown: list[Example], progress: Callable[[int], None]) -> None:
        assert self.vlm is not None
        make_gallery(self.plan, self.vlm, model, shown, progress)
