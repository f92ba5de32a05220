"""A study's controls: the contextualization of its first examples without their images.

The same forward runs with other things at the image's positions, as
`mechvlm.contextualization_controls` does. It is run on `CONTROL_EXAMPLES` examples, whatever the
study's size: one forward for each of three controls.
"""

import time
from typing import Any

import pandas as pd
import pyarrow as pa
import torch

from mechvlm.datasets import Example
from mechvlm.errors import InputError, ModelError
from mechvlm.experiments.contextualization_controls import control_curves, control_tokens
from mechvlm.experiments.contextualization_controls_result import CONTROL_KINDS
from mechvlm.ndif.connection import retrying
from mechvlm.results import long_frame
from mechvlm.study.running.plan import Plan
from mechvlm.tracing.memory import Failed, in_halves
from mechvlm.vlm.vlm import VLM

CONTROL_SCHEMA = pa.schema(
    [*((name, pa.string()) for name in ("model", "example", "control")), ("state", pa.int64()), ("value", pa.float32())]
)
KINDS_TO_TRY = (CONTROL_KINDS, ("noise", "words"), ("noise",))
"""A tokenizer may not know the running text, and a decoder may take no words (OPT)."""


def read_controls(plan: Plan, vlm: VLM, model: int, examples: list[Example]) -> tuple[pa.Table, dict[str, Any]]:
    """The controls of these examples, as many kinds as the model allows.

    Returns:
        (table, about): a row for each example, control and state; and for about.json the kinds, the
        seconds, and why a kind, or an example that does not fit into memory, is left out.
    """
    clock, name = time.perf_counter(), plan.names[model]
    frames: list[pd.DataFrame] = []
    without_room: list[str] = []
    reasons: list[str] = []
    kinds: tuple[str, ...] = ()
    for kinds in KINDS_TO_TRY:
        try:
            frames, without_room = _curves(plan, vlm, examples, kinds)
            break
        except (InputError, ModelError) as error:
            reasons.append(str(error))
    else:
        kinds = ()
    lacking = ", ".join(kind for kind in CONTROL_KINDS if kind not in kinds)
    left_out = [*(f"{lacking}: {reason}" for reason in dict.fromkeys(reasons)), *without_room]
    frame = pd.concat(frames).assign(model=name) if frames else pd.DataFrame(columns=CONTROL_SCHEMA.names)
    table = pa.Table.from_pandas(frame[CONTROL_SCHEMA.names], CONTROL_SCHEMA, preserve_index=False)
    about = {"kinds": list(kinds), "left_out": left_out, "seconds": round(time.perf_counter() - clock, 3)}
    return table.replace_schema_metadata(), about


def _curves(
    plan: Plan, vlm: VLM, examples: list[Example], kinds: tuple[str, ...]
) -> tuple[list[pd.DataFrame], list[str]]:
    choices = control_tokens(vlm, kinds)
    frames, missing = [], []

    def read_part(part: range) -> torch.Tensor:
        inputs = vlm.inputs([examples[index].image for index in part], plan.prompt)
        # The number of the first example is added, so that batches differ in what is drawn.
        results = retrying(lambda: control_curves(vlm, inputs, choices, plan.seed + part.start))
        return torch.stack([result.inter for result in results])  # [kind state example]

    for start in range(0, len(examples), plan.batch_size):
        for part, outcome in in_halves(range(start, min(start + plan.batch_size, len(examples))), read_part):
            if not isinstance(outcome, Failed):
                labels = {"control": kinds, "state": range(outcome.shape[1]), "example": [examples[i].id for i in part]}
                frames.append(long_frame(outcome, **labels))
            elif len(part) == 1:
                missing.append(f"{examples[part[0]].id}: {outcome.reason}")
    return frames, missing
