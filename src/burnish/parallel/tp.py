"""Tensor and sequence parallelism (arXiv 1909.08053, 2205.05198): a table of how modules are cut over tp ranks, and the
head on a part of the vocabulary. Model files stay as they are; hooks around their modules gather and sum.

Parameters become DTensors, while activations between modules are local tensors: with sequence parallelism residuals
and norms hold T / tp tokens, without it all T. It shards nothing over data ranks and cuts no experts.
Shape suffixes: T tokens of a pack, D hidden size, V vocabulary, K trained tokens, P tp ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional

from burnish.model.base import CausalLM
from burnish.model.lm_head import Head, Part, score
from burnish.types import TokenScores, UserError

Plan = Mapping[str, ParallelStyle | None]
"""Styles by shell patterns of module names, the first that fits counts; None leaves a module to others."""


def plan(sequence_parallel: bool) -> Plan:
    """The table for the modules of `model/`: heads, columns of MLPs and the vocabulary are cut, the rest is not."""
    tokens = Shard(0) if sequence_parallel else Replicate()
    return {
        "model.embed_tokens": EmbeddingRows(tokens),
        "model.layers.*.input_layernorm": Whole(tokens),
        "model.layers.*.self_attn": _reads_all(tokens, num_others=2),
        "model.layers.*.self_attn.[qkv]_proj": ColwiseParallel(),
        "model.layers.*.self_attn.[qk]_norm": Whole(Shard(1)),
        "model.layers.*.self_attn.o_proj": RowwiseParallel(output_layouts=tokens),
        "model.layers.*.post_attention_layernorm": Whole(tokens),
        "model.layers.*.mlp": _reads_all(tokens),
        "model.layers.*.mlp.gate_proj": ColwiseParallel(),
        "model.layers.*.mlp.up_proj": ColwiseParallel(),
        "model.layers.*.mlp.down_proj": RowwiseParallel(output_layouts=tokens),
        "model.norm": Whole(tokens),
        "lm_head": ColwiseParallel(),
    }


def parallelize(model: CausalLM, axis: DeviceMesh, sequence_parallel: bool) -> None:
    """Cut the parameters of `model` over the ranks of `axis`, each of which has it whole or on meta.

    With `sequence_parallel` the packs it is given have a multiple of tp tokens, and its hidden states are [T / tp, D].
    Gradients of what is not cut may be partial sums: `fully_shard` on top adds them up, and so does `full_tensor`.
    Raises UserError, with nothing changed, where a parameter's module has no row in the table.
    """
    styles = _match(model, plan(sequence_parallel))
    strange = [name for name, _ in model.named_parameters() if name.rpartition(".")[0] not in styles]
    if strange:
        raise UserError(
            f"parallel.tp={axis.size()}: nothing is known of how to cut {strange[0]}; set parallel.tp to 1, or "
            "model.implementation to native where the architecture has one"
        )
    for name, style in styles.items():
        module = model.get_submodule(name)
        if style is not None and any(True for _ in module.parameters()):
            parallelize_module(module, axis, style, src_data_rank=None)


def _match(model: nn.Module, table: Plan) -> dict[str, ParallelStyle | None]:
    """The style of every module that a pattern fits."""
    names = [name for name, _ in model.named_modules()]
    fits = {name: [pattern for pattern in table if fnmatchcase(name, pattern)] for name in names}
    return {name: table[patterns[0]] for name, patterns in fits.items() if patterns}


def _reads_all(tokens: Placement, num_others: int = 0) -> PrepareModuleInput:
    """A module that reads all tokens, gathered once for all its projections; their gradients are summed once, too."""
    others = (None,) * num_others
    return PrepareModuleInput(input_layouts=(tokens, *others), desired_input_layouts=(Replicate(), *others))


class Whole(ParallelStyle):
    """A module whose parameters every rank holds whole, at work on tokens or heads that lie as `layout` says."""

    def __init__(self, layout: Placement) -> None:
        self.layout = layout

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def read(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            x, *others = inputs
            return (x if isinstance(x, DTensor) else DTensor.from_local(x, device_mesh, [self.layout]), *others)

        def write(module: nn.Module, inputs: tuple[Any, ...], output: DTensor) -> Tensor:
            return output.to_local()

        _place(module, device_mesh, Replicate())
        module.register_forward_pre_hook(read)
        module.register_forward_hook(write)
        return module


class EmbeddingRows(ParallelStyle):
    """An embedding cut by rows: each rank looks up the tokens it has, the others are zero, and the sum is `layout`.

    torch's RowwiseParallel would give every rank the gradient of the whole vocabulary.
    """

    def __init__(self, layout: Placement) -> None:
        self.layout = layout

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _place(module, device_mesh, Shard(0))
        module.forward = partial(self._look_up, module, device_mesh)
        return module

    def _look_up(self, module: nn.Module, axis: DeviceMesh, tokens_T: Tensor) -> Tensor:
        weight_VD = cast(DTensor, module.weight)
        rows_VD = weight_VD.to_local()
        index_T = tokens_T - _first_row(weight_VD, axis)
        outside_T = (index_T < 0) | (index_T >= len(rows_VD))
        hidden_TD = functional.embedding(index_T.masked_fill(outside_T, 0), rows_VD)
        return _laid_out(hidden_TD.masked_fill(outside_T[:, None], 0), axis, Partial(), self.layout).to_local()


def _place(module: nn.Module, axis: DeviceMesh, placement: Placement) -> None:
    """The parameters of `module` as DTensors, each rank taking its part of what it has."""
    for name, parameter in module.named_parameters(recurse=False):
        placed = distribute_tensor(parameter.detach(), axis, [placement], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(placed, requires_grad=parameter.requires_grad))


def _first_row(weight_VD: DTensor, axis: DeviceMesh) -> int:
    """Where this rank's rows begin, by the rule of torch.chunk."""
    num_rows = len(weight_VD)
    return min(axis.get_local_rank() * -(-num_rows // axis.size()), num_rows)


def _laid_out(local: Tensor, axis: DeviceMesh, now: Placement, then: Placement) -> DTensor:
    return DTensor.from_local(local, axis, [now]).redistribute(placements=[then])


@dataclass(frozen=True, slots=True)
class VocabularyParallel:
    """Scores with a head of which each rank of `axis` holds some rows; all ranks score the same tokens.

    `gather` and `score` belong together: each rank's `score` has its share of the gradient of the hidden states, which
    the backward pass of `gather` adds up.
    """

    axis: DeviceMesh
    sequence_parallel: bool

    def gather(self, hidden_TD: Tensor) -> Tensor:
        """The hidden states of all tokens, of those of this rank [T / tp, D] or, without sequence parallelism, all."""
        whole_TD = _laid_out(hidden_TD, self.axis, self._tokens, Replicate())
        return whole_TD.to_local(grad_placements=[Partial()])

    def cut(self, x_TD: Tensor) -> Tensor:
        """Of something about all T tokens what goes with this rank's residuals: noise on embeddings, for one."""
        return x_TD.chunk(self.axis.size())[self.axis.get_local_rank()] if self.sequence_parallel else x_TD

    def score(self, hidden_KD: Tensor, head: Head, targets_K: Tensor, block: int | None = None) -> TokenScores:
        """`lm_head.score` of the whole head, whose weights are DTensors cut over `axis`; the same on every rank."""
        weight_VD = cast(DTensor, head.weight_VD)
        bias_V = None if head.bias_V is None else cast(DTensor, head.bias_V).to_local()
        rows = replace(head, weight_VD=weight_VD.to_local(), bias_V=bias_V)
        part = Part(_first_row(weight_VD, self.axis), len(weight_VD), self._stack)
        return score(hidden_KD, rows, targets_K, block, part)

    def _stack(self, x: Tensor) -> Tensor:
        """[P, ...]: `x` of every rank."""
        return _laid_out(x[None], self.axis, Shard(0), Replicate()).to_local()

    @property
    def _tokens(self) -> Placement:
        return Shard(0) if self.sequence_parallel else Replicate()
