"""What layouts of a recipe's model cost: each is cut, traced and added up, and `burnish plan` shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import prod
from typing import Any, Literal

from torch import nn

from burnish.config import ParallelConfig, Recipe
from burnish.model import zoo
from burnish.model.base import CausalLM, model_shape
from burnish.model.moe import Experts, compute_one_by_one
from burnish.observe.flops import ModelShape, step_flops
from burnish.parallel.apply import layer_costs
from burnish.parallel.checks import check_layout
from burnish.parallel.degrees import Degrees
from burnish.parallel.stages import cut_model, num_chunks, num_micro_batches
from burnish.parallel.trace import Footprint, Micro, Trace, cut, local_shape
from burnish.plan.counting import (
    RowSample,
    Steps,
    build_on_meta,
    count_parameters,
    draw_steps,
    is_embedding,
    is_tied,
    read_model_config,
    sample_rows,
)
from burnish.plan.memory import GIB, Content, Layout, Rank, RankMemory, RankModel, Sizes, Values
from burnish.plan.request import Request, requested_hardware
from burnish.plan.timing import Assumptions, StepTime, Work, step_time

Named = tuple[str, nn.Parameter]


@dataclass
class RankModels:
    """What a rank of any layout holds of a model, and keeps of a micro-batch: traced where it is asked for, and once
    for layouts that differ in what ranks do to weights alone.
    """

    config: dict[str, Any]
    recipe: Recipe
    micro: Micro
    device: Literal["cpu", "cuda"]
    _known: dict[tuple[Any, ...], RankModel] = field(default_factory=dict)
    _traces: dict[tuple[Any, ...], Trace] = field(default_factory=dict)

    def of(self, recipe: Recipe, degrees: Degrees) -> RankModel:
        """The model of a rank of `degrees`; `recipe` differs from the planned one in its layout and recomputation."""
        parallel = recipe.parallel
        cut_as = (degrees.tp, degrees.etp, degrees.cp, parallel.cp_kind, parallel.sequence_parallel is not False)
        key = (*cut_as, degrees.world > 1, recipe.train.offload_activations, degrees.ep)
        if key not in self._known:
            # Experts that are computed one by one have temporaries each.
            traced = degrees if self._one_by_one else replace(degrees, ep=1)
            footprints = Footprints(
                partial(self._trace, recipe, traced, (*key[:-1], traced.ep)), degrees.ep // traced.ep
            )
            self._known[key] = replace(self._held(degrees), footprints=footprints)
        return self._known[key]

    def _trace(self, recipe: Recipe, degrees: Degrees, key: tuple[Any, ...]) -> Trace:
        if key not in self._traces:
            model, parallel = build_on_meta(self.config, recipe, self.device), recipe.parallel
            cut(model, degrees, parallel.sequence_parallel is not False)
            part = self.micro.part(degrees.cp, degrees.tp)
            self._traces[key] = Trace(model, part, self.device, recipe.train.offload_activations)
        return self._traces[key]

    @cached_property
    def _model(self) -> CausalLM:
        return build_on_meta(self.config, self.recipe, self.device)

    @cached_property
    def _one_by_one(self) -> bool:
        return any(isinstance(m, Experts) and m.compute is compute_one_by_one for m in self._model.modules())

    @cached_property
    def _parameters(self) -> tuple[list[list[Named]], list[Named]]:
        """Those of each block, and the others."""
        names = {parameter: name for name, parameter in self._model.named_parameters()}
        blocks = [[(names.pop(p), p) for p in block.parameters()] for block in self._model.blocks()]
        return blocks, [(name, parameter) for parameter, name in names.items()]

    def _held(self, degrees: Degrees) -> RankModel:
        blocks, around = self._parameters
        return RankModel(
            blocks=tuple(_content(block, degrees) for block in blocks),
            embedding=_content((one for one in around if is_embedding(one[0])), degrees),
            head=_content((one for one in around if not is_embedding(one[0])), degrees),
            is_tied=is_tied(self._model),
            largest=max(prod(local_shape(name, p.shape, degrees)) for block in blocks for name, p in block),
            footprints={},
        )


class Footprints(dict[str, Footprint]):
    """By mode of recomputation, of a rank with one of `ep` parts of the experts that were traced."""

    def __init__(self, trace: Callable[[], Trace], ep: int) -> None:
        super().__init__()
        self._trace = trace
        self._ep = ep

    def __missing__(self, mode: str) -> Footprint:
        self[mode] = self._trace()[mode].spread(self._ep)
        return self[mode]


def lay_out(recipe: Recipe, degrees: Degrees, num_packs: int, device: Literal["cpu", "cuda"]) -> Layout:
    """The layout of a step of `num_packs` micro-batches a data rank, or as many more as its schedule asks for."""
    parallel, train = recipe.parallel, recipe.train
    number = num_micro_batches(parallel, num_packs)
    sizes = Sizes.of(recipe)
    offloads = train.offload_activations
    return Layout(parallel, degrees, sizes, number, device, train.recompute, train.recompute_every, offloads)


def stages(costs: tuple[list[float], float, float], parallel: ParallelConfig) -> list[range]:
    """The layers of every part of the pipeline; `costs` as of `layer_costs`."""
    if parallel.pp == 1:
        return [range(len(costs[0]))]
    return [part.layers for part in cut_model(parallel, *costs)]


def _content(parameters: Iterable[Named], degrees: Degrees) -> Content:
    values = {True: [0, 0], False: [0, 0]}
    for name, parameter in parameters:
        values[parameter.requires_grad][".experts." in name] += prod(local_shape(name, parameter.shape, degrees))
    trained, frozen = Values(*values[True]), Values(*values[False])
    return Content(trained + frozen, trained)


@dataclass
class Estimate:
    """What one layout costs. Nothing is traced for its time; its memory is counted when it is asked for."""

    recipe: Recipe
    ranks: Sequence[Rank]
    time: StepTime | None

    @property
    def layout(self) -> Layout:
        return self.ranks[0].layout

    @cached_property
    def memories(self) -> Sequence[RankMemory]:
        return [rank.memory for rank in self.ranks]

    @property
    def peak(self) -> float:
        return max(memory.peak for memory in self.memories)


@dataclass
class Planner:
    """The recipe's model and rows, and the estimates of layouts for them."""

    request: Request
    recipe: Recipe
    _stages: dict[tuple[int, int], list[range]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.hardware = requested_hardware(self.request)
        self.config = read_model_config(self.recipe)
        self.origin = zoo.choose_implementation(self.recipe.model.implementation, self.config)
        self.model = build_on_meta(self.config, self.recipe, self.device)
        self.counts = count_parameters(self.model)
        if self.request.fit:  # the recipe's own layout need not be one of those
            self.degrees = Degrees(dp_shard=self._world())
        else:
            self.degrees = Degrees.of(self.recipe.parallel, self._world())
            self.check(self.recipe, self.degrees)

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Whose kernels are planned for."""
        return "cpu" if self.recipe.run.device == "cpu" else "cuda"

    @property
    def is_world_known(self) -> bool:
        """Whether request or recipe say how many ranks there are."""
        cluster = self.recipe.cluster
        return not (self.request.devices is cluster.device_mapping is None and cluster.devices_per_node == "auto")

    def _world(self) -> int:
        parallel, cluster = self.recipe.parallel, self.recipe.cluster
        if self.request.devices is not None:
            return self.request.devices
        if cluster.device_mapping is not None:
            return len(cluster.device_mapping)
        if cluster.devices_per_node != "auto":
            return cluster.num_nodes * cluster.devices_per_node
        shards = 1 if parallel.dp_shard == "auto" else parallel.dp_shard
        return max(parallel.dp_replicate * shards * parallel.cp * parallel.tp * parallel.pp, cluster.num_nodes)

    def check(self, recipe: Recipe, degrees: Degrees) -> None:
        """Raises RecipeError for a layout that the model cannot have."""
        check_layout(self.model, recipe, degrees, self.device, *self.origin)

    @property
    def num_experts(self) -> int:
        sizes = (self.model.config.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts"))
        return next((size for size in sizes if size), 1)

    @cached_property
    def shape(self) -> ModelShape:
        return model_shape(self.model)

    @cached_property
    def rows(self) -> RowSample:
        return sample_rows(self.recipe, self.request)

    @cached_property
    def steps(self) -> Steps:
        return draw_steps(self.recipe, self.rows)

    @cached_property
    def flops(self) -> dict[str, float]:
        """Of one step, by part."""
        steps, shape = self.steps, self.shape
        body = 6.0 * shape.body_parameters * steps.num_tokens
        head = 6.0 * shape.head_parameters * steps.num_trained
        drawn = step_flops(shape, steps.lengths, 0)
        attention = drawn - 6.0 * shape.body_parameters * sum(steps.lengths)
        return {"body": body, "attention": attention, "lm head": head}

    @cached_property
    def work(self) -> Work:
        config, blocks = self.model.config, self.model.blocks()
        sparse = sum(any(".experts." in name for name, _ in block.named_parameters()) for block in blocks)
        heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        return Work(
            flops=self.flops,
            micro_tokens=self.steps.micro.num_tokens,
            num_packs=self.steps.num_packs,
            hidden_size=config["hidden_size"],
            num_layers=len(blocks),
            num_sparse_layers=sparse,
            top_k=config.get("num_experts_per_tok") or 0,
            kv_size=2 * heads * self.shape.head_dim,
        )

    @cached_property
    def layer_costs(self) -> tuple[list[float], float, float]:
        """By which a pipeline is cut: those of the model without adapters."""
        bare = self.recipe.model_copy(update={"lora": None})
        return layer_costs(build_on_meta(self.config, bare, self.device))

    def stages(self, parallel: ParallelConfig) -> list[range]:
        """The layers of every part of the pipeline; in a search layouts differ in the number of parts alone."""
        key = parallel.pp, num_chunks(parallel)
        if key not in self._stages:
            self._stages[key] = stages(self.layer_costs, parallel)
        return self._stages[key]

    @cached_property
    def models(self) -> RankModels:
        return RankModels(self.config, self.recipe, self.steps.micro, self.device)

    def estimate(self, recipe: Recipe, degrees: Degrees) -> Estimate:
        """`recipe` laid out by `degrees`."""
        model, parts = self.models.of(recipe, degrees), self.stages(recipe.parallel)
        layout = lay_out(recipe, degrees, -(-self.steps.num_packs // degrees.data_ranks), self.device)
        ranks = [Rank(model, layout, parts, rank) for rank in range(degrees.pp)]
        time = None
        if self.hardware is not None:
            time = step_time(ranks, self.work, self.hardware, self.assumptions)
        return Estimate(recipe, ranks, time)

    @property
    def assumptions(self) -> Assumptions:
        return Assumptions(efficiency=self.request.efficiency, devices_per_node=self.request.devices_per_node)

    @property
    def limit(self) -> float | None:
        """Bytes that a rank may fill; None where no memory is stated."""
        stated = self.request.memory
        size = stated * GIB if stated is not None else self.hardware.memory if self.hardware is not None else 0.0
        return size * self.assumptions.fill or None
