"""What the built-in demo makes for itself: captioned pictures and clips of two domains, and their vocabulary."""
