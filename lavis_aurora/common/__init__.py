"""What every room uses: errors, checks of values, files written whole or not at all, paths, registries.

Standard library and torch.
"""

__version__ = "0.2.0"
