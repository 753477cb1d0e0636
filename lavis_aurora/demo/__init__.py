"""What the built-in demo makes for itself: captioned pictures of two domains, and their vocabulary."""
