"""The stages of the pipeline as plain functions: strings in, a string out, everything else on disk.

`prepare -> federate -> collect -> compress -> evaluate -> publish`, and `report` beside them. Each may be
called again with the same strings and then does nothing twice. Nothing here knows about Prefect or Flower.
"""
