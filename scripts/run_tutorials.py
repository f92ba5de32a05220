"""Run the tutorials in place, and keep only outputs that are fit to commit.

    python scripts/run_tutorials.py                # all tutorials
    python scripts/run_tutorials.py 5_intervening  # this one

Prints and pictures stay. An interactive view is replaced by its preview picture; running the
notebook shows the view itself. Progress bars, warnings, timings and this machine's versions are
dropped, so that a run that changes no result changes no file.
"""

import argparse
import os
import re
from pathlib import Path

import nbclient
import nbformat

ROOT = Path(__file__).resolve().parent.parent
TUTORIALS = ROOT / "tutorials"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
PREVIEW = re.compile(r'<img [^>]*src="data:image/png;base64,([^"]+)"')


def run(path: Path, timeout: int = 600) -> nbformat.NotebookNode:
    """The notebook with fresh outputs, executed in the repository's root.

    Args:
        path: of the notebook, which is not changed.
        timeout: seconds that each cell may take.

    Raises:
        nbclient.exceptions.CellExecutionError: when a cell fails.
        nbclient.exceptions.CellTimeoutError: when a cell takes longer than `timeout`.
    """
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(ROOT)}}
    client = nbclient.NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", resources=resources, record_timing=False
    )
    # The models are so small that a second thread slows them down, above all on a busy machine.
    return client.execute(env={**os.environ, "OMP_NUM_THREADS": "1"})


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Replace views by previews and drop all that differs from run to run, in place."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number:02d}", {}
        if cell.cell_type == "code":
            cell.outputs = _joined([output for output in map(_tidied, cell.outputs) if output is not None])


def _tidied(output):
    """The output as it is committed, or None to drop it."""
    if output.output_type == "stream":
        return output if output.name == "stdout" else None
    data, output.metadata = output.data, {}
    html = data.pop("text/html", "")
    if picture := PREVIEW.search(html):
        data["image/png"] = picture[1]
    if "image/png" in data:
        data.pop("text/plain", None)
    elif output.output_type == "display_data":
        return None  # a progress bar
    return output


def _joined(outputs: list) -> list:
    """Consecutive prints joined into one: where the kernel splits them depends on timing."""
    joined: list = []
    for output in outputs:
        if joined and joined[-1].output_type == output.output_type == "stream":
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="tutorials to run, without .ipynb (default: all)")
    names = parser.parse_args().names
    for path in [TUTORIALS / f"{name}.ipynb" for name in names] or sorted(TUTORIALS.glob("*.ipynb")):
        notebook = run(path)
        tidy(notebook)
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
