"""Tensor mathematics of joint compression: no files, no logging, no choice of device."""
