"""The study of Wei et al. 2024 over a data set: tables, figures and a report."""

from mechvlm.study.runner import Study, run

__all__ = ["Study", "run"]
