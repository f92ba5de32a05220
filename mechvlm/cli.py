"""The command `mechvlm`. Nothing heavy is imported before a command needs it: --help takes no torch."""

import argparse
import itertools
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

OUT = "mechvlm-study"
VIEW_FILE = "view.html"

STUDY = """Run the study of Wei et al. 2024, "A Study on Multi-modal Interaction in Vision Large Language Models":
the words that visual tokens decode to, contextualization and norm-based attention by layer, and the phases of their
interaction. With no arguments: both bundled models on 200 generated scenes, in well under a minute. Writes a folder with
report.html, views/, figures/, data/, skipped.csv and run.json."""

EXIT_CODES = """exit codes:
  0    done, also where examples were set aside (skipped.csv says why), or the study in --out was finished already
  1    it cannot be done with what was given: the message says what to change
  2    usage
  3    stopped half-way, on a full disk for instance; the same command goes on
  130  stopped by Ctrl-C, 143 by SIGTERM; the same command goes on
A study that was killed goes on in the same way; at most 32 examples, or one batch, are read again by each worker."""

VIEW = """Write the patch view of one image and prompt, a page that works offline: what each token of the prompt reads from
each patch, by layer and head, and the words that each patch reads as."""


def parser() -> argparse.ArgumentParser:
    """All commands and options. Defaults that only a library knows are filled in by it."""
    top = argparse.ArgumentParser(prog="mechvlm", description="Look inside vision-language models.")
    top.add_argument("--version", action="store_true", help="show the version and stop")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    study = commands.add_parser(
        "study", help="run the four-phase study and write a report", description=STUDY, epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = study.add_argument
    add(
        "--model", action="append", metavar="NAME",
        help="a bundled name, a hub id or a folder; repeat it for several (default: all bundled)",
    )  # fmt: skip
    add(
        "--dataset",
        default="scenes",
        metavar="NAME",
        help="scenes; folder:DIR with a captions.jsonl; coco:DIR; winoground or winoground:DIR; "
        "hf:NAME?image=COLUMN&caption=COLUMN&split=NAME (default: scenes)",
    )
    add("--prompt", metavar="TEXT", help='asked of every image (default: "Describe the scene.")')
    add("--n", type=int, metavar="N", help="examples to draw (default: 200 scenes; all of any other data set)")
    add("--seed", type=int, default=0, metavar="N", help="of the draw and of the bootstraps (default: 0)")
    one_of = study.add_mutually_exclusive_group().add_argument
    one_of("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: cpu)")
    one_of(
        "--device-map", choices=("auto", "balanced", "sequential"),
        help="spread one large model over several GPUs (with --ray, of each worker)",
    )  # fmt: skip
    add("--dtype", metavar="NAME", help="float32, bfloat16, float16 (default: the checkpoint's; float32 if bundled)")
    add(
        "--remote",
        action="store_true",
        help="read on NDIF, which holds the weights; the API key is that of `nnsight login`",
    )
    add(
        "--batch-size", type=int, default=16, metavar="N",
        help="examples a forward; changes no more of a result than its last bits (default: 16)",
    )  # fmt: skip
    add(
        "--out", metavar="DIR",
        help="a new or empty folder, or that of a study with the same settings, which then goes on where it stopped "
        f"(default: the last unfinished {OUT} of these settings, or else {OUT}, {OUT}-2, ...)",
    )  # fmt: skip
    add(
        "--resume", action="store_true",
        help=f"go on with the study in --out, which must be there; without --out with the last unfinished {OUT}",
    )  # fmt: skip
    add(
        "--ray", metavar="auto|ADDRESS",
        help="read on a Ray cluster: auto is that of RAY_ADDRESS, or without it one on this machine for this run. Its nodes need "
        "the same packages, and models and images in folders that all of them see; --out is written here alone",
    )  # fmt: skip
    add("--workers", type=int, metavar="N", help="with --ray: how many; each one holds the model")
    add(
        "--gpus-per-worker", type=float, metavar="G",
        help="with --ray: GPUs of each worker, or a part of one (default: 1 with --device cuda or --device-map, otherwise 0)",
    )  # fmt: skip
    view = commands.add_parser("view", help="write one image's patch view, a page to explore", description=VIEW)
    add = view.add_argument
    add("model", metavar="MODEL", help="a bundled name, a hub id or a folder")
    add("image", metavar="IMAGE", help="an image file")
    add("--prompt", required=True, metavar="TEXT", help="asked of the image; the family's template is put around it")
    add("--k", type=int, default=5, choices=range(1, 11), metavar="N", help="words a patch, 1 to 10 (default: 5)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: cpu)")
    add("--dtype", metavar="NAME", help="float32, bfloat16, float16 (default: the checkpoint's; float32 if bundled)")
    add(
        "--remote",
        action="store_true",
        help="read on NDIF, which holds the weights; the API key is that of `nnsight login`",
    )
    add(
        "--out", metavar="FILE",
        help=f"a file that is not there yet (default: {VIEW_FILE}, or {Path(VIEW_FILE).stem}-2.html, ... where that exists)",
    )  # fmt: skip
    commands.add_parser(
        "models", help="list the bundled models and the known classes",
        description="List the models that ship with the package, and the Hugging Face classes that it can read.",
    )  # fmt: skip
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code.

    0, 1 for what cannot be used or done, 2 for usage, 3 for what stopped half-way and can be gone on with, 130 for Ctrl-C, 143
    for SIGTERM.
    """
    typed = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(typed)
    arguments.typed = typed
    if arguments.command == "study":
        _check_usage(arguments)
    if arguments.version:
        print(f"mechvlm {_version()}")
        return 0
    if arguments.command is None:
        parser().print_help()
        return 2
    commands: dict[str, Callable[[argparse.Namespace], int]] = {"study": _study, "view": _view, "models": _models}
    try:
        return commands[arguments.command](arguments)
    except KeyboardInterrupt:
        _say("Stopped.")
        return 130
    except BrokenPipeError:
        # The reader (head, less) has gone: nothing to say, and nobody to say it to.
        sys.stderr.close()
        return 1
    except Exception as error:
        if not _expected(error):
            raise
        _say(f"Error: {error}")
        return 3 if type(error).__name__ == "StoppedError" else 1


def _check_usage(arguments: argparse.Namespace) -> None:
    if arguments.ray is None and (arguments.workers is not None or arguments.gpus_per_worker is not None):
        parser().error("--workers and --gpus-per-worker are those of a Ray cluster: give --ray auto or its address too")
    if arguments.ray is not None and arguments.workers is None:
        parser().error("--ray needs to know how many: give --workers N")


def _expected(error: Exception) -> bool:
    """Whether an error is about what the user gave or the machine lacks, so that its message says all."""
    from mechvlm.errors import InputError, ModelError, NonFiniteError, RemoteError, StoppedError, ViewError

    if isinstance(error, InputError | ModelError | NonFiniteError | RemoteError | StoppedError | ViewError):
        return True
    if type(error).__name__ == "OutOfMemoryError":
        error.args = (
            "The device has not enough memory. Try --dtype bfloat16, --device cpu, or of a study a smaller --batch-size.",
        )
        return True
    return False


def _say(message: str) -> None:
    # Plain, not rich: a path or a token in brackets must not be taken for markup, nor a long one be wrapped.
    print(message, file=sys.stderr)


def _study(arguments: argparse.Namespace) -> int:
    from mechvlm.progress import StudyBar

    out = arguments.out
    with _Stop() as stop:
        try:
            with StudyBar() as bar:
                # Importing torch and nnsight is half of a short run: the bar is there before.
                _quiet_libraries()
                from mechvlm import bundled
                from mechvlm.study import run
                from mechvlm.study.report.terminal import show
                from mechvlm.study.running.runner import PROMPT

                out = _out_of(arguments, PROMPT)
                finished = (Path(out) / "run.json").is_file()

                def progress(stage: str, done: int, total: int) -> None:
                    stop.check()
                    bar.show(stage, done, total)

                study = run(
                    arguments.model or bundled.NAMES,
                    arguments.dataset,
                    prompt=PROMPT if arguments.prompt is None else arguments.prompt,
                    n=arguments.n,
                    seed=arguments.seed,
                    device=arguments.device,
                    dtype=arguments.dtype,
                    device_map=arguments.device_map,
                    remote=arguments.remote,
                    batch_size=arguments.batch_size,
                    out=out,
                    progress=progress,
                    ray=arguments.ray,
                    workers=arguments.workers,
                    gpus_per_worker=arguments.gpus_per_worker,
                )
                bar.finish()
        except BaseException as error:
            if not stop.signal and not isinstance(error, KeyboardInterrupt):
                raise
            # Whatever a library made of it on its way here.
            _say("Stopped." + _how_to_go_on(arguments, out))
            return 128 + (stop.signal or signal.SIGINT)
    if finished:
        print(f"The study in {out} was finished before: nothing is read again.")
    show(study)
    return 0


class _Stop:
    """SIGTERM, which schedulers send, and Ctrl-C stop a study in the same way: at once, or where something swallowed the
    interrupt, before the next batch."""

    def __enter__(self) -> "_Stop":
        self.signal = 0
        # Elsewhere than in the main thread Python allows no handlers.
        main = threading.current_thread() is threading.main_thread()
        self.before = {one: signal.signal(one, self._stop) for one in (signal.SIGINT, signal.SIGTERM)} if main else {}
        return self

    def __exit__(self, *_) -> None:
        for one, handler in self.before.items():
            signal.signal(one, handler)

    def _stop(self, number: int, frame) -> None:
        self.signal = number
        raise KeyboardInterrupt

    def check(self) -> None:
        if self.signal:
            raise KeyboardInterrupt


def _out_of(arguments: argparse.Namespace, prompt: str) -> str:
    """The study's folder: the one that was named, else the last unfinished one of the default name that was asked the same, else
    a new one. With --resume, one that is there."""
    from mechvlm import bundled
    from mechvlm.errors import InputError
    from mechvlm.study.running.settings import begun_alike

    if arguments.out:
        if arguments.resume and not (Path(arguments.out) / "settings.json").is_file():
            raise InputError(f"{arguments.out} holds no study to go on with. Leave out --resume to begin one there.")
        return arguments.out
    begun = [p for p in Path().glob(f"{OUT}*/settings.json") if not p.with_name("run.json").exists()]
    begun.sort(key=lambda file: file.stat().st_mtime)
    asked = {
        "models": list(arguments.model or bundled.NAMES), "prompt": arguments.prompt or prompt, "seed": arguments.seed,
        "dtype": arguments.dtype, "batch_size": arguments.batch_size,
    }  # fmt: skip
    same = [file for file in begun if begun_alike(file.parent, arguments.dataset, arguments.n, asked)]
    if same or (arguments.resume and begun):
        return str((same or begun)[-1].parent)
    if arguments.resume:
        raise InputError(f"There is no unfinished {OUT} here to go on with. Name its folder with --out.")
    out = _free(OUT)
    if begun:
        others = ", ".join(str(file.parent) for file in begun)
        _say(f"Not finished here, and of other settings: {others}. This study goes to {out}.")
    return out


def _how_to_go_on(arguments: argparse.Namespace, out: str | None) -> str:
    """What to type to go on with a study that stopped; empty where it had not begun."""
    if out is None or not (Path(out) / "settings.json").is_file():
        return ""
    typed = [one for one in arguments.typed if one != "--resume"]
    where = [] if arguments.out else ["--out", out]
    return f" What is done stays in {out}. Go on with:\n  {shlex.join(['mechvlm', *typed, *where])}"


def _view(arguments: argparse.Namespace) -> int:
    from mechvlm.progress import STDERR

    out = Path(arguments.out or _free(VIEW_FILE))
    with STDERR.status("starting") as status:
        # What is wrong is said before the model is loaded, which can take minutes.
        _check_file(out)
        _quiet_libraries()
        from mechvlm.errors import InputError
        from mechvlm.explore import destinations, patch_view
        from mechvlm.inputs.images import open_image
        from mechvlm.ndif.connection import retrying
        from mechvlm.vlm.loading import check_device, load

        image = open_image(arguments.image)
        check_device(arguments.device)
        status.update("loading the model")
        vlm = load(arguments.model, device=arguments.device, dtype=arguments.dtype, remote=arguments.remote)
        status.update("reading the image")
        inputs = vlm.inputs(image, arguments.prompt)
        dest = destinations(vlm, inputs.tokens)
        view = retrying(lambda: patch_view(vlm, inputs, dest, arguments.k))
        try:
            view.save(out)
        except OSError as error:
            raise InputError(f"The view cannot be written to {out} ({error}). Give another --out.") from error
    n_text = int((inputs.tokens.text > inputs.tokens.image[0]).sum())
    if len(dest) < n_text:
        print(
            f"The last {len(dest)} of {n_text} text tokens can be picked; the page would be too large with all of them."
        )
    print(f"{out.stat().st_size / 1e6:.1f} MB. Open {out}")
    return 0


def _check_file(out: Path) -> None:
    """A new file can be written there. Nothing of the trial stays."""
    from mechvlm.errors import InputError

    if out.exists():
        what = "a folder" if out.is_dir() else "there already, and is not written over"
        raise InputError(f"{out} is {what}. Give another --out, a file.")
    if not out.parent.is_dir():
        raise InputError(f"The folder {out.parent} is not there. Make it first, or give another --out.")
    try:
        out.touch()
        out.unlink()
    except OSError as error:
        raise InputError(f"Nothing can be written to {out} ({error.strerror}). Give another --out.") from error


def _free(name: str) -> str:
    """The name, or with a number after it: nothing is written over something else."""
    first = Path(name)
    names = itertools.chain([name], (f"{first.stem}-{i}{first.suffix}" for i in itertools.count(2)))
    return next(n for n in names if not Path(n).exists() or (Path(n).is_dir() and not any(Path(n).iterdir())))


def _models(arguments: argparse.Namespace) -> int:
    from mechvlm import bundled
    from mechvlm.families.known import ARCHITECTURES

    print("Bundled models:")
    for name in bundled.NAMES:
        size = sum(f.stat().st_size for f in bundled.path(name).rglob("*") if f.is_file()) / 1e6
        print(f"  {name:<20} {f'{size:.1f} MB' if size else 'not in this installation'}")
    print("Hugging Face classes that can be read (hub ids and folders):")
    for hf_class in ARCHITECTURES:
        print(f"  {hf_class}")
    return 0


def _quiet_libraries() -> None:
    """Progress is ours; a library's warnings on what is handled here would tear the bars."""
    import logging
    import os
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", message=".*requires torchvision.*")
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    # Its retries; what came of them is in the error.
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _version() -> str:
    try:
        return version("mechvlm")
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
