"""The command `study`, which can be stopped and continued."""

import argparse
import shlex
import signal
import threading
from pathlib import Path

from mechvlm.cli.console import free_name, importing, print_stderr, quiet_libraries, say
from mechvlm.cli.options import DEFAULT_OUT


def run_study(arguments: argparse.Namespace) -> int:
    """Run a study and print its summary."""
    from mechvlm.progress import StudyBar

    out = arguments.out
    with _StopSignals() as stop:
        try:
            with StudyBar() as bar:
                # Importing torch and nnsight takes half of a short run. The bar shows before that.
                with importing():
                    quiet_libraries()
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
                    answers=arguments.answers,
                )  # fmt: skip
                bar.finish()
        except BaseException as error:
            # A library may have turned the interrupt into an error of its own, so ask `stop` too.
            if not stop.signal and not isinstance(error, KeyboardInterrupt):
                raise
            print_stderr("Stopped." + _how_to_go_on(arguments, out))
            return 128 + (stop.signal or signal.SIGINT)
    if was_finished:
        say(f"The study in {out} was finished before: nothing is read again.")
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
    from mechvlm.study.running.answer_rows import ANSWER_SETTINGS
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
        "answers": ANSWER_SETTINGS if arguments.answers else None,
    }  # fmt: skip
    same = [file for file in unfinished if was_begun_with(file.parent, arguments.dataset, arguments.n, settings)]
    # With --resume and other settings it is the last unfinished folder: `run` then names the
    # settings that differ.
    if same or (arguments.resume and unfinished):
        return str((same or unfinished)[-1].parent)
    if arguments.resume:
        raise InputError(f"There is no unfinished {DEFAULT_OUT} here to go on with. Name its folder with --out.")
    out = free_name(DEFAULT_OUT)
    if unfinished:
        others = ", ".join(str(file.parent) for file in unfinished)
        print_stderr(f"Unfinished studies with other settings are here: {others}. This study goes to {out}.")
    return out


def _how_to_go_on(arguments: argparse.Namespace, out: str | None) -> str:
    """The command that continues a stopped study; empty for a study that has not begun."""
    if out is None or not (Path(out) / "settings.json").is_file():
        return ""
    typed = [word for word in arguments.typed if word != "--resume"]
    out_option = [] if arguments.out else ["--out", out]
    return f" What is done stays in {out}. Go on with:\n  {shlex.join(['mechvlm', *typed, *out_option])}"
