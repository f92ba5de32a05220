"""The command `view`."""

import argparse
import sys
from pathlib import Path

from mechvlm.cli.console import check_new_file, free_name, importing, quiet_libraries, say
from mechvlm.cli.options import VIEW_FILE


def write_view(arguments: argparse.Namespace) -> int:
    """Write the page of one prompt and its images."""
    from mechvlm.progress import STDERR

    out = Path(arguments.out or free_name(VIEW_FILE))
    with STDERR.status("starting") as status:
        # Loading the model can take minutes, so check everything else before it.
        check_new_file(out)
        with importing():
            quiet_libraries()
            from mechvlm.errors import InputError
            from mechvlm.experiments.winoground import PROMPT
            from mechvlm.explore import destinations, patch_view, with_answer
            from mechvlm.inputs.images import open_image
            from mechvlm.ndif.connection import retrying
            from mechvlm.view.pooling import readable
            from mechvlm.vlm.devices import device_of, dtype_of
            from mechvlm.vlm.loading import load

        if Path(arguments.model).is_file():
            raise InputError(
                f"{arguments.model} is a file, and no model. The model comes first: mechvlm view MODEL IMAGE."
            )
        images = [open_image(image) for image in arguments.images]
        prompt = PROMPT if arguments.prompt is None else arguments.prompt
        if arguments.answer is not None and not arguments.answer.strip():
            raise InputError("--answer is empty. Give the words to read, or leave it out for the model's own.")
        if arguments.device is not None:
            device_of(arguments.device)
        dtype_of(arguments.dtype, "auto")
        status.update("loading the model")
        vlm = load(arguments.model, device=arguments.device, dtype=arguments.dtype, remote=arguments.remote)
        inputs = vlm.inputs([images], prompt)
        if not arguments.no_answer:
            status.update("writing the answer")
            inputs = retrying(lambda: with_answer(vlm, inputs, arguments.answer))
        status.update("reading the image")
        tokens = inputs.tokens
        dest = destinations(vlm, tokens)
        view = retrying(lambda: patch_view(vlm, inputs, dest, arguments.k))
        try:
            view.save(out)
        except OSError as error:
            raise InputError(f"The view cannot be written to {out} ({error}). Give another --out.") from error
    if arguments.prompt is None:
        say(f"Asked: {prompt} (--prompt asks something else)")
    if tokens.n_answer:
        say(f"Answer: {readable(''.join(tokens.spelled[p] for p in tokens.answer.tolist()).strip())}")
    elif not arguments.no_answer:
        say("Answer: none. The model ended it at once, and the page shows the prompt alone.")
    every = len(destinations(vlm, tokens, sys.maxsize))
    if len(dest) < every:
        which = ", the answer's before the prompt's" if tokens.n_answer else ", the prompt's last"
        say(f"{len(dest)} of {every} tokens can be picked{which}; with all, the page would be too large.")
    say(f"{out.stat().st_size / 1e6:.1f} MB. Open {out}")
    return 0
