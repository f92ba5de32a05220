"""Winoground's pairs in a study: their results from its tables, for the report and the terminal."""

import pandas as pd
import torch

from mechvlm.experiments.winoground_result import CAPTION_CONDITIONS, PAIR_MEASURES, WinogroundResult
from mechvlm.study.record import StudyRecord


def pair_results(study: StudyRecord) -> dict[str, WinogroundResult]:
    """The result of `mechvlm.winoground` for each model that could read a pair."""
    if "pairs" not in study.tables:
        return {}
    tables = study.tables["pair_scores"], study.tables["pairs"]
    results = {}
    for model, about in study.models.items():
        scores, rows = (table[table["model"] == model] for table in tables)
        if scores.empty:
            continue
        place = {pair: i for i, pair in enumerate(scores["pair"])}
        image = torch.tensor(rows["image"].to_numpy())
        index = (
            torch.tensor([PAIR_MEASURES.index(measure) for measure in rows["measure"]]),
            torch.tensor(rows["layer"].to_numpy()),
            torch.tensor([place[pair] for pair in rows["pair"]]),
            # Caption i is true of image i.
            torch.where(torch.tensor((rows["condition"] == CAPTION_CONDITIONS[0]).to_numpy()), image, 1 - image),
            image,
        )
        shape = len(PAIR_MEASURES), about["n_layers"] + 1, len(place), 2, 2
        values = torch.full(shape, torch.nan, dtype=torch.float32)
        values[index] = torch.tensor(rows["value"].to_numpy(dtype="float32"))
        aside = tuple((pair["pair"], pair["reason"]) for pair in about["pairs_set_aside"])
        results[model] = WinogroundResult(values, tuple(place), aside, study.settings["prompt"], model)
    return results


def pair_summary(study: StudyRecord) -> pd.DataFrame:
    """Three rows per model, one for each score: model, score, percent, low, high, chance, n.

    `score` is "text", "image" or "group"; `percent` of the `n` pairs are right, where guessing gets
    `chance` percent right. `low` and `high` are the ends of the 95 % bootstrap interval of
    `percent` over pairs, with the study's seed.
    """
    seed = study.settings["seed"]
    parts = [result.scores.to_frame(seed).assign(model=model) for model, result in pair_results(study).items()]
    columns = ["model", "score", "percent", "low", "high", "chance", "n"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def pair_lines(study: StudyRecord) -> list[str]:
    """The scores as lines for the terminal, one per model that could read a pair."""
    lines = []
    for model, rows in pair_summary(study).groupby("model", sort=False):
        scores = ", ".join(
            f"{row.score} {row.percent:.1f} %{percent_interval(row.low, row.high)}" for row in rows.itertuples()
        )
        chance = ", ".join(f"{value:.1f}" for value in rows["chance"])
        lines.append(f"Winoground's scores, {model}: {scores}; n = {rows['n'].iloc[0]} pairs, chance {chance} %")
    return lines


def percent_interval(low: float, high: float) -> str:
    """The ends of an interval in brackets; empty for NaN."""
    return "" if pd.isna(low) else f" [{low:.1f}, {high:.1f}]"


def pair_counts(study: StudyRecord) -> str:
    """A sentence on pairs: read and set aside by each model, and left out with one side only."""
    results, data = pair_results(study), study.dataset
    models = ", ".join(
        f"{model} n = {len(results[model].pairs) if model in results else 0:,} ({len(about['pairs_set_aside']):,} set aside)"
        for model, about in study.models.items()
    )
    half = ""
    if data["half_pairs"]:
        half = f" Left out: {data['half_pairs']:,} of which only one side is among the examples."
    return (
        f"Pairs: {models}; of {data['pairs']:,} with both sides among the examples drawn from {data['name']} with seed "
        f"{study.settings['seed']}.{half}"
    )


def pair_section(study: StudyRecord) -> dict | None:
    """The rows and the sentence of the report's section; None for a data set without pairs."""
    if "half_pairs" not in study.dataset:
        return None
    if not study.dataset["pairs"]:
        return {
            "rows": [],
            "counts": "From every pair only one side was drawn, so no pair could be measured. Draw more examples.",
        }
    seed, rows = study.settings["seed"], []
    scores = pair_summary(study)
    likelihood = PAIR_MEASURES.index("log-likelihood")
    for model, result in pair_results(study).items():
        mean, low, high = (values[likelihood, -1].item() for values in result.difference_by(seed))
        rows.append(
            {
                "model": model, "n": len(result.pairs), "scores": scores[scores["model"] == model].to_dict("records"),
                "likelihood": f"{mean:+.2f}", "interval": "" if pd.isna(low) else f"{low:+.2f} to {high:+.2f}",
            }
        )  # fmt: skip
    return {"rows": rows, "counts": pair_counts(study)}
