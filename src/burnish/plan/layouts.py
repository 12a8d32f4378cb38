"""What layouts of a recipe's model cost: each is cut, traced and added up, and `burnish plan` shows it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from torch import nn

from burnish.config import ParallelConfig, Recipe
from burnish.model import zoo
from burnish.model.base import model_shape
from burnish.observe.flops import ModelShape, step_flops
from burnish.parallel.apply import layer_costs
from burnish.parallel.checks import check_layout
from burnish.parallel.degrees import Degrees
from burnish.parallel.stages import cut_model, num_micro_batches
from burnish.parallel.trace import Micro, cut, trace
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
from burnish.plan.memory import GIB, Content, Layout, RankMemory, RankModel, Sizes, Values, rank_memory
from burnish.plan.request import Request, requested_hardware
from burnish.plan.timing import Assumptions, StepTime, Work, step_time

RECOMPUTE = ("none", "selective", "full")


def rank_model(
    config: dict[str, Any],
    recipe: Recipe,
    degrees: Degrees,
    micro: Micro,
    device: Literal["cpu", "cuda"],
    modes: Sequence[str] = (),
) -> RankModel:
    """What one rank of `degrees` holds of the model, and keeps of a micro-batch in each mode of recomputation, or in
    the recipe's alone.
    """
    train, parallel = recipe.train, recipe.parallel
    model = build_on_meta(config, recipe, device)
    cut(model, degrees, parallel.sequence_parallel is not False)
    blocks = model.blocks()
    inside = {parameter for block in blocks for parameter in block.parameters()}
    around = [(name, p) for name, p in model.named_parameters() if p not in inside]
    if not modes:
        modes = (train.recompute, "none") if train.recompute_every > 1 else (train.recompute,)
    return RankModel(
        blocks=tuple(_content(block.named_parameters()) for block in blocks),
        embedding=_content((name, p) for name, p in around if is_embedding(name)),
        head=_content((name, p) for name, p in around if not is_embedding(name)),
        is_tied=is_tied(model),
        largest=max(p.numel() for block in blocks for p in block.parameters()),
        footprints=trace(model, micro.part(degrees.cp, degrees.tp), device, modes, train.offload_activations),
    )


def lay_out(recipe: Recipe, degrees: Degrees, num_packs: int, device: Literal["cpu", "cuda"]) -> Layout:
    """The layout of a step of `num_packs` micro-batches a data rank, or as many more as its schedule asks for."""
    parallel, train = recipe.parallel, recipe.train
    number = num_micro_batches(parallel, num_packs)
    sizes = Sizes.of(recipe)
    return Layout(parallel, degrees, sizes, number, device, train.recompute, train.recompute_every)


def stages(costs: tuple[list[float], float, float], parallel: ParallelConfig) -> list[range]:
    """The layers of every part of the pipeline; `costs` as of `layer_costs`."""
    if parallel.pp == 1:
        return [range(len(costs[0]))]
    return [part.layers for part in cut_model(parallel, *costs)]


def _content(parameters: Iterable[tuple[str, nn.Parameter]]) -> Content:
    values = {True: [0, 0], False: [0, 0]}
    for name, parameter in parameters:
        values[parameter.requires_grad][".experts." in name] += parameter.numel()
    trained, frozen = Values(*values[True]), Values(*values[False])
    return Content(trained + frozen, trained)


@dataclass(frozen=True)
class Estimate:
    """What one layout costs."""

    recipe: Recipe
    layout: Layout
    memories: Sequence[RankMemory]
    time: StepTime | None

    @property
    def peak(self) -> float:
        return max(memory.peak for memory in self.memories)


@dataclass
class Planner:
    """The recipe's model and rows, and the estimates of layouts for them."""

    request: Request
    recipe: Recipe
    _models: dict[tuple[Any, ...], RankModel] = field(default_factory=dict)
    _stages: dict[int, list[range]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.hardware = requested_hardware(self.request)
        self.config = read_model_config(self.recipe)
        self.origin = zoo.choose_implementation(self.recipe.model.implementation, self.config)
        self.model = build_on_meta(self.config, self.recipe, self.device)
        self.counts = count_parameters(self.model)
        self.degrees = Degrees.of(self.recipe.parallel, self._world())
        self.check(self.recipe, self.degrees)

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Whose kernels are planned for."""
        return "cpu" if self.recipe.run.device == "cpu" else "cuda"

    def _world(self) -> int:
        parallel, cluster = self.recipe.parallel, self.recipe.cluster
        if self.request.devices is not None:
            return self.request.devices
        if cluster.device_mapping is not None:
            return len(cluster.device_mapping)
        if cluster.devices_per_node != "auto":
            return cluster.num_nodes * cluster.devices_per_node
        shards = 1 if parallel.dp_shard == "auto" else parallel.dp_shard
        return parallel.dp_replicate * shards * parallel.cp * parallel.tp * parallel.pp

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
        """The layers of every part of the pipeline; in a search layouts differ in their number alone."""
        if parallel.pp not in self._stages:
            self._stages[parallel.pp] = stages(self.layer_costs, parallel)
        return self._stages[parallel.pp]

    def estimate(self, recipe: Recipe, degrees: Degrees) -> Estimate:
        """Memory and time of `recipe` laid out by `degrees`."""
        parallel = recipe.parallel
        key = (degrees.tp, degrees.cp, parallel.cp_kind, degrees.ep, degrees.etp, parallel.sequence_parallel)
        key = (*key, degrees.world > 1)
        if key not in self._models:
            modes = RECOMPUTE if self.request.fit else ()
            self._models[key] = rank_model(self.config, recipe, degrees, self.steps.micro, self.device, modes)
        model, parts = self._models[key], self.stages(parallel)
        layout = lay_out(recipe, degrees, -(-self.steps.num_packs // degrees.data_ranks), self.device)
        memories = [rank_memory(model, layout, parts, rank) for rank in range(degrees.pp)]
        time = None
        if self.hardware is not None:
            time = step_time(model, layout, parts, memories, self.work, self.hardware, self.assumptions)
        return Estimate(recipe, layout, memories, time)

    @property
    def assumptions(self) -> Assumptions:
        return Assumptions(efficiency=self.request.efficiency, devices_per_node=self.request.devices_per_node)

    @property
    def limit(self) -> float | None:
        """Bytes that a rank may fill; None where no memory is stated."""
        stated = self.request.memory
        size = stated * GIB if stated is not None else self.hardware.memory if self.hardware is not None else 0.0
        return size * self.assumptions.fill or None
