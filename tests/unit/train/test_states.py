"""Rounding that is right on average, noise that is a function of its key, and codes that keep what they must."""

from __future__ import annotations

import pytest
import torch

from burnish.train.states import (
    Coded,
    FloatStore,
    Int8Store,
    Store,
    dynamic_code,
    random_bits,
    round_to_bf16,
    stream_key,
    take_noise,
)

CPU = torch.device("cpu")
TRUE, FALSE = torch.tensor(True), torch.tensor(False)


def noise(num_values: int, *parts: object, start: int = 0, draw: int = 0) -> torch.Tensor:
    return take_noise(random_bits(torch.tensor(stream_key(*parts)), start, start + num_values), draw)


def test_noise_is_uniform_and_its_draws_and_streams_are_unrelated():
    columns = [noise(2**18, "a", draw=draw) for draw in range(3)] + [noise(2**18, "b"), noise(2**18, "a", start=1)]
    series = torch.stack(columns).double() / 65536
    assert series.min() >= 0
    assert series.max() < 1
    for values in series:
        counts = torch.histc(values, 64, 0, 1)
        assert float(((counts - 4096) ** 2 / 4096).sum()) < 120  # chi-squared, 63 degrees of freedom
    correlation = torch.corrcoef(series) - torch.eye(len(series))
    assert float(correlation.abs().max()) < 0.01  # five deviations of 2^18 samples


def splitmix64(key: int, position: int) -> int:
    """The generator as published, on Python's integers."""
    bits = (key + position * 0x9E3779B97F4A7C15) % 2**64
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
    return bits ^ bits >> 31


def test_noise_is_splitmix64_of_key_and_position_alone():
    assert torch.equal(noise(100, 7)[40:], noise(60, 7, start=40))
    expected = [splitmix64(stream_key(7), position) >> 48 for position in range(1000)]
    assert noise(1000, 7).tolist() == expected


def test_bf16_rounding_takes_a_neighbour_and_is_right_on_average():
    values = torch.tensor([1.0 + 2**-10, -3.3, 1e-30, 65504.0]).repeat_interleave(2**16)
    rounded = round_to_bf16(values, noise(len(values), 1)).double()
    spacing = values.double().abs().log2().floor().sub(7).exp2()
    assert bool(((rounded - values.double()).abs() < spacing).all())
    error = ((rounded - values.double()) / spacing).view(4, -1).mean(1)
    assert float(error.abs().max()) < 0.01
    exact = torch.tensor([0.0, -0.5, 3.0])
    assert torch.equal(round_to_bf16(exact, torch.full((3,), 65535, dtype=torch.int32)).float(), exact)


def test_the_dynamic_code_spans_seven_decades_of_either_sign():
    signed, unsigned = dynamic_code(True, CPU), dynamic_code(False, CPU)
    assert len(signed) <= 256
    assert len(unsigned) <= 256
    assert bool((signed.diff() > 0).all())
    assert bool((unsigned.diff() > 0).all())
    torch.testing.assert_close(signed, -signed.flip(0), rtol=0, atol=0)
    assert 0 in signed
    assert unsigned.min() == pytest.approx(5.5e-7)
    assert signed.max() == unsigned.max() == 1


@pytest.mark.parametrize("signed", [True, False])
def test_int8_is_right_on_average_and_exact_for_the_largest_of_a_block(signed: bool):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(700, generator=generator) * torch.logspace(-3, 3, 700)
    values = values if signed else values.square()
    store, total = Int8Store.zeros(700, signed, CPU), torch.zeros(700, dtype=torch.float64)
    for repeat in range(100):
        store.write(0, values, noise(700, repeat), TRUE)
        total += store.read(0, 700, torch.float64)
    largest = torch.cat([b.abs().amax().repeat(len(b)) for b in values.split(256)]).double()
    assert float(((total / 100 - values).abs() / largest).max()) < 4e-3
    for stretch, decoded in zip(values.split(256), store.read(0, 700, torch.float32).split(256), strict=True):
        assert decoded[stretch.abs().argmax()] == pytest.approx(float(stretch[stretch.abs().argmax()]), rel=1e-6)


def test_int8_keeps_zero_and_never_turns_a_second_moment_into_it():
    signed, unsigned = Int8Store.zeros(512, True, CPU), Int8Store.zeros(512, False, CPU)
    values = torch.zeros(512)
    values[3] = 1.0
    values[4] = 1e-25
    for store in (signed, unsigned):
        store.write(0, values, noise(512, 0), TRUE)
    assert signed.read(0, 512, torch.float32).count_nonzero() == 1
    decoded = unsigned.read(0, 512, torch.float32)
    assert float(decoded[4]) > 0
    assert not decoded[256:].any()  # a block of zeros


def kept(store: Store) -> list[torch.Tensor]:
    """Copies of the memory of a store."""
    tensors = [store.tensor] if isinstance(store, FloatStore) else [store.codes_BK, store.scales_B]  # pyright: ignore
    return [tensor.clone() for tensor in tensors]


@pytest.mark.parametrize(
    "store",
    [
        FloatStore(torch.ones(600)),
        FloatStore(torch.ones(600, dtype=torch.bfloat16)),
        FloatStore(torch.ones(30, 20, dtype=torch.float64)),
        Int8Store.zeros(600, True, CPU),
        Int8Store.zeros(600, False, CPU),
    ],
)
def test_a_refused_write_changes_nothing_and_reads_are_copies(store: Store):
    store.write(0, torch.rand(600), noise(600, 0), TRUE)
    before = kept(store)
    store.write(256, torch.full((344,), torch.nan), noise(344, 0), FALSE)
    store.read(0, 600, torch.float32).zero_()
    assert all(torch.equal(left, right) for left, right in zip(kept(store), before, strict=True))


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_under_every_scale_comes_back_from_what_it_stands_for(signed: bool):
    levels = dynamic_code(signed, CPU)
    mantissas = torch.linspace(1, 2, 9)[:-1] + torch.finfo(torch.float32).eps * 3
    scales_B = (mantissas[:, None].double() * torch.exp2(torch.arange(-126, 128).double())).float().flatten()
    codes_BK = torch.arange(256, dtype=torch.uint8).clamp_max(len(levels) - 1).repeat(len(scales_B), 1)
    store = Int8Store(codes_BK.clone(), scales_B.clone(), signed)
    values = store.decode(0, codes_BK.numel())
    again = Int8Store.zeros(codes_BK.numel(), signed, CPU)
    again.encode(0, values)
    assert torch.equal(again.scales_B, scales_B)
    assert torch.equal(again.codes_BK, codes_BK)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("magnitude", [1.0, 1e-36, 1e-39, 1e36])
def test_what_was_written_comes_back_to_the_bit(signed: bool, magnitude: float):
    """The largest of a block always takes the outermost code, whatever the noise, and so tells its scale."""
    parameter = torch.empty(3, 233)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(699, generator=generator, dtype=torch.float64) * torch.logspace(-9, 0, 699) * magnitude
    store, again = (Int8Store.zeros(699, signed, CPU) for _ in range(2))
    for repeat in range(20):
        store.write(0, values if signed else values.square(), noise(699, repeat), TRUE)
        (suffix, saved), (_, resumed) = (next(iter(each.saved(parameter).items())) for each in (store, again))
        assert suffix == ("" if signed else ".root")
        assert isinstance(saved, Coded)
        assert isinstance(resumed, Coded)
        assert saved.values().shape == parameter.shape
        resumed.take(saved.values())
        assert all(torch.equal(left, right) for left, right in zip(kept(store), kept(again), strict=True))
