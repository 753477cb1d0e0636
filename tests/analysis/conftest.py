"""Runs to draw."""

from tiny_figures import answer_runs, retrieval_runs  # noqa: F401
