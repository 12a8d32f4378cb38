"""metrics.jsonl after a kill, and what a window of steps adds up to."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from burnish.observe.flops import ModelShape, step_flops
from burnish.observe.metrics import MetricsWriter, StepWindow, Stopwatch, Totals, Utilisation, cut, memory_of, read
from burnish.types import Batch, Documents, Sample, Status, StepInput, UserError, Weighted


def write_lines(path, steps):
    writer = MetricsWriter(path)
    for step in steps:
        writer.write({"step": step, "loss": 1.0 / (step + 1)})
    writer.close()


def test_lines_are_read_back_and_numbers_that_are_not_finite_become_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write({"step": 1, "loss": float("nan"), "loss/käse": 0.5})
    assert read(path) == [{"step": 1, "loss": None, "loss/käse": 0.5}], "a line is there before the writer is closed"
    writer.write({"step": 2, "loss": float("inf")})
    assert read(path)[1] == {"step": 2, "loss": None}
    assert all("NaN" not in line and "Infinity" not in line for line in path.read_text().splitlines())


@pytest.mark.parametrize("torn", [b"", b'{"step": 4, "lo', b'{"step": 4}', b"\x00\x00\x00", b'{"step": 4, "x": "\xc3'])
def test_cut_drops_lines_beyond_the_step_and_a_torn_last_line(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [0, 1, 2, 2, 3])
    path.write_bytes(path.read_bytes() + torn)
    assert [line["step"] for line in read(path)] == [0, 1, 2, 2, 3]
    cut(path, 2)
    write_lines(path, [3])
    assert [line["step"] for line in read(path)] == [0, 1, 2, 2, 3]
    assert len(path.read_bytes().splitlines()) == 5
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_cut_to_before_the_first_step_leaves_an_empty_file_and_a_missing_file_missing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    cut(path, 7)
    assert not path.exists()
    assert read(path) == []
    write_lines(path, [0, 1])
    cut(path, -1)
    assert path.read_bytes() == b""


def test_a_damaged_line_before_the_last_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2: .*mend or remove"):
        read(path)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"metrics.jsonl:2"):
        cut(path, 1)
    assert path.read_bytes() == before


def a_sample(length: int, source: str, status: Status = Status.COMPLETE) -> Sample:
    weights = np.ones(length, np.float32)
    weights[0] = 0
    return Sample(np.zeros(length, np.int32), weights, source=source, status=status)


def a_step(*samples: Sample, capacity: int = 100, padding: int = 0) -> StepInput:
    lengths = tuple(len(sample.tokens) for sample in samples)
    empty = torch.zeros(0)
    documents = Documents(torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32), lengths)
    sources = tuple(sorted({sample.source for sample in samples}))
    batch = Batch(empty, empty, documents, empty, empty, empty, empty, empty, sources, samples)
    trained = sum(sample.num_trained for sample in samples)
    return StepInput([[batch]], tuple(samples), float(trained), len(samples), sum(lengths), trained, capacity, padding)


class Clock:
    """A clock that is moved by hand, in seconds."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_a_window_averages_by_weights_and_counts_its_steps_and_the_run():
    window = StepWindow(Stopwatch(), Totals(1000, 20_000, 9_000))
    first = a_step(a_sample(10, "math"), a_sample(20, "chat", Status.TRUNCATED), capacity=64, padding=10)
    second = a_step(a_sample(30, "math"), capacity=64)
    window.add(
        first,
        {
            "loss": Weighted(torch.tensor(28 * 2.0), torch.tensor(28.0)),
            "loss/math": Weighted(torch.tensor(9 * 1.0), torch.tensor(9.0)),
            "loss/chat": Weighted(torch.tensor(19 * 4.0), torch.tensor(19.0)),
            "loss/code": Weighted(torch.tensor(0.0), torch.tensor(0.0)),
            "grad_norm": Weighted(torch.tensor(1.0), torch.tensor(1.0)),
            "lr": Weighted(torch.tensor(1e-5), torch.tensor(1.0)),
            "nonfinite_steps": Weighted(torch.tensor(1.0), torch.tensor(1.0)),
        },
    )
    window.add(
        second,
        {
            "loss": Weighted(torch.tensor(29 * 1.0), torch.tensor(29.0)),
            "loss/math": Weighted(torch.tensor(29 * 3.0), torch.tensor(29.0)),
            "grad_norm": Weighted(torch.tensor(3.0), torch.tensor(1.0)),
            "lr": Weighted(2e-5, 1),
            "nonfinite_steps": Weighted(torch.tensor(1.0), torch.tensor(1.0)),
        },
    )
    line = window.fetch(52)
    assert line["step"] == 52
    assert line["loss"] == pytest.approx((28 * 2 + 29 * 1) / 57)
    assert line["loss/math"] == pytest.approx((9 * 1 + 29 * 3) / 38)
    assert line["loss/chat"] == 4.0
    assert "loss/code" not in line, "no token of that source: no mean"
    assert line["grad_norm"] == 2.0
    assert line["lr"] == 2e-5
    assert line["nonfinite_steps"] == 2
    counted = {k: line[k] for k in ("samples", "tokens", "trained_tokens", "tokens/math", "tokens/chat")}
    assert counted == {"samples": 3, "tokens": 60, "trained_tokens": 57, "tokens/math": 40, "tokens/chat": 20}
    totals = {k: line[k] for k in ("total_samples", "total_tokens", "total_trained_tokens")}
    assert totals == {"total_samples": 1003, "total_tokens": 20_060, "total_trained_tokens": 9_057}
    assert all(type(value) is int for value in (counted | totals).values())
    assert line["truncated"] == 1
    assert line["packing_fill"] == pytest.approx(60 / 128)
    assert line["padding_share"] == pytest.approx(10 / 70)
    assert line["memory/rss_gib"] > 0.05
    assert window.totals == Totals(1003, 20_060, 9_057)
    json.dumps(line, allow_nan=False)


def test_the_loss_is_weighted_by_the_steps_denominators():
    window = StepWindow(Stopwatch())
    for loss_sum, length in ((1.0, 3), (5.0, 11)):
        window.add(a_step(a_sample(length, "a")), {"loss": Weighted(loss_sum, 1.0)})
    assert window.fetch(2)["loss"] == pytest.approx(6.0 / (2 + 10))


def test_a_window_begins_anew_after_each_line():
    window = StepWindow(Stopwatch())
    for step, loss in ((1, 4.0), (2, 8.0)):
        window.add(a_step(a_sample(5, "a")), {"loss": Weighted(torch.tensor(loss * 4), torch.tensor(4.0))})
        line = window.fetch(step)
        assert (line["loss"], line["samples"], line["total_samples"]) == (loss, 1, step)


def test_sums_of_many_steps_do_not_round():
    window = StepWindow(Stopwatch())
    step = a_step(a_sample(2, "a"))
    for _ in range(2000):
        window.add(step, {"loss": Weighted(torch.tensor(0.1), torch.tensor(1.0))})
    assert window.fetch(2000)["loss"] == pytest.approx(float(np.float32(0.1)), rel=1e-12)


def test_steps_are_added_without_a_transfer_and_fetched_with_one(monkeypatch):
    reads = []

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._local_scalar_dense.default:
                reads.append("item")
            return function(*args, **(kwargs or {}))

    stacked = []
    stack = torch.stack
    monkeypatch.setattr(torch, "stack", lambda parts: stacked.append(len(parts)) or stack(parts))
    window = StepWindow(Stopwatch())
    with Watched():
        for _ in range(3):
            stats = {name: Weighted(torch.tensor(1.0), torch.tensor(1.0)) for name in ("accuracy", "entropy")}
            window.add(a_step(a_sample(5, "a")), stats)
        assert not stacked
        assert window.fetch(3)["accuracy"] == 1.0
    assert stacked == [4]
    assert not reads, "nothing was read value by value"


def test_rates_leave_out_saving_and_evaluating_and_the_parts_are_named():
    clock = Clock()
    watch = Stopwatch(clock=clock)
    shape = ModelShape(1000, 100, 2, 2, 8)
    window = StepWindow(watch, utilisation=Utilisation(shape, peak=1e6), clock=clock)
    for name, seconds in (("data_wait", 1.0), ("forward_backward", 6.0), ("forward_backward", 2.0), ("save", 5.0)):
        with watch(name):
            clock.now += seconds
    clock.now += 1.0
    with watch("evaluate"):
        clock.now += 30.0
    window.add(a_step(a_sample(50, "a"), a_sample(30, "a")), {})
    line = window.fetch(1)
    assert line["time/forward_backward"] == 8.0
    assert (line["time/data_wait"], line["time/save"], line["time/evaluate"]) == (1.0, 5.0, 30.0)
    assert line["tokens_per_second"] == 80 / 10
    assert line["mfu"] == pytest.approx(step_flops(shape, [50, 30], 78) / 10 / 1e6)
    clock.now += 4.0
    window.add(a_step(a_sample(20, "a")), {})
    line = window.fetch(2)
    assert line["tokens_per_second"] == 20 / 4
    assert "time/save" not in line


def test_a_stopwatch_counts_time_up_to_an_exception():
    clock = Clock()
    watch = Stopwatch(clock=clock)

    def fail():
        with watch("save"):
            clock.now += 2.0
            raise OSError

    with pytest.raises(OSError):  # noqa: PT011
        fail()
    assert watch.take() == {"save": 2.0}
    assert watch.take() == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_time_and_memory_are_the_devices():
    watch = Stopwatch("cuda")
    window = StepWindow(watch, memory=lambda: memory_of("cuda"))
    matrix = torch.ones(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    with watch("forward_backward"):
        for _ in range(200):
            matrix @ matrix
    window.add(a_step(a_sample(5, "a")), {"accuracy": Weighted(torch.tensor(1.0, device="cuda"), 2)})
    line = window.fetch(1)
    assert line["accuracy"] == 0.5
    assert line["time/forward_backward"] > 200 * 2 * 4096**3 / 2e15, "not the time it took to launch the kernels"
    assert line["memory/peak_gib"] >= line["memory/allocated_gib"] >= 4096**2 * 4 / 2**30
