"""metrics.jsonl, and what a run counts between two of its lines.

Statistics stay on the device between lines and are fetched together, once a line. Nothing here decides when a line is
written, and torch is imported only where a device is read.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.files import write_whole
from burnish.observe.flops import ModelShape, step_flops
from burnish.types import Stats, Status, StepInput, UserError, Weighted

Line = dict[str, Any]
"""One line of metrics.jsonl: flat, values are numbers or None (a number that was not finite)."""

GIB = 2**30


class MetricsWriter:
    """Appends lines to metrics.jsonl; each is handed to the operating system at once, so kill -9 loses none."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line. JSON knows no NaN or infinity: such a value is written as null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self._file.write(json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[Line]:
    """The lines of a metrics.jsonl, without a last one that was torn by a kill. A missing file has none.

    Raises UserError where a line before the last cannot be read.
    """
    return [json.loads(text) for text in _whole_lines(path)]


def cut(path: Path, step: int) -> None:
    """Drop the lines of steps beyond `step`, the one a run resumes from (-1: all of them), and a torn last line.

    The file is replaced as a whole: a kill leaves either the old or the new one. Raises UserError as `read` does.
    """
    if not path.exists():
        return
    kept = [text for text in _whole_lines(path) if json.loads(text)["step"] <= step]
    write_whole(path, "".join(f"{text}\n" for text in kept))


def _whole_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    # A line is whole once its newline is there; what follows the last newline was being written when the run died.
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not _is_object(line):
            raise UserError(
                f"{path}:{number}: {line[:60]!r} is not a line of metrics (a JSON object with a step), and lines "
                "follow it; mend or remove that line"
            )
    return [line.decode("utf-8") for line in lines]


def _is_object(line: bytes) -> bool:
    try:
        value = json.loads(line)
    except ValueError:
        return False
    return isinstance(value, dict) and "step" in value


class Stopwatch:
    """Where the time goes: seconds by name, summed until taken.

    On a CPU this is wall-clock time. On CUDA, kernels run behind the host, so events on the current stream mark both
    ends: a name gets the time the device spent or stood waiting there, and no mark waits for the device. Blocks are not
    nested.
    """

    def __init__(self, device_type: str = "cpu", clock: Callable[[], float] = time.perf_counter) -> None:
        self._on_cuda = device_type == "cuda"
        self._clock = clock
        self._spans: list[tuple[str, Any, Any]] = []
        self._added: list[tuple[str, float]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._mark()
        try:
            yield
        finally:
            self._spans.append((name, start, self._mark()))

    def add(self, name: str, seconds: float) -> None:
        """Count what another process has measured."""
        self._added.append((name, seconds))

    def take(self) -> dict[str, float]:
        """Seconds by name since the last call; on CUDA it waits for the last of the marks."""
        measured = [(name, self._between(start, end)) for name, start, end in self._spans]
        seconds: dict[str, float] = defaultdict(float)
        for name, value in [*measured, *self._added]:
            seconds[name] += value
        self._spans, self._added = [], []
        return dict(seconds)

    def _mark(self) -> Any:
        if not self._on_cuda:
            return self._clock()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        if not self._on_cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000  # events count milliseconds


@dataclass(frozen=True, slots=True)
class Totals:
    """What a run has trained on since its first step; saved in checkpoints."""

    samples: int = 0
    tokens: int = 0
    trained_tokens: int = 0

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            self.samples + other.samples, self.tokens + other.tokens, self.trained_tokens + other.trained_tokens
        )


@dataclass(frozen=True, slots=True)
class Utilisation:
    """What MFU is measured by: the model's arithmetic and the peak of all devices together, in FLOP/s."""

    shape: ModelShape
    peak: float


@dataclass
class _Counts:
    """Host-side sums over the steps since the last line."""

    totals: Totals = Totals()
    capacity: int = 0
    padding: int = 0
    truncated: int = 0
    flops: float = 0.0


class StepWindow:
    """The steps since the last line of metrics: `add` each without waiting for the device, `fetch` them as one line.

    A line holds, of the steps since the last one:
    `loss`, the mean weighted by the steps' denominators; `lr`, the last step's; `nonfinite_steps`, a count; every
    other statistic of the trainer averaged by its weight (`grad_norm`, `accuracy`, `loss/<source>`, ...) and absent
    where that weight is 0; `samples`, `tokens` (no padding), `trained_tokens`, of both also each source's as
    `tokens/<source>` and `trained_tokens/<source>`; `truncated` rows; `packing_fill`, the share of the
    micro-batches' budget that tokens took; `padding_share`, of the slots computed those that held no token;
    `tokens_per_second` and `mfu`, over the time not spent in save and evaluate; `time/<name>` in seconds;
    `memory/...` in GiB, which `memory` tells. `total_samples`, `total_tokens` and `total_trained_tokens` are of the
    whole run.
    """

    def __init__(
        self,
        stopwatch: Stopwatch,
        totals: Totals | None = None,
        utilisation: Utilisation | None = None,
        memory: Callable[[], dict[str, float]] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.totals = totals or Totals()
        self._stopwatch = stopwatch
        self._utilisation = utilisation
        self._memory = memory or (lambda: memory_of("cpu"))
        self._clock = clock
        self._begin()

    def _begin(self) -> None:
        self._stats: Stats = {}
        self._source_tokens: dict[str, int] = defaultdict(int)
        self._source_trained: dict[str, int] = defaultdict(int)
        self._counts = _Counts()
        self._since = self._clock()

    def add(self, inputs: StepInput, stats: Stats) -> None:
        """Count one finished step."""
        for name, value in stats.items():
            weight = inputs.denominator if name == "loss" else value.weight
            one = Weighted(_as_double(value.sum), _as_double(weight))
            self._stats[name] = one if name == "lr" or name not in self._stats else self._stats[name] + one
        step = Totals(inputs.num_samples, inputs.num_tokens, inputs.num_trained_tokens)
        self.totals += step
        counts = self._counts
        counts.totals += step
        counts.capacity += inputs.capacity
        counts.padding += inputs.num_padding
        for sample in inputs.samples:
            self._source_tokens[sample.source] += len(sample.tokens)
            self._source_trained[sample.source] += sample.num_trained
            counts.truncated += sample.status == Status.TRUNCATED
        if self._utilisation:
            lengths = [len(sample.tokens) for sample in inputs.samples]
            counts.flops += step_flops(self._utilisation.shape, lengths, inputs.num_trained_tokens)

    def fetch(self, step: int) -> Line:
        """The line of the steps added since the last call, ending with `step`; this alone waits for the device."""
        stats = _means(self._stats)
        seconds = self._clock() - self._since
        times = self._stopwatch.take()
        in_steps = max(seconds - times.get("save", 0.0) - times.get("evaluate", 0.0), 1e-9)
        counts, totals = self._counts, self.totals
        line: Line = {
            "step": step,
            **stats,
            "samples": counts.totals.samples,
            "tokens": counts.totals.tokens,
            "trained_tokens": counts.totals.trained_tokens,
            "total_samples": totals.samples,
            "total_tokens": totals.tokens,
            "total_trained_tokens": totals.trained_tokens,
            "tokens_per_second": counts.totals.tokens / in_steps,
            "packing_fill": counts.totals.tokens / counts.capacity,
            "padding_share": counts.padding / (counts.totals.tokens + counts.padding),
            "truncated": counts.truncated,
            **{f"tokens/{source}": tokens for source, tokens in sorted(self._source_tokens.items())},
            **{f"trained_tokens/{source}": tokens for source, tokens in sorted(self._source_trained.items())},
            **{f"time/{name}": value for name, value in times.items()},
            **self._memory(),
        }
        if self._utilisation:
            line["mfu"] = counts.flops / in_steps / self._utilisation.peak
        self._begin()
        return line


def _as_double(value: Any) -> Any:
    """In float64 where the value lies, so that sums over many steps stay exact."""
    return value.detach().double() if hasattr(value, "detach") else float(value)


def fetched(stats: Stats) -> dict[str, tuple[float, float]]:
    """Sums and weights as numbers by name, all tensors of one device brought over in one transfer."""
    flat = [_as_double(part) for value in stats.values() for part in (value.sum, value.weight)]
    by_device: dict[Any, list[int]] = defaultdict(list)
    for index, part in enumerate(flat):
        if hasattr(part, "device"):
            by_device[part.device].append(index)
    for indices in by_device.values():
        import torch

        for index, number in zip(indices, torch.stack([flat[i] for i in indices]).tolist(), strict=True):
            flat[index] = number
    return dict(zip(stats, zip(flat[0::2], flat[1::2], strict=True), strict=True))


def _means(stats: Stats) -> dict[str, float]:
    """By name, without those whose weight is 0; nonfinite_steps stays a count."""
    return {
        name: total if name == "nonfinite_steps" else total / weight
        for name, (total, weight) in fetched(stats).items()
        if weight != 0
    }


def memory_of(device_type: str) -> dict[str, float]:
    """Memory in GiB: on CUDA what tensors hold now and held at most since the last call; on a CPU the process's
    resident set, where /proc tells it."""
    if device_type == "cuda":
        import torch

        allocated, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return {"memory/allocated_gib": allocated / GIB, "memory/peak_gib": peak / GIB}
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return {}
    resident_pages = int(statm.read_text().split()[1])
    return {"memory/rss_gib": resident_pages * os.sysconf("SC_PAGE_SIZE") / GIB}
