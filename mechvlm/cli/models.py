"""The commands `models` and `check`: what can be read, and whether one model can."""

import argparse

from mechvlm.cli.console import importing, quiet_libraries, say, say_lines


def list_models(arguments: argparse.Namespace) -> int:
    """Print the bundled models, and the families with what works on each."""
    from mechvlm import bundled
    from mechvlm.families.table import load_table, row_text

    say("Bundled models:")
    for name in bundled.ALL:
        size = sum(f.stat().st_size for f in bundled.shipped(name).rglob("*") if f.is_file()) / 1e6
        decoder = " and SmolLM2-135M, which is installed apart" if name in bundled.WITH_SMOLLM2 else ""
        say(f"  {name:<20} {f'{size:.1f} MB{decoder}' if size else 'not in this installation'}")
    say_lines(
        "Families of vision-language models, with their Hugging Face class and language model, as tried on tiny models.\n"
        "Any other class is read if its parts can be derived: mechvlm check MODEL.",
        indent=0,
    )
    for name, row in load_table().items():
        say_lines(f"  {row_text(name, row)}")
    return 0


def check_model(arguments: argparse.Namespace) -> int:
    """Derive a model's record anew, print it, and how each of its claims came out."""
    with importing():
        quiet_libraries()
        from mechvlm.vlm.inspection import inspect_model

    report = inspect_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    for line in report.text().split("\n"):
        # The record is Python, for a file.
        (say if line.startswith("      ") else say_lines)(line)
    return 0 if report.holds else 1
