"""The bundle: all users' compressed adapters, and the one file they are kept in."""
