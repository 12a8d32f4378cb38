"""The attention kernels against the formula, written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from burnish.model.attention import attend_sdpa, attend_varlen, choose_attention
from burnish.types import Documents, UserError

LENGTHS = (6, 1, 17, 9)


def documents(lengths: tuple[int, ...] = LENGTHS) -> Documents:
    return Documents(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), lengths)


def inputs(dtype: torch.dtype, num_kv_heads: int = 2, device: str = "cpu") -> list[Tensor]:
    """Queries of 4 heads, keys and values, head dimension 16."""
    generator = torch.Generator().manual_seed(0)
    sizes = (4, num_kv_heads, num_kv_heads)
    drawn = [torch.randn(sum(LENGTHS), heads, 16, generator=generator, dtype=torch.float64) for heads in sizes]
    return [x.to(device, dtype).requires_grad_() for x in drawn]


def formula(
    q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    group = q_THE.shape[1] // k_TGE.shape[1]
    k_THE, v_THE = k_TGE.repeat_interleave(group, 1), v_TGE.repeat_interleave(group, 1)
    scores_HTT = torch.einsum("ihe,jhe->hij", q_THE, k_THE) * scale
    if softcap is not None:
        scores_HTT = softcap * torch.tanh(scores_HTT / softcap)
    document_T = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    distance_TT = torch.arange(len(q_THE))[:, None] - torch.arange(len(q_THE))
    visible_TT = (document_T[:, None] == document_T) & (distance_TT >= 0)
    if window is not None:
        visible_TT &= distance_TT < window
    return torch.einsum("hij,jhe->ihe", scores_HTT.masked_fill(~visible_TT, -torch.inf).softmax(-1), v_THE)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_sdpa_is_the_formula(num_kv_heads: int, window: int | None, softcap: float | None):
    tensors = inputs(torch.float64, num_kv_heads)
    output = attend_sdpa(*tensors, documents(), 0.7, window, softcap)
    expected = formula(*tensors, 0.7, window, softcap)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients, references = (torch.autograd.grad((x * weight).sum(), tensors) for x in (output, expected))
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_sdpa_keeps_the_type_of_its_inputs(dtype: torch.dtype, tolerance: float, softcap: float | None):
    output = attend_sdpa(*inputs(dtype), documents(), 0.7, None, softcap)
    assert output.dtype == dtype
    expected = formula(*inputs(torch.float64), 0.7, None, softcap)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=tolerance)


def test_documents_must_fill_the_pack():
    with pytest.raises(RuntimeError, match="split"):
        attend_sdpa(*inputs(torch.float32), documents((6, 1)), 0.7)


def test_auto_takes_sdpa_on_the_cpu():
    assert choose_attention("auto", "cpu", torch.bfloat16).kernel is attend_sdpa
    assert choose_attention("sdpa", "cuda", torch.bfloat16).name == "sdpa"
    assert choose_attention("auto", "cuda", torch.float32).name == "sdpa"


@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [
        ("cpu", torch.bfloat16, "varlen needs a CUDA device, and the model is on cpu; set it to sdpa or auto"),
        ("cuda", torch.float32, "varlen computes in bf16 or fp16, and precision.compute is float32"),
    ],
)
def test_varlen_where_it_cannot_run_is_an_error(device: str, dtype: torch.dtype, message: str):
    with pytest.raises(UserError, match=message):
        choose_attention("varlen", device, dtype)


def test_varlen_has_no_softcap():
    with pytest.raises(UserError, match="no softcap"):
        attend_varlen(*inputs(torch.bfloat16), documents(), 0.7, softcap=30.0)


def test_varlen_arguments_mean_the_same_mask(monkeypatch: pytest.MonkeyPatch):
    """Without a GPU the call itself cannot run; its arguments, read by torch's documentation, must give our mask."""
    seen = {}

    def record(query: Tensor, *_: object, **keywords: object) -> Tensor:
        seen.update(keywords)
        return query

    monkeypatch.setattr("burnish.model.attention.varlen_attn", record)
    attend_varlen(*inputs(torch.bfloat16), documents(), 0.7)
    assert seen["window_size"] == (-1, 0), "torch's causal attention"
    assert seen["scale"] == 0.7
    attend_varlen(*inputs(torch.bfloat16), documents(), 0.7, window=5)
    assert seen["window_size"] == (4, 0), "torch counts tokens to the left, without the token itself"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 5])
def test_varlen_is_the_formula(window: int | None):
    tensors = inputs(torch.bfloat16, device="cuda")
    attention = choose_attention("varlen", "cuda", torch.bfloat16)
    packed = Documents(documents().cu_seqlens.cuda(), LENGTHS)
    output = attention.kernel(*tensors, packed, 0.7, window)
    expected = formula(*inputs(torch.float64), 0.7, window, None)
    torch.testing.assert_close(output.cpu().double(), expected, rtol=0, atol=3e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_sdpa_is_the_formula_on_cuda(dtype: torch.dtype, tolerance: float):
    packed = Documents(documents().cu_seqlens.cuda(), LENGTHS)
    output = attend_sdpa(*inputs(dtype, device="cuda"), packed, 0.7)
    expected = formula(*inputs(torch.float64), 0.7, None, None)
    torch.testing.assert_close(output.cpu().double(), expected, rtol=0, atol=tolerance)
