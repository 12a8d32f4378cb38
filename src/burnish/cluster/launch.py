"""Which processes a run has: none but its own, Ray's, or those that torchrun or Slurm started; and starting again."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from burnish.cluster.peers import PeerRanks, check_keys, environment_world, leading, serve
from burnish.cluster.ranks import LocalRanks, LostRanks, Ranks, counted
from burnish.config import ClusterConfig, RecipeError

LOG = logging.getLogger(__name__)

T = TypeVar("T")


def open_ranks(
    config: ClusterConfig,
    target: str,
    args: tuple[Any, ...] = (),
    *,
    device: str,
    logs: Path | None = None,
    log_level: str = "info",
    fits: Callable[[int], bool] | None = None,
    meet: bool = True,
) -> Ranks:
    """The ranks of a run, each with an object `target(place, *args)`; `target` is its class as module:Class.

    `device` is cpu or cuda; `logs` the folder of rank-N.log. `fits`, at a restart, says of a number of ranks whether
    the recipe can be laid out over them, so that a run may go on with fewer. `meet` forms torch's process group. Raises
    RecipeError for what `config` cannot mean here, ClusterError for what does not come up.
    """
    common: dict[str, Any] = {"device": device, "logs": logs, "log_level": log_level, "meet": meet}
    world = environment_world(os.environ)
    if world is not None:
        return PeerRanks(config, world, target, args, **common)
    if is_local(config, device):
        os.environ |= {name: str(value) for name, value in config.env.items()}
        name = "cpu" if device == "cpu" else f"cuda:{(config.device_mapping or (0,))[0]}"
        return LocalRanks(target, args, name, meet)
    from burnish.cluster.ray_ranks import RayRanks

    return RayRanks(config, target, args, fits=fits, **common)


def is_local(config: ClusterConfig, device: str) -> bool:
    """Whether the run is a world of one, which needs no process but the driver's. It looks at no other host."""
    return config.address is None and known_world(config, device) == 1


def known_world(config: ClusterConfig, device: str) -> int | None:
    """How many ranks a run will have, as far as that is known without a look at other hosts; else None."""
    world = environment_world(os.environ)
    if world is not None:
        return world.size
    if config.device_mapping is not None:
        return len(config.device_mapping)
    if config.devices_per_node != "auto":
        return config.num_nodes * config.devices_per_node
    if device == "cpu":
        return config.num_nodes
    if config.address is not None:
        return None
    import torch

    return torch.cuda.device_count()


def joined_device(config: ClusterConfig, asked: str) -> str | None:
    """cpu or cuda: what the ranks of a cluster that is joined are to have, by run.device, `asked`, and its hosts. None
    where no cluster is joined, so that this host says it. Raises ClusterError where no cluster answers."""
    if config.address is None or environment_world(os.environ) is not None:
        return None
    from burnish.cluster.placement import num_gpus

    found = num_gpus(config.address)
    if asked != "auto":
        return asked
    return "cuda" if found else "cpu"


def check_devices(config: ClusterConfig, device: str) -> None:
    """Raises RecipeError for processes and devices that cannot be had, as far as that is known without a look at other
    hosts."""
    world = environment_world(os.environ)
    if world is not None:
        check_keys(config, world)
    elif config.address is None and device == "cuda":
        import torch

        count, highest = torch.cuda.device_count(), max(config.device_mapping or (0,))
        if highest >= count:
            raise RecipeError(
                f"cluster.device_mapping names device {highest}, and this host shows {counted(count, 'CUDA device')}, "
                "numbered from 0; name some of those"
            )
        if config.devices_per_node != "auto" and config.devices_per_node > count:
            raise RecipeError(
                f"cluster.devices_per_node={config.devices_per_node}: this host shows {counted(count, 'CUDA device')}, "
                f"and with cluster.address=null no other joins; set it to {count} at most"
            )


@contextlib.contextmanager
def driving(environment: Mapping[str, str]) -> Iterator[None]:
    """Around all that the driver of a run does. In a process that torchrun or Slurm started as another rank than 0,
    which is no driver, it serves rank 0 instead, and the process ends with that."""
    world = environment_world(environment)
    if world is not None and world.rank > 0:
        serve(world)
    with leading(environment):
        yield


def with_restarts(run_once: Callable[[int], T], max_restarts: int) -> T:
    """What `run_once(number of restarts so far)` returns. Where it loses ranks it is called again, `max_restarts` times
    at most; everything else that it raises goes through, for a second attempt would raise it again."""
    restarts = 0
    while True:
        try:
            return run_once(restarts)
        except LostRanks as error:
            if restarts == max_restarts:
                if max_restarts:
                    LOG.error("cluster.max_restarts=%d restarts are used up", max_restarts)
                raise
            restarts += 1
            LOG.warning("%s", error)
            LOG.warning("restart %d of %d, from the last checkpoint", restarts, max_restarts)


def end_without_ray(status: int) -> NoReturn:
    """End this process, whose cluster lost its head: Ray would wait for that, and else its threads, which nobody
    stopped, would crash the interpreter's end."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # closed, or nobody reads it any more
            stream.flush()
    os._exit(status)


def end_after(seconds: float, kill: Callable[[], None], status: int) -> threading.Timer:
    """End the driver with `status`, behind `kill`, when `seconds` have passed, unless the timer is cancelled before."""

    def end() -> None:
        LOG.error("not finished within cluster.grace=%g s: ending as it is", seconds)
        kill()
        os._exit(status)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    return timer
