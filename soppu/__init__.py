"""SOPPU: Scalable One PEFT Per User."""

__version__ = "0.1.0"
