"""From integers to bytes and back, without loss."""
