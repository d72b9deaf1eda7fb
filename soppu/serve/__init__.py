"""The embedded inference server: many users' adapters on one base model, over LoRAX's HTTP API.

Not the federation's ServerApp, which is the top-level folder `server/`.
"""
