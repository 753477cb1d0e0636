"""Datasets: checks of what users bring, and what LAVIS lacks."""
