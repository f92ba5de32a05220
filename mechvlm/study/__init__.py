"""The study of Wei et al. 2024 on a data set: tables, figures and a report."""

from typing import TYPE_CHECKING, Any

from mechvlm.study.study import Study

if TYPE_CHECKING:
    from mechvlm.study.running.runner import run

__all__ = ["Study", "run"]


def __getattr__(name: str) -> Any:
    # `run` needs nnsight, which opening a finished study does not. So import it on first use.
    if name != "run":
        raise AttributeError(f"module 'mechvlm.study' has no attribute {name!r}")
    from mechvlm.study.running.runner import run

    globals()["run"] = run
    return run
