"""Block-wise quantization against brute force, and what it promises of errors, blocks and signs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.compress._blockwise import codebook, copy_rounded_
from assay.compress.quant import QuantizedState, dequantize_blockwise, dynamic_map, quantize_blockwise

SIGNED, UNSIGNED = dynamic_map(True), dynamic_map(False)


def numbers(count: int = 20_000, seed: int = 0) -> torch.Tensor:
    """Numbers of all sizes that a map of seven decades can and cannot tell from 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator) * 10 ** (-9 * torch.rand(count, generator=generator))


def nearest(z: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """Brute force in float64; the lower one of two that are as near."""
    return torch.cat([(part.double()[:, None] - code.double()).abs().argmin(1) for part in z.split(1000)])


def test_maps_are_cells_of_decades():
    for signed, code in ((True, SIGNED), (False, UNSIGNED)):
        values = {0.0, 1.0}
        for i in range(7):
            n = 2**i if signed else 2 ** (i + 1)
            edges = torch.linspace(0.1, 1, n + 1, dtype=torch.float64) * 10.0 ** (i - 6)
            midpoints = ((edges[1:] + edges[:-1]) / 2).tolist()
            values |= {*midpoints, *(-m for m in midpoints)} if signed else set(midpoints)
        torch.testing.assert_close(code, torch.tensor(sorted(values), dtype=torch.float64).float(), rtol=0, atol=1e-7)
        assert len(code) == len(code.unique()) == 256 and code.dtype == torch.float32
    assert SIGNED[-2].item() == pytest.approx(0.99297, abs=1e-5) == -SIGNED[0].item()
    assert UNSIGNED[-2].item() == pytest.approx(0.99648, abs=1e-5)
    assert SIGNED[SIGNED > 0][0].item() == pytest.approx(0.55e-6)
    assert UNSIGNED[1:3].tolist() == pytest.approx([0.325e-6, 0.775e-6])


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_maps_of_other_bits_use_all_codes(signed, bits):
    for exponent_bits in range(1, bits):
        code = dynamic_map(signed, exponent_bits, bits)
        assert len(code) == 2**bits and code.max() == 1 and 0 in code
        assert (code.diff() > 0).all()
        assert (code.min() < 0) == signed


@pytest.mark.parametrize("code", [SIGNED, UNSIGNED, torch.linspace(-1, 1, 256), torch.tensor([-1.0, 0.2, 0.2001, 1])])
def test_codes_are_the_nearest(code):
    z = numbers()
    z = z / z.abs().max() if code[0] < 0 else z.abs() / z.abs().max()
    z = torch.cat([z, code, torch.tensor([1.0])])
    codes, absmax = quantize_blockwise(z, code, len(z))
    assert absmax.tolist() == [1.0]
    ours, best = ((z - code[x.long()]).abs() for x in (codes, nearest(z, code)))
    torch.testing.assert_close(ours, best, rtol=1e-5, atol=1e-9)  # at a midpoint either may be right


@pytest.mark.parametrize("keep_nonzero", [True, False])
@pytest.mark.parametrize("code", [SIGNED, UNSIGNED])
def test_looking_up_is_searching(code, keep_nonzero):
    book = codebook(code, keep_nonzero)
    assert book.first is not None
    at = book.thresholds
    around = [at, *(torch.nextafter(at, at + step) for step in (-1.0, 1.0)), torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0])]
    z = torch.cat([numbers(), *around])
    z = z if code[0] < 0 else z.abs()
    assert torch.equal(book.nearest(z), book._replace(first=None, bound=None).nearest(z))


def test_a_map_too_fine_for_the_tables_is_searched():
    fine = torch.tensor([0.0, 0.5, 0.5001, 0.5002, 1.0])
    assert codebook(fine).first is None
    assert quantize_blockwise(fine, fine)[0].tolist() == [0, 1, 2, 3, 4]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40), st.integers(1, 50))
def test_the_error_is_at_most_half_a_gap(values, block_size):
    x = torch.tensor(values)
    codes, absmax = quantize_blockwise(x, SIGNED, block_size)
    assert len(absmax) == -(-len(x) // block_size)
    back = dequantize_blockwise(codes, absmax, SIGNED, x.shape, torch.float32, block_size)
    scale = absmax.repeat_interleave(block_size)[: len(x)]
    z = x / torch.where(scale == 0, 1, scale)
    position = torch.searchsorted(SIGNED, z.clamp(SIGNED[0], 1)).clamp(1, 255)
    gap = SIGNED[position] - SIGNED[position - 1]
    assert ((x - back).abs() <= scale * (gap / 2 + (z < SIGNED[0]) * 0.0071 + 1e-6)).all()
    positive = (x == scale) & (x > 0)
    assert torch.equal(back[positive], x[positive])


def test_codes_of_what_codes_stand_for_are_the_same():
    for code in (SIGNED, UNSIGNED):
        absmax = torch.tensor([3.7])
        x = dequantize_blockwise(torch.arange(256, dtype=torch.uint8), absmax, code)
        codes, scales = quantize_blockwise(x, code)
        assert codes.tolist() == list(range(256)) and torch.equal(scales, absmax)


def test_blocks_do_not_know_of_each_other():
    x = torch.randn(4, 100)
    ones, scales = quantize_blockwise(x, SIGNED, 100)
    x[1] *= 1e6
    x[2] = 0
    x[3, 7] = 1e6
    others, other_scales = quantize_blockwise(x, SIGNED, 100)
    assert torch.equal(ones[0], others[0]) and scales[0] == other_scales[0]
    assert other_scales[2] == 0 and (others[2] == 127).all()
    back = dequantize_blockwise(others, other_scales, SIGNED, block_size=100)
    assert (back[2] == 0).all() and back.shape == x.shape


def test_blocks_follow_the_rows_whatever_the_layout():
    x = torch.randn(3, 4, 5, 6)
    ones, others = (
        quantize_blockwise(x, SIGNED, 64),
        quantize_blockwise(x.to(memory_format=torch.channels_last), SIGNED, 64),
    )
    assert torch.equal(ones.codes, others.codes) and torch.equal(ones.absmax, others.absmax)
    assert isinstance(ones, QuantizedState) and ones.nbytes == 360 + 4 * 6
    assert torch.equal(ones.absmax[-1], x.flatten()[320:].abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_go_through_float32(dtype):
    x = torch.randn(300).to(dtype)
    codes, absmax = quantize_blockwise(x, SIGNED)
    same = quantize_blockwise(x.float(), SIGNED)
    assert torch.equal(codes, same.codes) and absmax.dtype == torch.float32
    assert dequantize_blockwise(codes, absmax, SIGNED, (3, 100), dtype).dtype == dtype
    assert quantize_blockwise(x[:0], SIGNED).nbytes == 0


def test_nonzero_numbers_may_keep_their_sign():
    x = torch.tensor([1.0, 1e-9, -1e-9, 0.0, -0.0, 1e-30, -1e-30])
    assert quantize_blockwise(x, SIGNED)[0].tolist() == [255, 127, 127, 127, 127, 127, 127]
    assert quantize_blockwise(x, SIGNED, keep_nonzero=True)[0].tolist() == [255, 128, 126, 127, 127, 128, 126]
    assert quantize_blockwise(x.abs(), UNSIGNED, keep_nonzero=True)[0].tolist() == [255, 1, 1, 0, 0, 1, 1]
    with pytest.raises(ValueError, match="must hold 0"):
        quantize_blockwise(x, torch.tensor([-1.0, 1.0]), keep_nonzero=True)


@pytest.mark.parametrize("n", [1, 255, 256, 257, 300, 4096, 5000])
def test_the_block_size_is_found_where_it_is_a_power_of_two(n):
    x = torch.randn(n)
    for block_size in (1, 2, 16, 64, 256, 2048):
        codes, absmax = quantize_blockwise(x, SIGNED, block_size)
        told = dequantize_blockwise(codes, absmax, SIGNED, block_size=block_size)
        assert torch.equal(dequantize_blockwise(codes, absmax, SIGNED), told)
    with pytest.raises(ValueError, match="one scale per block"):
        dequantize_blockwise(codes, torch.ones(n + 1), SIGNED)


def test_random_rounding_is_right_on_average():
    book = codebook(SIGNED)
    z = torch.tensor([0.3, -0.3, 0.9, 1.0, 0.0, -0.00012, 1e-7, SIGNED[200].item(), -1.0])
    torch.manual_seed(0)
    drawn = torch.stack([book.random(z) for _ in range(4000)])
    expected = z.clamp(min=SIGNED[0].item())
    gaps = SIGNED[drawn.amax(0).long()] - SIGNED[drawn.amin(0).long()]
    assert ((book.values(drawn).mean(0) - expected).abs() <= 4 * gaps / 2 / 4000**0.5 + 1e-6).all()
    assert ((drawn.amax(0) - drawn.amin(0)) <= 1).all() and (gaps[:3] > 0).all()
    kept = torch.stack([codebook(SIGNED, True).random(z) for _ in range(50)])
    assert (kept[:, 6] == 128).all() and (kept[:, 4] == 127).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_writing_back_may_be_right_on_average(dtype):
    x = torch.tensor([1.001, -1.001, 0.9999, 3.3e-6, -1e-9, 0.0, 1.0, -700.3, float("nan")])
    torch.manual_seed(0)
    target = torch.zeros(len(x), dtype=dtype)
    drawn = []
    for _ in range(4000):
        copy_rounded_(target, x, True)
        drawn.append(target.float())
    drawn = torch.stack(drawn)
    copy_rounded_(target, x)
    torch.testing.assert_close(target, x.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert drawn[:, -1].isnan().all() and target[-1].isnan()
    spread = (drawn.amax(0) - drawn.amin(0))[:-1]
    assert ((drawn.mean(0) - x)[:-1].abs() <= 4 * spread / 2 / 4000**0.5 + 1e-9).all()
    assert (drawn.amin(0)[:-1] <= x[:-1]).all() and (drawn.amax(0)[:-1] >= x[:-1]).all()
    assert all(len(column.unique()) <= 2 for column in drawn.T[:-1])


@pytest.mark.parametrize("call, message", [
    (lambda: quantize_blockwise(torch.ones(3), SIGNED, 0), "block_size = 0 is out of range"),
    (lambda: quantize_blockwise(torch.ones(3), torch.zeros(257)), r"code.shape = \(257,\) is out of range"),
    (lambda: quantize_blockwise(torch.ones(3), torch.tensor([1.0, 0.0])), "code is out of range: .* ascending"),
    (lambda: dynamic_map(total_bits=9), "total_bits = 9 is out of range"),
    (lambda: dynamic_map(max_exponent_bits=8), "max_exponent_bits = 8 is out of range"),
])  # fmt: skip
def test_what_is_out_of_range_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
