"""The commands and their options. The libraries fill in the defaults that only they know."""

import argparse
from pathlib import Path

DEFAULT_OUT = "mechvlm-study"
VIEW_FILE = "view.html"

STUDY_HELP = """Run the study of Wei et al. 2024, "A Study on Multi-modal Interaction in Vision Large Language Models":
the words that visual tokens decode to, contextualization and norm-based attention by layer, and the phases of the
interaction between image and text. Without arguments it reads 200 generated scenes with both bundled models, in well
under a minute. It writes a folder with report.html, views/, figures/, data/, skipped.csv and run.json."""

EXIT_CODES = """exit codes:
  0    done, or the study in --out was finished before; examples may have been set aside (skipped.csv gives the reasons)
  1    the command cannot do what was asked; the message says what to change
  2    wrong usage
  3    stopped half-way, by a full disk for instance; the same command continues the study
  130  stopped by Ctrl-C; the same command continues the study
  143  stopped by SIGTERM; the same command continues the study
The same command also continues a study that was killed. Each worker then reads at most 32 examples, or one batch, again."""

VIEW_HELP = """Let the model answer a prompt about an image or several, and write the patch view, a page that works offline. It
shows what was looked at while each word of the answer was written and what each token of the prompt read, by layer and head,
and the words that each patch reads as."""

CHECK_HELP = """Derive a model's record from the model itself, hold it to what the model computes, and print both: where each
part of its decoder is, and by how much every identity is off. The exit code is 1 where one fails."""

MODEL_HELP = "a bundled name, a hub id or a folder"
DEVICE_HELP = "where the model runs: cpu, cuda, cuda:1, mps, or auto, the best that is there (default: cpu)"
DTYPE_HELP = (
    "dtype of the weights: float32, bfloat16, float16 (default: that of the checkpoint; float32 for bundled models)"
)
REMOTE_HELP = "read on NDIF, which holds the weights; it uses the API key that `nnsight login` stored"


def parser() -> argparse.ArgumentParser:
    """All commands and options. The libraries fill in the defaults that only they know."""
    top = argparse.ArgumentParser(prog="mechvlm", description="Look inside vision-language models.")
    top.add_argument("--version", action="store_true", help="show the version and exit")
    top.set_defaults(parser=top)
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    study = commands.add_parser(
        "study", help="run the four-phase study and write a report", description=STUDY_HELP, epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = study.add_argument
    add(
        "--model", action="append", metavar="NAME",
        help=f"{MODEL_HELP}; repeat the option for several models (default: all bundled models)",
    )  # fmt: skip
    add(
        "--dataset", default="scenes", metavar="NAME",
        help="scenes; folder:DIR with a captions.jsonl; coco:DIR; winoground or winoground:DIR; "
        "hf:NAME?image=COLUMN&caption=COLUMN&split=NAME (default: scenes)",
    )  # fmt: skip
    add("--prompt", metavar="TEXT", help='the prompt for every image (default: "Describe the scene.")')
    add(
        "--answers", action="store_true",
        help="also read each model's own answers, token by token: the image's share of what wrote them, the lens",
    )  # fmt: skip
    add("--n", type=int, metavar="N", help="how many examples to draw (default: 200 scenes; all of any other data set)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the draw and of the bootstraps (default: 0)")
    add_one_of = study.add_mutually_exclusive_group().add_argument
    add_one_of("--device", metavar="NAME", help=DEVICE_HELP)
    add_one_of(
        "--device-map", choices=("auto", "balanced", "sequential"),
        help="spread one large model over several GPUs; with --ray, over the GPUs of each worker",
    )  # fmt: skip
    add("--dtype", metavar="NAME", help=DTYPE_HELP)
    add("--remote", action="store_true", help=REMOTE_HELP)
    add(
        "--batch-size", type=int, default=16, metavar="N",
        help="how many examples to read in one forward; it changes only the last bits of results (default: 16)",
    )  # fmt: skip
    add(
        "--out", metavar="DIR",
        help="the study's folder: a new or empty one, or that of a study with the same settings, which then continues "
        f"where it stopped (default: the last unfinished {DEFAULT_OUT} with the same settings, otherwise the first free "
        f"name of {DEFAULT_OUT}, {DEFAULT_OUT}-2, ...)",
    )  # fmt: skip
    add(
        "--resume", action="store_true",
        help="continue the study in --out, and fail if there is none; without --out, the last unfinished "
        f"{DEFAULT_OUT}",
    )  # fmt: skip
    add(
        "--ray", metavar="auto|ADDRESS",
        help="read on the Ray cluster at this address. auto is the cluster of RAY_ADDRESS; without RAY_ADDRESS it starts "
        "one on this machine for this run. The nodes need the same packages, and models and images in folders that all "
        "of them can read. --out is written on this machine alone",
    )  # fmt: skip
    add("--workers", type=int, metavar="N", help="with --ray: how many workers; each holds the model")
    add(
        "--gpus-per-worker", type=float, metavar="G",
        help="with --ray: how many GPUs each worker gets, or which part of one (default: 1 with --device cuda or "
        "--device-map, otherwise 0)",
    )  # fmt: skip
    view = commands.add_parser("view", help="write the patch view of an image or several", description=VIEW_HELP)
    add = view.add_argument
    add("model", metavar="MODEL", help=MODEL_HELP)
    add("images", metavar="IMAGE", nargs="+", help="an image file; of several, the prompt is about all of them")
    add(
        "--prompt", metavar="TEXT",
        help='the prompt; the model\'s own template is put around it (default: "Describe the scene.")',
    )  # fmt: skip
    add_one_of = view.add_mutually_exclusive_group().add_argument
    add_one_of("--answer", metavar="TEXT", help="an answer to read in place of the model's own")
    add_one_of("--no-answer", action="store_true", help="read the prompt alone")
    add(
        "--k", type=int, default=5, choices=range(1, 11), metavar="N",
        help="how many words to show for each patch, 1 to 10 (default: 5)",
    )  # fmt: skip
    add("--device", metavar="NAME", help=DEVICE_HELP)
    add("--dtype", metavar="NAME", help=DTYPE_HELP)
    add("--remote", action="store_true", help=REMOTE_HELP)
    add(
        "--out", metavar="FILE",
        help="a new file; an existing one is never overwritten (default: the first free name of "
        f"{VIEW_FILE}, {Path(VIEW_FILE).stem}-2.html, ...)",
    )  # fmt: skip
    commands.add_parser(
        "models", help="list the bundled models and the supported classes",
        description="List the models that ship with the package, and the Hugging Face classes that it can read.",
    )  # fmt: skip
    check = commands.add_parser("check", help="say whether a model can be read", description=CHECK_HELP)
    check.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    check.add_argument("--device", metavar="NAME", help=DEVICE_HELP)
    check.add_argument("--dtype", metavar="NAME", help=DTYPE_HELP)
    for command in commands.choices.values():
        command.set_defaults(parser=command)  # whose usage is shown where its options are wrong
    return top
