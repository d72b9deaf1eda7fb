"""The plugin in vLLM's workers: resident bases and cores, and the product they add."""
