"""Serving targets: where bundles are published. A target is chosen by its name in the configuration."""
