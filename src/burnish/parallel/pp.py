"""One rank of a pipeline: its parts of the model, and the micro-batches of a step through them, by torch's schedules.

Where the model is cut and which rank holds what is stages.py's. Scores and losses are the caller's; so is sharding, but
for what it keeps gathered, which depends on the schedule.
Shape suffixes: T tokens of a micro-batch (those of a rank where they are cut), D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.tensor import DTensor
from torch.torch_version import TorchVersion

from burnish.config import ParallelConfig
from burnish.model.base import CausalLM
from burnish.parallel.stages import SPLIT, Part, num_micro_batches, rank_of
from burnish.types import Batch, Documents, Stats, UserError, merge

LAYERS, NORM, HEAD = "model.layers", "model.norm", "lm_head"
EMBEDDING = "model.embed_tokens"
COPY = f"{HEAD}.weight"
"""Where the head is the embedding: the last part's copy of its weight, under the name that `aliases` has for it."""

ScoreAndLoss = Callable[[Tensor, Batch], tuple[Tensor, Stats]]
"""Final hidden states [T, D] of a batch to the sum of its weighted losses and its statistics."""


class HeadAsEmbedding(nn.Module):
    """Stands for the embedding where a model takes its head from there: lets hidden states through, and has the weight
    of `head`, which it does not own."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self._head = (head,)  # in a tuple it is no submodule

    @property
    def weight(self) -> Any:
        return self._head[0].weight

    def forward(self, hidden_TD: Tensor) -> Tensor:
        return hidden_TD


def is_tied(model: CausalLM) -> bool:
    return COPY in model.aliases


def keep_part(model: CausalLM, part: Part) -> CausalLM:
    """Trim `model`, built on meta for this part alone, to the modules of `part` under their names; returns it.

    What passes for tokens in all parts but the first are the hidden states [T, D] of the part before; absent modules
    let them through. Layers that are not there leave no gap in `model.layers`, whose keys are kept. A tied head becomes
    a parameter of its own in the last part, `COPY`, which `refresh_tied` fills, and which is trained if the embedding
    is: freeze parameters first.
    """
    layers, kept = model.get_submodule(LAYERS), nn.ModuleList()
    for index in part.layers:
        kept.add_module(str(index), layers.get_submodule(str(index)))
    model.set_submodule(LAYERS, kept)
    absent = [] if part.is_first else [EMBEDDING]
    if not part.is_last:
        absent += [NORM] if is_tied(model) else [NORM, HEAD]
    elif is_tied(model) and not part.is_first:
        head = nn.Module()
        head.weight = model.get_submodule(EMBEDDING).weight
        model.add_module(HEAD, head)
        model.set_submodule(EMBEDDING, HeadAsEmbedding(head))
        absent.remove(EMBEDDING)
    for name in absent:
        model.set_submodule(name, nn.Identity())
    return model


def own_parameters(stages: Mapping[Part, CausalLM]) -> dict[str, nn.Parameter]:
    """The parameters of this rank's parts by name, without the head's copy of a tied embedding.

    These are what an optimizer updates, a norm counts and a checkpoint holds: each parameter on one pipeline rank.
    """
    return {
        name: parameter
        for part, model in stages.items()
        for name, parameter in model.named_parameters()
        if name != COPY or not is_tied(model)
    }


def fill_up(batches: Sequence[Batch], parallel: ParallelConfig, num_tokens: int = 1) -> list[Batch]:
    """`batches`, and as many of padding alone, `num_tokens` each, as the schedule asks for in addition."""
    missing = num_micro_batches(parallel, len(batches)) - len(batches)
    return [*batches, *[_padding(num_tokens, batches[0].tokens_T.device)] * missing]


def _padding(num_tokens: int, device: torch.device) -> Batch:
    nothing_K = torch.zeros(0, dtype=torch.int64, device=device)
    no_weights_K = torch.zeros(0, dtype=torch.float64, device=device)
    bounds = torch.tensor([0, num_tokens], dtype=torch.int32, device=device)
    return Batch(
        tokens_T=torch.zeros(num_tokens, dtype=torch.int64, device=device),
        positions_T=torch.arange(num_tokens, device=device),
        documents=Documents(bounds, (num_tokens,), has_padding=True),
        trained_K=nothing_K,
        targets_K=nothing_K,
        weights_K=no_weights_K,
        raw_weights_K=no_weights_K,
        sources_K=nothing_K,
        sources=(),
        samples=(),
    )


@dataclass
class _Work:
    """What the stages of this rank look up while a schedule runs."""

    score_and_loss: ScoreAndLoss
    denominator: float
    batches: Sequence[Batch]
    noise_of: Callable[[int], Tensor | None]
    stats: Stats = field(default_factory=dict)


class PipelineEngine:
    """Runs micro-batches through the parts of the model that this rank holds and those of the other ranks of `group`.

    `dtype` is that of hidden states between parts, and `rows` how many of a batch's are on this rank (T by default;
    fewer under sequence parallelism). Parts that `fully_shard` has sharded keep their gradients whole until they are
    reduced, once a step. Zero-bubble schedules compute the gradients of weights apart from those of activations: for
    them sharded weights stay gathered through a step, and the last part, whose head would run backward twice, computes
    both at once.
    """

    def __init__(
        self,
        stages: Mapping[Part, CausalLM],
        parallel: ParallelConfig,
        group: dist.ProcessGroup,
        device: torch.device,
        dtype: torch.dtype,
        rows: Callable[[Batch], int] = lambda batch: len(batch.tokens_T),
    ) -> None:
        self.stages = stages
        self.parallel = parallel
        self.group = group
        self.device = device
        self.dtype = dtype
        self.rows = rows
        self.work: _Work | None = None
        self._schedules: dict[tuple[int, bool], Any] = {}
        # NCCL sets a group up at its first use, in which all ranks must take part; a schedule has pairs alone.
        dist.all_reduce(torch.zeros(1, device=device), group=group)
        if parallel.pp_schedule in SPLIT:
            for model in stages.values():
                if isinstance(model, FSDPModule):
                    # torch looks weights up in the module to compute their gradients; those of shards would be lost.
                    model.set_reshard_after_forward(False)

    @property
    def first(self) -> CausalLM | None:
        """The part with the embedding, if it is on this rank."""
        return next((model for part, model in self.stages.items() if part.is_first), None)

    @property
    def last(self) -> CausalLM | None:
        """The part with the head, if it is on this rank: here statistics appear."""
        return next((model for part, model in self.stages.items() if part.is_last), None)

    def forward_backward(
        self,
        batches: Sequence[Batch],
        score_and_loss: ScoreAndLoss,
        denominator: float,
        noise_of: Callable[[int], Tensor | None] = lambda number: None,
    ) -> Stats:
        """Add to the parameters' gradients those of the summed loss of `batches`, divided by `denominator`.

        All ranks of the pipeline give the same batches, on the device and as many as `fill_up` makes of them.
        `noise_of` a micro-batch's number is added to its embeddings. Returns the sum of the batches' statistics, on the
        rank that holds the last part; nothing on others.
        """
        work = _Work(score_and_loss, denominator, batches, noise_of)
        self._run(work, training=True)
        self._sum_tied_gradients()
        return work.stats

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], score_and_loss: ScoreAndLoss) -> Stats:
        """The sum of the batches' statistics on the rank that holds the last part; gradients stay as they are."""
        work = _Work(score_and_loss, 1.0, batches, lambda number: None)
        self._run(work, training=False)
        for module in (module for model in self.stages.values() for module in model.modules()):
            if isinstance(module, FSDPModule):
                module.reshard()  # what a forward has gathered would be stale after the next update
        return work.stats

    def _run(self, work: _Work, training: bool) -> None:
        self.work = work
        schedule = self._schedule(len(work.batches), training)
        run = schedule.step if training else schedule.eval
        try:
            run(target=torch.arange(len(work.batches)), return_outputs=False)
        finally:
            self.work = None

    def _schedule(self, num: int, training: bool) -> Any:
        """The schedule of `num` micro-batches, with stages of its own: torch sets them up for that number."""
        if (num, training) not in self._schedules:
            stages = [
                _Stage(self, part, model) for part, model in sorted(self.stages.items(), key=lambda s: s[0].index)
            ]
            arguments: dict[str, Any] = {"loss_fn": self._loss, "scale_grads": False}
            match self.parallel.pp_schedule:
                case "gpipe" if training:
                    schedule = ScheduleGPipe(stages[0], num, **arguments)
                case "gpipe" | "1f1b":
                    schedule = Schedule1F1B(stages[0], num, **arguments)
                case "interleaved_1f1b":
                    schedule = ScheduleInterleaved1F1B([*stages], num, **arguments)
                case "interleaved_zero_bubble":
                    schedule = ScheduleInterleavedZeroBubble([*stages], num, **arguments)
                case "zbv_zero_bubble":
                    schedule = ScheduleZBVZeroBubble([*stages], num, **arguments)
            self._schedules[num, training] = schedule
        return self._schedules[num, training]

    def _loss(self, hidden_TD: Tensor, number: Tensor) -> Tensor:
        assert self.work is not None
        loss_sum, stats = self.work.score_and_loss(hidden_TD, self.work.batches[int(number)])
        self.work.stats = merge(self.work.stats, stats)
        return loss_sum / self.work.denominator

    @torch.no_grad()
    def _sum_tied_gradients(self) -> None:
        """Add the gradient of the head's copy of a tied embedding to the embedding's, and drop it."""
        embedding, copy = self._tied()
        if copy is not None and copy.requires_grad:
            gradient = _wide(copy).to(self.device)
            if embedding is not None:
                _add(embedding, gradient)
            else:
                dist.send(gradient, group_dst=0, group=self.group)
            copy.grad = None
        elif embedding is not None and embedding.requires_grad:
            gradient = torch.empty_like(_wide(embedding), device=self.device)
            dist.recv(gradient, group_src=self._last_rank, group=self.group)
            _add(embedding, gradient)

    @torch.no_grad()
    def refresh_tied(self) -> None:
        """Write a tied embedding into the head's copy: after every update and after weights were loaded."""
        embedding, copy = self._tied()
        if embedding is not None and copy is not None:
            _local(copy).copy_(_local(embedding))
        elif embedding is not None:
            dist.send(_local(embedding).to(self.device), group_dst=self._last_rank, group=self.group)
        elif copy is not None:
            # Shards may lie on the host, from which a group of devices cannot send.
            weight = torch.empty_like(_local(copy), device=self.device)
            dist.recv(weight, group_src=0, group=self.group)
            _local(copy).copy_(weight)

    def _tied(self) -> tuple[nn.Parameter | None, nn.Parameter | None]:
        """The embedding and the head's copy of it, each where it is on this rank and they are tied."""
        embedding, copy = (
            model.get_parameter(name) if model is not None and is_tied(model) else None
            for model, name in ((self.first, f"{EMBEDDING}.weight"), (self.last, COPY))
        )
        return embedding, copy

    @property
    def _last_rank(self) -> int:
        return rank_of(next(iter(self.stages)).num_parts - 1, self.parallel)


def _local(tensor: Tensor | None) -> Tensor:
    """The values of a tensor that lie on this rank."""
    assert tensor is not None
    detached = tensor.detach()
    return detached._local_tensor if isinstance(detached, DTensor) else detached


def _add(weight: nn.Parameter, gradient: Tensor) -> None:
    own = _local(weight.grad)
    own.add_(gradient.to(own.device))


def _wide(weight: nn.Parameter) -> Tensor:
    """The gradient of a weight on this rank, in a type that both copies of a weight agree on."""
    return _local(weight.grad).to(torch.promote_types(weight.dtype, torch.float32))


OVERRIDDEN = (
    "_get_init_p2p_neighbors_ops",
    "backward_one_chunk",
    "backward_weight_one_chunk",
    "forward_maybe_with_nosync",
    "forward_one_chunk",
    "get_bwd_recv_ops",
    "get_fwd_recv_ops",
    "get_local_bwd_output",
    "set_local_bwd_input",
)
"""What `_Stage` has in place of torch's own, in every version."""


def check_torch(stage: type, version: str) -> None:
    """Raises UserError where torch's stages no longer call what `_Stage` overrides, and gradients would be wrong."""
    since_2_13 = ("_post_metadata_inference_cleanup",) if TorchVersion(version) >= "2.13" else ()
    gone = [name for name in (*OVERRIDDEN, *since_2_13) if not hasattr(stage, name)]
    if gone:
        raise UserError(
            f"parallel.pp runs torch's pipeline stages of torch 2.11 to 2.13, and those of torch {version} have no "
            f"{' and no '.join(gone)}; install torch 2.13, or set parallel.pp to 1"
        )


class _Stage(PipelineStage):
    """torch's stage, but micro-batches may differ in length and hold memory only while they are under way.

    torch receives into buffers that it makes for all micro-batches of a step at once, of one shape. Here those are
    empty, and each is replaced for the time it is needed. Hidden states pass gradients at every cut, also where nothing
    before is trained, which torch 2.11 takes for granted.
    """

    def __init__(self, engine: PipelineEngine, part: Part, model: CausalLM) -> None:
        check_torch(PipelineStage, torch.__version__)
        self._engine = engine
        self._hidden_size: int = model.config["hidden_size"]
        self._nothing = torch.empty(0, self._hidden_size, dtype=engine.dtype, device=engine.device)
        hidden = torch.empty_like(self._nothing, requires_grad=True)
        tokens = torch.empty(0, dtype=torch.int64, device=engine.device)
        super().__init__(
            model,
            part.index,
            part.num_parts,
            engine.device,
            input_args=tokens if part.is_first else hidden,
            output_args=hidden,
            group=engine.group,
        )
        self._runtime_validate = False  # torch 2.13 would compare lengths

    def _validate_fwd_input(self, args: Any, kwargs: Any) -> None:
        """torch before 2.13 would compare lengths."""

    def _validate_fwd_outputs(self, outputs: Any) -> None:
        """torch before 2.13 would compare lengths."""

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """torch 2.11 would send to itself where the turn of a V is on one rank, which gloo cannot."""
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]

    def _post_metadata_inference_cleanup(self) -> None:
        """torch 2.13 would drop all gradients, as if it had tried the model out."""

    def _room(self, number: int) -> Tensor:
        assert self._engine.work is not None
        rows = self._engine.rows(self._engine.work.batches[number])
        return torch.empty(rows, self._hidden_size, dtype=self._engine.dtype, device=self.device)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        if not self.is_first:
            self.args_recv_info[fwd_chunk_id][0].buffer = self._room(fwd_chunk_id)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if self.has_backward and not self.is_last:
            self.grad_recv_info[bwd_chunk_id][0].buffer = self._room(bwd_chunk_id)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def forward_one_chunk(
        self, fwd_chunk_id: int, args: Any, kwargs: Any = None, save_forward_output: bool = True
    ) -> Any:
        work = self._engine.work
        assert work is not None
        if not self.is_first:
            hidden_TD = self.args_recv_info[fwd_chunk_id][0].buffer
            assert hidden_TD is not None
            hidden_TD.requires_grad_(self.has_backward)
        batch = work.batches[fwd_chunk_id]
        self._inputs = (
            batch.positions_T,
            batch.documents,
            work.noise_of(fwd_chunk_id) if self.is_first else None,
        )
        args = (batch.tokens_T,) if self.is_first else ()
        output = super().forward_one_chunk(fwd_chunk_id, args, {}, save_forward_output)
        if not self.is_first:
            self.args_recv_info[fwd_chunk_id][0].buffer = self._nothing
        return output

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden_TD = super().forward_maybe_with_nosync(*args, *self._inputs)
        return hidden_TD if hidden_TD.requires_grad or not self.has_backward else hidden_TD.requires_grad_()

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        if not self.has_backward:
            self.fwd_cache.pop(bwd_chunk_id)
            return
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward or self.is_last, last_backward)
        if not self.is_last:
            self.grad_recv_info[bwd_chunk_id][0].buffer = self._nothing

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        if not self.is_last:
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)

    def get_local_bwd_output(self, mb_index: int) -> Any:
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)
