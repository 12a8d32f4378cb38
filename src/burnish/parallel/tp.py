"""Tensor and sequence parallelism (arXiv 1909.08053, 2205.05198): a table of how modules are cut over tp ranks, and the
head on a part of the vocabulary. Model files stay as they are; hooks around their modules gather and sum.

Parameters become DTensors, which their own modules read as local tensors, and activations are local tensors: with
sequence parallelism residuals and norms hold T / tp tokens, without it all T. It shards nothing over data ranks and
cuts no routed experts.
Shape suffixes: T tokens of a pack, D hidden size, V vocabulary, K trained tokens, P tp ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.nn import functional

from burnish.model.base import CausalLM
from burnish.model.dense import MLP, Attention
from burnish.model.lm_head import Head, Part, score
from burnish.model.mla import LatentAttention
from burnish.types import TokenScores, UserError

READS_ALL = (Attention, LatentAttention, MLP)
"""Modules that read all tokens, which are gathered once for their projections; gradients are summed there, too."""


@dataclass(frozen=True, slots=True)
class Columns:
    """A projection to this rank's heads or columns; the gradient of its input is this rank's share."""

    def apply(self, module: nn.Module, axis: DeviceMesh) -> None:
        _place(module, axis, {"weight": Shard(0), "bias": Shard(0)})
        _read_locally(module, Shard(0))


@dataclass(frozen=True, slots=True)
class Rows:
    """A projection from this rank's heads or columns, whose outputs are summed over ranks and lie as `tokens` says."""

    tokens: Placement

    def apply(self, module: nn.Module, axis: DeviceMesh) -> None:
        _place(module, axis, {"weight": Shard(1), "bias": Replicate()})
        _read_locally(module, Shard(1), bias=axis.get_local_rank() == 0)
        module.register_forward_hook(partial(_sum_output, axis, self.tokens))


@dataclass(frozen=True, slots=True)
class Whole:
    """What every rank has whole. `gradient` is Partial where each sees some of the tokens or heads, else Replicate."""

    gradient: Placement

    def apply(self, module: nn.Module, axis: DeviceMesh) -> None:
        _place(module, axis, {name: Replicate() for name, _ in module.named_parameters()})
        _read_locally(module, self.gradient)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The head, which is never called: `VocabularyParallel` takes its rows."""

    def apply(self, module: nn.Module, axis: DeviceMesh) -> None:
        _place(module, axis, {"weight": Shard(0), "bias": Shard(0)})


@dataclass(frozen=True, slots=True)
class Embedding:
    """Each rank looks up the tokens whose rows it has, and the others are zero until ranks are summed."""

    tokens: Placement

    def apply(self, module: nn.Module, axis: DeviceMesh) -> None:
        _place(module, axis, {"weight": Shard(0)})
        if isinstance(module, nn.Embedding):  # in the last part of a pipeline it is a tied head alone
            module.forward = partial(_look_up, module, axis, self.tokens)  # pyright: ignore[reportAttributeAccessIssue]


Style = Columns | Rows | Whole | Vocabulary | Embedding
"""How the parameters of one module are cut over the ranks of a mesh, and what is done around it."""


def plan(sequence_parallel: bool) -> Mapping[str, Style | None]:
    """The table for the modules of `model/`, by shell patterns of their names, of which the first that fits counts.

    Heads, columns of MLPs and the vocabulary are cut, the rest is not; None leaves parameters to others.
    """
    tokens = _tokens(sequence_parallel)
    of_heads, of_tokens = Whole(Partial()), Whole(Partial() if sequence_parallel else Replicate())
    return {
        "model.embed_tokens": Embedding(tokens),
        "model.layers.*.self_attn.[qkv]_proj": Columns(),
        "model.layers.*.self_attn.[qk]_norm": of_heads,
        "model.layers.*.self_attn.q_a_*": of_heads,
        "model.layers.*.self_attn.kv_a_*": of_heads,
        "model.layers.*.self_attn.q_b_proj": Columns(),
        "model.layers.*.self_attn.kv_b_proj": Columns(),
        "model.layers.*.self_attn.o_proj": Rows(tokens),
        "model.layers.*.mlp.experts": None,
        "model.layers.*.mlp.gate": of_tokens,
        "model.layers.*.mlp.*gate_proj": Columns(),
        "model.layers.*.mlp.*up_proj": Columns(),
        "model.layers.*.mlp.*down_proj": Rows(tokens),
        "model.layers.*layernorm": of_tokens,
        "model.norm": of_tokens,
        "lm_head": Vocabulary(),
    }


def _tokens(sequence_parallel: bool) -> Placement:
    """How the rows of residuals lie."""
    return Shard(0) if sequence_parallel else Replicate()


def parallelize(model: CausalLM, axis: DeviceMesh, sequence_parallel: bool) -> None:
    """Cut the parameters of `model` over the ranks of `axis`, each of which has it whole or on meta.

    With `sequence_parallel` the packs it is given have a multiple of tp tokens, and its hidden states are [T / tp, D].
    Gradients of what is not cut may be partial sums: `fully_shard` on top adds them up, and so does `full_tensor`.
    Raises UserError, with nothing changed, where a parameter's module has no row in the table.
    """
    table = plan(sequence_parallel)
    # A layer with an adapter has its row, too; the adapter itself is left to `lora.cut_adapters`.
    owners = {name.rpartition(".")[0]: name for name, _ in model.named_parameters() if ".lora_" not in name}
    plain = {owner: owner.removesuffix(".base_layer") for owner in owners}
    fits = {owner: [pattern for pattern in table if fnmatchcase(plain[owner], pattern)] for owner in owners}
    strange = [owners[owner] for owner in owners if not fits[owner]]
    if strange:
        raise UserError(
            f"parallel.tp={axis.size()}: nothing is known of how to cut {strange[0]}; set parallel.tp to 1, or "
            "model.implementation to native where the architecture has one"
        )
    for owner, patterns in fits.items():
        style = table[patterns[0]]
        if style is not None:
            style.apply(model.get_submodule(owner), axis)
    for module in model.modules():
        if isinstance(module, READS_ALL):
            module.register_forward_pre_hook(partial(_gather_input, axis, _tokens(sequence_parallel)))


def _look_up(module: nn.Module, axis: DeviceMesh, tokens: Placement, tokens_T: Tensor) -> Tensor:
    weight_VD = cast(DTensor, module.weight)
    rows_VD = weight_VD.to_local()
    index_T = tokens_T - _first_row(weight_VD, axis)
    outside_T = (index_T < 0) | (index_T >= len(rows_VD))
    hidden_TD = functional.embedding(index_T.masked_fill(outside_T, 0), rows_VD)
    return _laid_out(hidden_TD.masked_fill(outside_T[:, None], 0), axis, Partial(), tokens).to_local()


def _gather_input(axis: DeviceMesh, tokens: Placement, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return _gathered(inputs[0], axis, tokens), *inputs[1:]


def _sum_output(axis: DeviceMesh, tokens: Placement, module: nn.Module, inputs: Any, output_TD: Tensor) -> Tensor:
    return _laid_out(output_TD, axis, Partial(), tokens).to_local()


def _gathered(hidden_TD: Tensor, axis: DeviceMesh, tokens: Placement) -> Tensor:
    """All tokens, each rank's reading of which has its share of the gradient."""
    return _laid_out(hidden_TD, axis, tokens, Replicate()).to_local(grad_placements=[Partial()])


def _laid_out(local: Tensor, axis: DeviceMesh, now: Placement, then: Placement) -> DTensor:
    return DTensor.from_local(local, axis, [now], run_check=False).redistribute(placements=[then])


def _place(module: nn.Module, axis: DeviceMesh, placements: Mapping[str, Placement]) -> None:
    """The parameters of `module` as DTensors, each rank taking its part of what it has."""
    for name, parameter in list(module.named_parameters()):
        placed = distribute_tensor(parameter.detach(), axis, [placements[name]], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(placed, requires_grad=parameter.requires_grad))


def _read_locally(module: nn.Module, gradient: Placement, bias: bool | None = None) -> None:
    """Let the forward of `module` read its parameters as local tensors, whose gradients lie as `gradient` says.

    Under DTensors every operator of a module would cost some 50 us of the host's time. A `bias` that is not None is
    summed over ranks with the output: it is read where it is true, and zero elsewhere.
    """
    names = tuple(name for name, _ in module.named_parameters())
    outside, inside = _readers(type(module), names, gradient, bias)
    # The same module to all others, FSDP among them, and to its own forward one with other properties.
    view = object.__new__(inside)
    object.__setattr__(view, "__dict__", module.__dict__)
    object.__setattr__(module, "_view", view)
    module.__class__ = outside


@cache  # The same classes in all layers, because torch.compile compiles anew for others.
def _readers(kind: type[Any], names: tuple[str, ...], gradient: Placement, bias: bool | None) -> tuple[type, type]:
    """Classes of a module of `kind` to others, and to itself."""

    def forward(module: Any, *inputs: Any) -> Any:
        return kind.forward(module._view, *inputs)

    def reader(name: str) -> property:
        def read(module: nn.Module) -> Tensor:
            parameter = cast(DTensor, module._parameters[name])
            if name == "bias" and bias is not None:
                return parameter.to_local(grad_placements=[Partial()]) * bias
            return parameter.to_local(grad_placements=[gradient])

        return property(read)

    inside = type(kind.__name__, (kind,), {name: reader(name) for name in names})
    return type(kind.__name__, (kind,), {"forward": forward}), inside


def _first_row(weight_VD: DTensor, axis: DeviceMesh) -> int:
    """Where this rank's rows begin, by the rule of torch.chunk."""
    num_rows = len(weight_VD)
    return min(axis.get_local_rank() * -(-num_rows // axis.size()), num_rows)


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
        return _gathered(hidden_TD, self.axis, _tokens(self.sequence_parallel))

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
