"""Serving targets: where bundles are published. A target is chosen by its name in the configuration."""

from soppu.targets.embedded import EmbeddedTarget

TARGETS = {"embedded": EmbeddedTarget}
