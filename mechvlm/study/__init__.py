"""The study of Wei et al. 2024 over a data set: tables, figures and a report."""

from mechvlm.study.runner import run
from mechvlm.study.study import Study

__all__ = ["Study", "run"]
