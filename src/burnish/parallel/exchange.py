"""All-to-all of rows between the ranks of a group, through which gradients flow back. What the rows mean is not known
here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor


def exchange(
    x: Tensor, group: dist.ProcessGroup, send: Sequence[int] | None = None, receive: Sequence[int] | None = None
) -> Tensor:
    """The rows of `x` that the ranks sent here, by rank: `send[r]` of mine go to rank r, `receive[r]` come from it.

    Without numbers every rank gets the same share. All ranks of the group call it, also those without rows.
    """
    return cast(Tensor, _Exchange.apply(x, group, send, receive))


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: dist.ProcessGroup, send: Sequence[int] | None, receive: Sequence[int] | None
    ) -> Tensor:
        ctx.group, ctx.send, ctx.receive = group, send, receive
        return _all_to_all(x, group, send, receive)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(gradients[0], ctx.group, ctx.receive, ctx.send), None, None, None


def _all_to_all(
    x: Tensor, group: dist.ProcessGroup, send: Sequence[int] | None, receive: Sequence[int] | None
) -> Tensor:
    received = x.new_empty(len(x) if receive is None else sum(receive), *x.shape[1:])
    dist.all_to_all_single(
        received,
        x.contiguous(),
        None if receive is None else list(receive),
        None if send is None else list(send),
        group=group,
    )
    return received
