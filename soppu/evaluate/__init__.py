"""What a user gained, what compression kept of it, and whether a bundle may be published."""
