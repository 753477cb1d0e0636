"""Figures of the paper, drawn from runs, sweeps and benchmarks of this package."""
