"""What is asked of `burnish plan`, and the hardware that it is asked about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from burnish.config import RecipeError
from burnish.plan.memory import GIB
from burnish.plan.timing import HARDWARE, Hardware


@dataclass(frozen=True)
class Request:
    """The arguments of `burnish plan`."""

    recipe: str
    overrides: Sequence[str] = ()
    hardware: str | None = None
    peak: float | None = None
    bandwidth: float | None = None
    memory: float | None = None
    link: float | None = None
    network: float | None = None
    devices: int | None = None
    devices_per_node: int = 8
    efficiency: float = 0.5
    tokens_per_row: int | None = None
    rows: int | None = None
    fit: bool = False
    json: str | None = None


def requested_hardware(request: Request) -> Hardware | None:
    """The hardware of a request; None where none is stated. Raises RecipeError for one that is not known."""
    if request.hardware is not None:
        named = HARDWARE.get(request.hardware.upper())
        if named is None:
            raise RecipeError(
                f"--hardware={request.hardware} is not known; take {', '.join(HARDWARE)}, or state --peak TFLOPS with "
                "--bandwidth GB/s and --memory GiB"
            )
    elif request.peak is None:
        return None
    elif request.bandwidth is None:
        raise RecipeError(f"--peak={request.peak:g} needs --bandwidth, the device's memory bandwidth in GB/s")
    else:
        like = HARDWARE["H100"]
        named = replace(like, name=f"a device of {request.peak:g} TFLOP/s", memory=0.0)
    stated = {
        "flops": (request.peak, 1e12),
        "bandwidth": (request.bandwidth, 1e9),
        "memory": (request.memory, GIB),
        "link": (request.link, 1e9),
        "network": (request.network, 1e9),
    }
    return replace(named, **{name: value * unit for name, (value, unit) in stated.items() if value is not None})
