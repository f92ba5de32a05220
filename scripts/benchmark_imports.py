"""Import times, each in a fresh interpreter."""

import subprocess
import sys

from benchmark_measure import times

NNSIGHT = "import nnsight"
IMPORT_MARGIN = 0.3
"""Seconds that `import mechvlm` may take over `import nnsight`."""
HELP_LIMIT = 1.0
"""Seconds that `mechvlm --help` may take."""
CODE = {
    NNSIGHT: NNSIGHT,
    "import mechvlm": "import mechvlm",
    "nnsight, AutoProcessor, pandas": "import nnsight, pandas; from transformers import AutoProcessor",
    "mechvlm, every public name": "import mechvlm; [getattr(mechvlm, name) for name in mechvlm.__all__]",
    "mechvlm --help": "from mechvlm.cli import main; main([])",
}


def imports(repeats: int) -> list[dict]:
    """One row per import: its seconds, and the ratio to `import nnsight`.

    `import mechvlm` loads nothing heavy: a name loads its part on first use. The row "mechvlm,
    every public name" shows what that costs in all.
    """

    def run(code):
        return lambda: subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)

    seconds = times({name: run(code) for name, code in CODE.items()}, repeats)
    limits = {"import mechvlm": seconds[NNSIGHT] + IMPORT_MARGIN, "mechvlm --help": HELP_LIMIT}
    return [
        {"case": name, "seconds": taken, "of import nnsight": taken / seconds[NNSIGHT], "limit": limits.get(name)}
        for name, taken in seconds.items()
    ]
