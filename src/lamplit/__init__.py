"""lamplit: lock any image model and teach a text tower to read it (LiT, Zhai et al., CVPR 2022)."""

from lamplit._version import __version__

__all__ = ["__version__"]
