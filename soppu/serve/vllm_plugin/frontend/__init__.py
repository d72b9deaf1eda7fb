"""The plugin in vLLM's API server: names, versions, routes."""
