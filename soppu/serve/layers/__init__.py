"""Linear layers that add every row's own change."""
