"""Where figures come from. A package of its own, since some library on PyPI installs one of this name."""
