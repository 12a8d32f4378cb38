"""burnish post-trains language models; `SFT` is the Python door, `burnish` the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from burnish.sft import SFT as SFT

__version__ = "0.1.0"
__all__ = ["SFT", "__version__"]


def __getattr__(name: str) -> Any:
    # torch is imported with SFT, not with the package: `burnish --help` and data workers do without.
    if name == "SFT":
        from burnish.sft import SFT

        return SFT
    raise AttributeError(f"module 'burnish' has no attribute {name!r}")
