"""What runs leave behind, read back: results, sweeps' tables, the paper's tables beside them, and plots of all.

A plot is a :class:`~lavis_aurora.analysis.drawing.Plot`; scripts/figures.py lists them.
"""
