"""burnish post-trains language models; `SFT` is the Python door, `burnish` the command line."""

__version__ = "0.1.0"
