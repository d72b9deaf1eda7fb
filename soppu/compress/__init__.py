"""Joint compression: the LoRA adapters of many users in, one bundle out."""

from __future__ import annotations

from soppu.compress.bundle.bundle import Bundle
from soppu.compress.cored.run import compress_cores
from soppu.compress.edit import Projection, forget, project
from soppu.compress.options import CompressOptions
from soppu.compress.run import compress

__all__ = ["Bundle", "CompressOptions", "Projection", "compress", "compress_cores", "forget", "project"]
