"""What runs leave behind, read back: results, tables, figures, and the paper's own tables."""
