"""The version, here and nowhere else: the package's metadata are read from this line."""

__version__ = "0.2.0"
