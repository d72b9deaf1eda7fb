"""`soppu evaluate`: every way to serve a run's users, measured on the same held-out text."""
