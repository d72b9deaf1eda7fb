"""Tests that share a Prefect server and a worker, which end with the last of them."""
