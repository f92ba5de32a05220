"""Run the tutorials in place, and leave in them what a reader of the repository needs: short prints and still pictures.

    python scripts/run_tutorials.py                # all of them
    python scripts/run_tutorials.py 5_intervening  # or some

An interactive view is committed as its still picture; whoever runs the notebook gets the view itself. Progress bars, warnings,
timings and this machine's versions are dropped, so that a run which changes nothing leaves no difference.
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
STILL = re.compile(r'<img [^>]*src="data:image/png;base64,([^"]+)"')


def run(path: Path, timeout: int = 120) -> nbformat.NotebookNode:
    """The notebook executed from its first cell, in the repository's root; `timeout` in seconds a cell.

    Raises:
        nbclient.exceptions.CellExecutionError: when a cell fails.
        nbclient.exceptions.CellTimeoutError: when one takes longer.
    """
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(ROOT)}}
    client = nbclient.NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", resources=resources, record_timing=False
    )
    # The models are so small that a second thread costs more than it does, and much more on a machine that is busy.
    return client.execute(env={**os.environ, "OMP_NUM_THREADS": "1"})


def still(notebook: nbformat.NotebookNode) -> None:
    """Drop from the outputs what is not to be committed, in place."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number:02d}", {}
        if cell.cell_type == "code":
            cell.outputs = _joined([kept for output in cell.outputs if (kept := _kept(output)) is not None])


def _kept(output):
    if output.output_type == "stream":
        return output if output.name == "stdout" else None
    data, output.metadata = output.data, {}
    html = data.pop("text/html", "")
    if picture := STILL.search(html):
        data["image/png"] = picture[1]
    if "image/png" in data:
        data.pop("text/plain", None)
    elif output.output_type == "display_data":
        return None  # a progress bar
    return output


def _joined(outputs: list) -> list:
    """Prints that follow each other as one: how the kernel cut them depends on time."""
    joined: list = []
    for output in outputs:
        if joined and joined[-1].output_type == output.output_type == "stream":
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of tutorials, without .ipynb; all by default")
    names = parser.parse_args().names
    for path in [TUTORIALS / f"{name}.ipynb" for name in names] or sorted(TUTORIALS.glob("*.ipynb")):
        notebook = run(path)
        still(notebook)
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
