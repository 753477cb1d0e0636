"""What every room uses: errors, files written whole or not at all, paths, precision. Standard library and torch."""
