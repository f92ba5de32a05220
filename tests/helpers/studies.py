"""Studies with known numbers, generated without a model."""

import numpy as np
import pandas as pd

from mechvlm.study.curves import phases_of
from mechvlm.study.running.settings import MEASURE_SETTINGS
from mechvlm.study.study import Study

PAIRS = ("inter", "image", "text")
PROMPT = "Describe the scene."


def made_study(models: dict[str, int], n: int = 12, seed: int = 0, n_image: int = 16, **about) -> Study:
    """A study of `models` {name: n_layers} on n examples; its curves rise, fall, rise and fall."""
    rng = np.random.default_rng(seed)
    tables: dict[str, list] = {
        "contextualization": [],
        "baseline": [],
        "lens": [],
        "norm_attention": [],
        "attention_share": [],
    }
    ids = [f"e{i:03}" for i in range(n)]
    for shift, (model, n_layers) in enumerate(models.items()):
        layers = np.arange(n_layers + 1)
        depth = layers / n_layers
        turns = np.interp(depth, [0, 0.15, 0.4, 0.8, 1], [0, 0.25, 0.1, 0.4, 0.2]) + 0.03 * shift
        for level, pair in zip((0.0, 0.3, 0.4), PAIRS, strict=True):
            for name in ids:
                values = turns + level + rng.normal(0, 0.04) + rng.normal(0, 0.01, n_layers + 1)
                tables["contextualization"].append(
                    pd.DataFrame({"model": model, "example": name, "pair": pair, "state": layers, "value": values})
                )
            base = 0.3 * (turns + level)
            tables["baseline"].append(pd.DataFrame({"model": model, "pair": pair, "state": layers, "value": base}))
        for tokens, captions, height in (("image", "own", 0.7), ("image", "other", 0.2), ("text", "own", 0.3)):
            for measure in ("precision", "recall"):
                for name in ids:
                    values = np.clip(height * np.sqrt(depth) + rng.normal(0, 0.1, n_layers + 1), 0, 1)
                    keys = {"model": model, "example": name, "tokens": tokens, "captions": captions, "measure": measure}
                    tables["lens"].append(pd.DataFrame({**keys, "state": layers, "value": values}))
        for tokens, height in (("image", 0.6), ("text", 0.9)):
            for name in ids:
                values = np.clip(height + rng.normal(0, 0.05, n_layers + 1), 0, 1)
                keys = {"model": model, "example": name, "tokens": tokens, "captions": "own", "measure": "word_share"}
                tables["lens"].append(pd.DataFrame({**keys, "state": layers, "value": values}))
        pieces = ["<s>", *["<image>"] * n_image, " Desc", "ribe", " the", " scene", "."]
        modality = ["special", *["image"] * n_image, *["text"] * 5]
        for dest, position in (("last_text", len(pieces) - 1), ("last_image", n_image)):
            for layer in range(n_layers):
                weight = rng.random(position + 1)
                norm = {"norm": 3 * rng.random(position + 1), "weight": weight / weight.sum()}
                source = {"src": range(position + 1), "piece": pieces[: position + 1]}
                keys = {"model": model, "dest": dest, "dest_position": position, "layer": layer, "n": n}
                rows = pd.DataFrame({**source, **norm, "modality": modality[: position + 1]}).assign(**keys)
                tables["norm_attention"].append(rows)
            for measure in ("norm", "weight"):
                for name in ids:
                    values = np.clip(0.5 + rng.normal(0, 0.1, n_layers), 0, 1)
                    keys = {"model": model, "example": name, "dest": dest, "measure": measure}
                    tables["attention_share"].append(pd.DataFrame({**keys, "layer": range(n_layers), "value": values}))
    whole = {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}
    return Study(
        tables=whole,
        phases={model: phases_of(whole["contextualization"], model, seed) for model in models},
        skipped=pd.DataFrame([], columns=["model", "example", "reason"]),
        settings={"models": list(models), "prompt": PROMPT, "seed": seed, "measures": MEASURE_SETTINGS}
        | about.pop("settings", {}),
        models={
            model: {"n_layers": n_layers, "n_examples": n, "dtype": "float32", "seconds": 1.0}
            for model, n_layers in models.items()
        },
        dataset={"name": "made", "n": n, "fingerprint": f"made {n} {seed}"} | about.pop("dataset", {}),
        gallery=[],
        views={},
        seconds=1.0,
        **about,
    )
