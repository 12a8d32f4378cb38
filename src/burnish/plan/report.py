"""What `burnish plan` says of a plan or a search: tables in words, and the same as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from burnish.config import ParallelConfig, Recipe, RecipeError
from burnish.model import zoo
from burnish.observe.plan_terminal import Section
from burnish.observe.units import count_text, duration_text
from burnish.parallel.degrees import Degrees
from burnish.plan.counting import checkpoint_bytes, export_bytes, is_tied
from burnish.plan.layouts import Estimate, Planner
from burnish.plan.memory import Moment, RankMemory, gib
from burnish.plan.search import Search, search
from burnish.plan.timing import HARDWARE, StepTime, recompute_flops

SHOWN_LAYOUTS = 10


@dataclass(frozen=True)
class Found:
    """What a plan says: as tables, and as JSON."""

    title: str
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    tree: dict[str, Any]

    @property
    def status(self) -> int:
        return 3 if any(section.is_bad for section in self.sections) else 0


@dataclass(frozen=True)
class Report:
    """What is said of what `planner` finds."""

    planner: Planner

    def plan(self) -> Found:
        """The recipe's own layout."""
        estimate = self.planner.estimate(self.planner.recipe, self.planner.degrees)
        sections = [self._parameters(), self._step(estimate), self._memory(estimate), self._disk()]
        if estimate.time is not None:
            sections.append(self._time(estimate))
        return Found(f"plan of {self.planner.request.recipe}", self._facts(estimate), sections, self._tree(estimate))

    def fit(self) -> Found:
        """The layouts of the stated devices that fit, by time."""
        if self.planner.hardware is None or self.planner.limit is None:
            raise RecipeError(
                f"--fit ranks layouts by time and memory; give --hardware {', '.join(HARDWARE)}, or --peak TFLOPS with "
                "--bandwidth GB/s and --memory GiB"
            )
        found = search(self.planner, SHOWN_LAYOUTS)
        sections = [self._parameters(), self._layouts(found)]
        dropped = Counter(found.refused)
        if found.too_large:
            whom = "faster than these, but need" if found.best else "need"
            dropped[f"{whom} more than {gib(self.planner.limit)} GiB"] = found.too_large
        if dropped:
            sections.append(_dropped(dropped))
        tree = {
            **self._model_tree(),
            "layouts": [self._estimate_tree(estimate) for estimate in found.best],
            "possible": found.possible,
            "dropped": dict(dropped),
        }
        if found.best:
            sections += [self._memory(found.best[0]), self._time(found.best[0]), to_paste(found.best[0])]
        title = f"layouts of {self.planner.request.recipe} on {_devices(self.planner.degrees.world)}"
        return Found(title, self._facts(None), sections, tree)

    def _layouts(self, found: Search) -> Section:
        world, limit = self.planner.degrees.world, self.planner.limit
        assert limit is not None
        if not found.best:
            note = f"no layout of {_devices(world)} is possible; the reasons stand below"
            if found.least is not None:
                least = found.least
                note = (
                    f"no layout of {_devices(world)} fits in {gib(limit)} GiB, offloaded or not; the least is "
                    f"{gib(least.peak)} GiB ({layout_text(least.recipe, least.layout.degrees)}): take more devices, a "
                    "smaller batch.tokens_per_micro_batch, or narrower precision.states"
                )
            return Section("layouts", ("",), (), (note,), is_bad=True)
        rows = []
        for estimate in found.best:
            recipe, host = estimate.recipe, max(memory.host for memory in estimate.memories)
            assert estimate.time is not None
            rows.append(
                (
                    ", ".join(_words(recipe, estimate.layout.degrees)) or "one process",
                    str(recipe.parallel.zero),
                    recipe.train.recompute,
                    gib(estimate.peak),
                    gib(host) if host else "",
                    seconds_text(estimate.time.total),
                )
            )
        notes = [f"{found.possible:,} layouts are possible; of each set of degrees the best that fits is shown"]
        if len(rows) > 1:
            notes.append(
                "the first is the simplest of those within 1 % or 1 ms of the fastest that fits: with fewest kinds "
                "of parallelism, then with least recomputation"
            )
        if found.is_offloaded:
            notes.append("nothing fits without more in the host's memory, which needs room for that of each rank")
        names = ("layout", "zero", "recompute", "GiB", "host GiB", "a step")
        return _without_empty(Section("layouts, fastest first", names, rows, notes))

    def _facts(self, estimate: Estimate | None) -> list[tuple[str, str]]:
        recipe, counts = self.planner.recipe, self.planner.counts
        active = f", {count_text(counts.active)} active" if counts.active < counts.total else ""
        facts = [
            ("model", f"{zoo.architecture_of(self.planner.config)}, {count_text(counts.total)} parameters{active}"),
            ("rows", self.planner.rows.source),
        ]
        if self.planner.rows.left_out:
            facts.append(
                ("left out", f"{self.planner.rows.left_out:,} sampled rows give no sample; see `burnish inspect`")
            )
        if estimate is not None:
            facts.append(("layout", layout_text(recipe, self.planner.degrees)))
        if not self.planner.is_world_known:
            number = _devices(self.planner.degrees.world)
            facts.append(("devices", f"{number}, the least that the recipe may have; --devices N plans for more"))
        facts.append(("precision", precision_text(recipe)))
        if self.planner.hardware is not None:
            facts.append(("hardware", f"{self.planner.degrees.world} x {self.planner.hardware.name}"))
        return facts

    def _parameters(self) -> Section:
        counts = self.planner.counts
        rows = [(name, f"{number:,}", f"{number / counts.total:.1%}") for name, number in counts.parts.items()]
        rows.append(("all", f"{counts.total:,}", ""))
        if counts.active < counts.total:
            rows.append(("active for a token", f"{counts.active:,}", f"{counts.active / counts.total:.1%}"))
        if counts.trained < counts.total:
            rows.append(("trained", f"{counts.trained:,}", f"{counts.trained / counts.total:.1%}"))
        notes = ("the head is the embedding",) if is_tied(self.planner.model) else ()
        return Section("parameters", ("", "number", "share"), rows, notes)

    def _step(self, estimate: Estimate) -> Section:
        steps, flops = self.planner.steps, self.planner.flops
        total = sum(flops.values())
        train = self.planner.recipe.train
        again = recompute_flops(self.planner.work, train.recompute, train.recompute_every)
        rows = [
            ("samples", f"{steps.num_samples:,.0f}"),
            ("tokens", f"{steps.num_tokens:,.0f}"),
            ("of these trained", f"{steps.num_trained:,.0f}"),
            ("micro-batches of a data rank", f"{estimate.layout.num_micro_batches:,}"),
            ("tokens of the fullest", f"{steps.micro.num_tokens:,} in {len(steps.micro.lengths):,} documents"),
            *(
                (f"FLOPs, {name}", f"{flops_text(flops)} ({flops / total:.1%})")
                for name, flops in self.planner.flops.items()
            ),
            ("FLOPs in all", flops_text(total) + (f" + {flops_text(again)} for recomputing" if again else "")),
        ]
        if steps.total is None:
            return Section("a step", ("", ""), rows, ("how many steps there are is not known: give --rows N",))
        rows.append(("steps", f"{steps.total:,}"))
        rows.append(("tokens of the run", count_text(steps.total * steps.num_tokens)))
        return Section("a step", ("", ""), rows)

    def _memory(self, estimate: Estimate) -> Section:
        shown, planner = _shown(estimate.memories), self.planner
        busy, updating = [m.forward_backward for m in shown], [m.optimizer_step for m in shown]
        rows = [
            *_by_part([moment.device for moment in busy], ""),
            ("forward and backward", *(gib(moment.on_device) for moment in busy)),
            ("optimizer step", *(gib(moment.on_device) for moment in updating)),
            *_by_part([_fuller(m).host for m in shown], ", host"),
        ]
        if any(memory.host for memory in shown):
            rows.append(("in the host's memory", *(gib(memory.host) for memory in shown)))
        fullest = max(estimate.memories, key=lambda memory: memory.peak)
        notes = [f"fullest in {fullest.fullest.name}"]
        if planner.limit is not None:
            text = f"{'does not fit' if self._is_short(estimate) else 'fits'} in {gib(planner.limit)} GiB"
            fill = planner.assumptions.fill
            notes.append(f"{text} ({fill:.0%} of {gib(planner.limit / fill)})")
        columns = ("GiB", *(f"{m.role}, {m.layers} layers" if len(shown) > 1 else m.role for m in shown))
        return Section("memory of a rank", columns, rows, tuple(notes), self._is_short(estimate))

    def _is_short(self, estimate: Estimate) -> bool:
        return self.planner.limit is not None and estimate.peak > self.planner.limit

    def _disk(self) -> Section:
        recipe, counts = self.planner.recipe, self.planner.counts
        rows = [
            ("a checkpoint", gib(checkpoint_bytes(counts, recipe))),
            ("an export", gib(export_bytes(counts, recipe))),
        ]
        keep = recipe.checkpoint.keep
        notes = (f"{keep} checkpoints are kept, and one more while it is written",) if keep is not None else ()
        return Section("on disk", ("GiB", ""), rows, notes)

    def _time(self, estimate: Estimate) -> Section:
        time, hardware, assumptions = estimate.time, self.planner.hardware, self.planner.assumptions
        assert time is not None
        assert hardware is not None
        rows = [(name, seconds_text(seconds)) for name, seconds in time.parts.items() if seconds > 0]
        speed, world = self.planner.steps.num_tokens / time.total, self.planner.degrees.world
        rows.append(("a step", seconds_text(time.total)))
        rows.append(("tokens a second", f"{count_text(speed)} ({count_text(speed / world)} a device)"))
        rows.append(("MFU", f"{self._utilisation(time):.1%}"))
        if self.planner.steps.total is not None:
            rows.append(("the run", duration_text(time.total * self.planner.steps.total)))
        notes = (
            f"assumed: {assumptions.efficiency:.0%} of {hardware.flops / 1e12:,.0f} TFLOP/s while computing "
            f"(--efficiency), {assumptions.transfer:.0%} of {hardware.bandwidth / 1e9:,.0f} GB/s of memory, "
            f"{hardware.link / 1e9:,.0f} GB/s to devices of the node (--link) and {hardware.network / 1e9:,.0f} GB/s "
            f"to others (--network), {assumptions.devices_per_node} devices a node (--devices-per-node); gathering and "
            "reducing of data ranks beside computing, all other communication in front of it",
        )
        return Section("time", ("", ""), rows, notes)

    def _utilisation(self, time: StepTime) -> float:
        assert self.planner.hardware is not None
        return sum(self.planner.flops.values()) / time.total / self.planner.degrees.world / self.planner.hardware.flops

    def _model_tree(self) -> dict[str, Any]:
        counts, steps = self.planner.counts, self.planner.steps
        return {
            "recipe": self.planner.request.recipe,
            "architecture": zoo.architecture_of(self.planner.config),
            "parameters": {"parts": counts.parts} | {n: getattr(counts, n) for n in ("total", "trained", "active")},
            "step": {
                "samples": steps.num_samples,
                "tokens": steps.num_tokens,
                "trained_tokens": steps.num_trained,
                "micro_batches": steps.num_packs,
                "fullest_micro_batch_tokens": steps.micro.num_tokens,
                "flops": self.planner.flops,
            },
            "steps": steps.total,
            "checkpoint_bytes": round(checkpoint_bytes(counts, self.planner.recipe)),
            "export_bytes": round(export_bytes(counts, self.planner.recipe)),
        }

    def _tree(self, estimate: Estimate) -> dict[str, Any]:
        return {**self._model_tree(), **self._estimate_tree(estimate)}

    def _estimate_tree(self, estimate: Estimate) -> dict[str, Any]:
        time = estimate.time
        memories = [
            {
                "role": memory.role,
                "layers": memory.layers,
                "forward_backward": _rounded(memory.forward_backward.device),
                "optimizer_step": _rounded(memory.optimizer_step.device),
                "peak": round(memory.peak),
                "host_parts": _rounded(_fuller(memory).host),
                "host": round(memory.host),
            }
            for memory in estimate.memories
        ]
        return {
            "layout": layout_keys(estimate),
            "memory_bytes": memories,
            "fits": None if self.planner.limit is None else not self._is_short(estimate),
            "seconds": None if time is None else {**time.parts, "step": time.total},
            "mfu": None if time is None else self._utilisation(time),
        }


def layout_keys(estimate: Estimate) -> dict[str, Any]:
    """The recipe's keys of a layout."""
    degrees, recipe = estimate.layout.degrees, estimate.recipe
    names = ("dp_replicate", "dp_shard", "tp", "cp", "pp", "ep", "etp")
    keys = {f"parallel.{name}": getattr(degrees, name) for name in names}
    keys |= {
        f"parallel.{name}": getattr(recipe.parallel, name) for name in ("zero", "offload", "cp_kind", "pp_schedule")
    }
    train = recipe.train
    return keys | {"train.recompute": train.recompute, "train.offload_activations": train.offload_activations}


def layout_text(recipe: Recipe, degrees: Degrees) -> str:
    """A layout in words."""
    words = _words(recipe, degrees)
    if degrees.dp_shard * degrees.cp > 1:
        words.append(f"zero {recipe.parallel.zero}")
    words.append(f"recompute {recipe.train.recompute}")
    return f"one process, {', '.join(words)}" if degrees.world == 1 else f"{degrees.world} ranks: {', '.join(words)}"


def _words(recipe: Recipe, degrees: Degrees) -> list[str]:
    """Degrees above 1, and what else makes a layout where it is not the default."""
    parallel = recipe.parallel
    names = ("dp_replicate", "dp_shard", "tp", "cp", "pp", "ep", "etp")
    words = [f"{name} {getattr(degrees, name)}" for name in names if getattr(degrees, name) > 1]
    if degrees.cp > 1 and parallel.cp_kind != "ring":
        words.append(parallel.cp_kind)
    if degrees.pp > 1 and parallel.pp_schedule != "1f1b":
        words.append(parallel.pp_schedule)
    if parallel.offload != "none":
        words.append(f"offload {parallel.offload}")
    if recipe.train.offload_activations:
        words.append("offload activations")
    return words


def _devices(number: int) -> str:
    return f"{number} device{'s' * (number != 1)}"


def precision_text(recipe: Recipe) -> str:
    precision = recipe.precision
    states = f", states {precision.states}" if recipe.optim.name == "adamw" else ""
    return f"compute {precision.compute}, masters {precision.master}{states}"


def flops_text(flops: float) -> str:
    return f"{flops:.2e}"


def seconds_text(seconds: float) -> str:
    if seconds < 1e-3:
        return "under 1 ms"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s" if seconds < 100 else f"{seconds:,.0f} s"


def _rounded(parts: Mapping[str, float]) -> dict[str, int]:
    return {name: round(value) for name, value in parts.items()}


def _by_part(moments: Sequence[Mapping[str, float]], mark: str) -> list[tuple[str, ...]]:
    """A row for every part that any of `moments` has."""
    names = dict.fromkeys(name for moment in moments for name, value in moment.items() if value)
    return [(name + mark, *(gib(moment.get(name, 0.0)) for moment in moments)) for name in names]


def _fuller(memory: RankMemory) -> Moment:
    """The moment at which most is in the host's memory."""
    return max(memory.forward_backward, memory.optimizer_step, key=lambda moment: moment.on_host)


def _shown(memories: Sequence[RankMemory]) -> list[RankMemory]:
    """First, middle and last of a pipeline."""
    if len(memories) <= 3:
        return list(memories)
    return [memories[0], memories[len(memories) // 2], memories[-1]]


def _without_empty(section: Section) -> Section:
    """Without the columns that are empty in all rows."""
    kept = [column for column in range(len(section.columns)) if any(row[column] for row in section.rows)]
    rows = [tuple(row[column] for column in kept) for row in section.rows]
    return replace(section, columns=tuple(section.columns[column] for column in kept), rows=rows)


def _dropped(dropped: Counter[str]) -> Section:
    rows = [(reason, f"{number:,}") for reason, number in dropped.most_common()]
    return Section("dropped", ("reason", "layouts"), rows)


def to_paste(estimate: Estimate) -> Section:
    """The recipe's `parallel`, and what of `train` belongs to a layout."""
    recipe, degrees, defaults = estimate.recipe, estimate.layout.degrees, ParallelConfig()
    parallel = recipe.parallel.model_copy(update={"dp_shard": degrees.dp_shard})
    changed = {name: value for name, value in parallel if value != getattr(defaults, name)}
    lines = [f"  {name}: {str(value).lower()}" for name, value in changed.items()]
    train = {"recompute": recipe.train.recompute}
    if recipe.train.offload_activations:
        train["offload_activations"] = "true"
    text = (
        *(("parallel:", *lines) if lines else ("parallel: {}",)),
        f"train: {{{', '.join(f'{name}: {value}' for name, value in train.items())}}}",
    )
    return Section("for the recipe", (), (), text, is_code=True)
