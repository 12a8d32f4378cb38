"""Keeps a rank on the cores near its CUDA device, as Linux tells of them. Elsewhere nothing is bound."""

from __future__ import annotations

import os
from pathlib import Path

PCI = Path("/sys/bus/pci/devices")


def bind_to_device(device: str) -> str | None:
    """Bind this process to the cores of the NUMA node of `device` (cuda:0) among those that it may use; which they are.

    None where the host has one node, or none of those cores is ours to use.
    """
    import torch

    of = torch.cuda.get_device_properties(device)
    address = f"{of.pci_domain_id:04x}:{of.pci_bus_id:02x}:{of.pci_device_id:02x}.0"
    cores = local_cores(PCI / address)
    usable = cores & os.sched_getaffinity(0)
    if not usable or usable == os.sched_getaffinity(0):
        return None
    os.sched_setaffinity(0, usable)
    return (PCI / address / "local_cpulist").read_text().strip()


def local_cores(device: Path) -> set[int]:
    """The cores near a PCI device, by its folder under /sys; none where that does not say."""
    file = device / "local_cpulist"
    return parse_cores(file.read_text()) if file.is_file() else set()


def parse_cores(text: str) -> set[int]:
    """The numbers of a list of cores such as `0-3,8`."""
    cores: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        start, _, end = part.partition("-")
        cores |= set(range(int(start), int(end or start) + 1))
    return cores
