"""The command `mechvlm`. Heavy libraries are imported only by the commands that need them.

So `mechvlm --help` does not wait for torch.
"""

import argparse
import itertools
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
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

VIEW_HELP = """Write the patch view of one image and prompt, a page that works offline. It shows what each token of the prompt
reads from each patch, by layer and head, and the words that each patch decodes to."""

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
    view = commands.add_parser("view", help="write the patch view of one image", description=VIEW_HELP)
    add = view.add_argument
    add("model", metavar="MODEL", help=MODEL_HELP)
    add("image", metavar="IMAGE", help="an image file")
    add("--prompt", required=True, metavar="TEXT", help="the prompt; the model's own template is put around it")
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
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0 done, 1 impossible as asked, 2 wrong usage, 3 stopped half-way (the same command continues),
    130 stopped by Ctrl-C, 143 stopped by SIGTERM.

    Args:
        argv: the arguments; by default those of the process.
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
        _print_stderr("Stopped.")
        return 130
    except BrokenPipeError:
        # The reader of the output (head, less) has ended, so nobody would see a message.
        sys.stderr.close()
        return 1
    except Exception as error:
        message = _user_message(error)
        if message is None:
            raise
        _print_stderr(f"Error: {message}")
        return 3 if type(error).__name__ == "StoppedError" else 1


def _check_usage(arguments: argparse.Namespace) -> None:
    if arguments.ray is None and (arguments.workers is not None or arguments.gpus_per_worker is not None):
        parser().error("--workers and --gpus-per-worker need a Ray cluster: give --ray auto or its address too")
    if arguments.ray is not None and arguments.workers is None:
        parser().error("--ray needs the number of workers: give --workers N")


def _user_message(error: Exception) -> str | None:
    """The message of an error that the user can do something about; None for a bug."""
    from mechvlm.errors import InputError, ModelError, NonFiniteError, RemoteError, StoppedError, ViewError

    if isinstance(error, InputError | ModelError | NonFiniteError | RemoteError | StoppedError | ViewError):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":
        return "The device has not enough memory. Try --dtype bfloat16, --device cpu, or for a study a smaller --batch-size."
    return None


def _print_stderr(message: str) -> None:
    # Not with rich, which would read brackets in paths and tokens as markup, and wrap long lines.
    print(message, file=sys.stderr)


def _study(arguments: argparse.Namespace) -> int:
    from mechvlm.progress import StudyBar

    out = arguments.out
    with _StopSignals() as stop:
        try:
            with StudyBar() as bar:
                # Importing torch and nnsight takes half of a short run. The bar shows before that.
                _quiet_libraries()
                from mechvlm import bundled
                from mechvlm.experiments.winoground import PROMPT
                from mechvlm.study import run
                from mechvlm.study.report.terminal import print_summary

                prompt = PROMPT if arguments.prompt is None else arguments.prompt
                out = _study_folder(arguments, prompt)
                was_finished = (Path(out) / "run.json").is_file()

                def progress(stage: str, done: int, total: int) -> None:
                    stop.check()
                    bar.show(stage, done, total)

                study = run(
                    arguments.model or bundled.NAMES, arguments.dataset, n=arguments.n, seed=arguments.seed,
                    prompt=prompt, device=arguments.device,
                    dtype=arguments.dtype, device_map=arguments.device_map, remote=arguments.remote,
                    batch_size=arguments.batch_size, out=out, progress=progress, ray=arguments.ray,
                    workers=arguments.workers, gpus_per_worker=arguments.gpus_per_worker,
                )  # fmt: skip
                bar.finish()
        except BaseException as error:
            # A library may have turned the interrupt into an error of its own, so ask `stop` too.
            if not stop.signal and not isinstance(error, KeyboardInterrupt):
                raise
            _print_stderr("Stopped." + _how_to_go_on(arguments, out))
            return 128 + (stop.signal or signal.SIGINT)
    if was_finished:
        print(f"The study in {out} was finished before: nothing is read again.")
    print_summary(study)
    return 0


class _StopSignals:
    """Makes Ctrl-C and SIGTERM, which schedulers send, stop a study in the same way.

    Both raise KeyboardInterrupt at once. Where a library swallows it, `check` raises it again
    before the next batch.
    """

    def __enter__(self) -> "_StopSignals":
        self.signal = 0  # the number of the signal that came
        # Python allows signal handlers only in the main thread.
        in_main = threading.current_thread() is threading.main_thread()
        signals = (signal.SIGINT, signal.SIGTERM) if in_main else ()
        self.handlers_before = {number: signal.signal(number, self._stop) for number in signals}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame) -> None:
        self.signal = number
        raise KeyboardInterrupt

    def check(self) -> None:
        if self.signal:
            raise KeyboardInterrupt


def _study_folder(arguments: argparse.Namespace, prompt: str) -> str:
    """The folder of the study.

    This is the folder that was named; otherwise the last unfinished folder of the default name with
    the same settings; otherwise, without --resume, a new folder.
    """
    from mechvlm import bundled
    from mechvlm.errors import InputError
    from mechvlm.study.running.settings import was_begun_with

    if arguments.out:
        if arguments.resume and not (Path(arguments.out) / "settings.json").is_file():
            raise InputError(f"{arguments.out} holds no study to go on with. Leave out --resume to begin one there.")
        return arguments.out
    unfinished = [p for p in Path().glob(f"{DEFAULT_OUT}*/settings.json") if not p.with_name("run.json").exists()]
    unfinished.sort(key=lambda file: file.stat().st_mtime)
    settings = {
        "models": list(arguments.model or bundled.NAMES), "prompt": prompt, "seed": arguments.seed,
        "dtype": arguments.dtype, "batch_size": arguments.batch_size,
    }  # fmt: skip
    same = [file for file in unfinished if was_begun_with(file.parent, arguments.dataset, arguments.n, settings)]
    # With --resume and other settings it is the last unfinished folder: `run` then names the
    # settings that differ.
    if same or (arguments.resume and unfinished):
        return str((same or unfinished)[-1].parent)
    if arguments.resume:
        raise InputError(f"There is no unfinished {DEFAULT_OUT} here to go on with. Name its folder with --out.")
    out = _free_name(DEFAULT_OUT)
    if unfinished:
        others = ", ".join(str(file.parent) for file in unfinished)
        _print_stderr(f"Unfinished studies with other settings are here: {others}. This study goes to {out}.")
    return out


def _how_to_go_on(arguments: argparse.Namespace, out: str | None) -> str:
    """The command that continues a stopped study; empty for a study that has not begun."""
    if out is None or not (Path(out) / "settings.json").is_file():
        return ""
    typed = [word for word in arguments.typed if word != "--resume"]
    out_option = [] if arguments.out else ["--out", out]
    return f" What is done stays in {out}. Go on with:\n  {shlex.join(['mechvlm', *typed, *out_option])}"


def _view(arguments: argparse.Namespace) -> int:
    from mechvlm.progress import STDERR

    out = Path(arguments.out or _free_name(VIEW_FILE))
    with STDERR.status("starting") as status:
        # Loading the model can take minutes, so check everything else before it.
        _check_new_file(out)
        _quiet_libraries()
        from mechvlm.errors import InputError
        from mechvlm.explore import destinations, patch_view
        from mechvlm.inputs.images import open_image
        from mechvlm.ndif.connection import retrying
        from mechvlm.vlm.devices import device_of, dtype_of
        from mechvlm.vlm.loading import load

        image = open_image(arguments.image)
        if arguments.device is not None:
            device_of(arguments.device)
        dtype_of(arguments.dtype, "auto")
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
        print(f"The last {len(dest)} of {n_text} text tokens can be picked; with all, the page would be too large.")
    print(f"{out.stat().st_size / 1e6:.1f} MB. Open {out}")
    return 0


def _check_new_file(out: Path) -> None:
    """Raise InputError unless a new file can be written to `out`. Nothing stays there."""
    from mechvlm.errors import InputError

    if out.exists():
        problem = "a folder" if out.is_dir() else "there already, and is not written over"
        raise InputError(f"{out} is {problem}. Give another --out, a file.")
    if not out.parent.is_dir():
        raise InputError(f"The folder {out.parent} is not there. Make it first, or give another --out.")
    try:
        out.touch()
        out.unlink()
    except OSError as error:
        raise InputError(f"Nothing can be written to {out} ({error.strerror}). Give another --out.") from error


def _free_name(name: str) -> str:
    """The first of NAME, NAME-2, NAME-3, ... that does not exist, or is an empty folder."""
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
    """Silence the bars of libraries, and their warnings on things that are handled here.

    They would tear the command's own bars.
    """
    import logging
    import os
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", message=".*requires torchvision.*")
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    # It warns of every retry; if all of them fail, the error says so.
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
