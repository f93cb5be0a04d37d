"""Noise as a tensor, in a file and on a dataset."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

from assay.data import IndexedDataset, Noise

N = 7


def noise():
    generator = torch.Generator().manual_seed(0)
    return Noise(torch.randint(-90, 91, (N, 3, 2, 2), generator=generator, dtype=torch.int8))


def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (N, 3, 2, 2), generator=generator, dtype=torch.uint8)


def test_it_is_a_tensor_and_what_is_computed_from_it_is_a_plain_one():
    own = noise()
    assert isinstance(own, torch.Tensor) and own.dtype == torch.int8 and own.shape == (N, 3, 2, 2) and len(own) == N
    assert own.max_abs == int(own.abs().max()) and isinstance(own.max_abs, int)
    assert type(own / 255) is type(own[0]) is torch.Tensor
    for same in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert type(same) is Noise and torch.equal(same, own)
    assert Noise(torch.zeros(0, 3, dtype=torch.int8)).max_abs == 0


def test_saved_and_loaded_without_code(tmp_path):
    own = noise()
    own.save(tmp_path / "noise.pt")
    assert torch.equal(Noise.load(tmp_path / "noise.pt"), own) and type(Noise.load(tmp_path / "noise.pt")) is Noise
    plain = torch.load(tmp_path / "noise.pt", weights_only=True)
    assert type(plain) is torch.Tensor and torch.equal(plain, own)
    torch.save(torch.zeros(3), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"values = torch.float32 \(3,\) is out of range: an int8 tensor"):
        Noise.load(tmp_path / "other.pt")
    torch.save({"call": print}, tmp_path / "code.pt")
    with pytest.raises(pickle.UnpicklingError):
        Noise.load(tmp_path / "code.pt")


def clipped(images, noise):
    """Image by image and entry by entry."""
    flat = [min(255, max(0, int(a) + int(b))) for a, b in zip(images.flatten(), noise.flatten(), strict=True)]
    return torch.tensor(flat, dtype=torch.uint8).view(images.shape)


def test_bytes_stay_bytes_and_fractions_stay_fractions():
    own, bytes_ = noise(), images()
    expected = clipped(bytes_, own)
    assert ((expected == 0) | (expected == 255)).any()
    labels = torch.arange(N)
    rows = [(image.numpy(), int(label)) for image, label in zip(bytes_, labels, strict=True)]
    for dataset in (TensorDataset(bytes_, labels), rows):
        protected = own.apply(dataset)
        assert torch.equal(torch.stack([protected[i][0] for i in range(N)]), expected)
        assert [int(protected[i][1]) for i in range(N)] == labels.tolist() and len(protected) == N
    for dtype in (torch.float32, torch.float64):
        protected = own.apply(TensorDataset(bytes_.to(dtype) / 255, labels))
        got = torch.stack([protected[i][0] for i in range(N)])
        torch.testing.assert_close(got, expected.to(dtype) / 255)
        assert torch.equal((255 * got).round().to(torch.uint8), expected)
    assert torch.equal(bytes_, images())


@pytest.mark.parametrize("workers", [0, 2])
def test_through_a_data_loader(workers):
    own, data = noise(), IndexedDataset(TensorDataset(images(), torch.arange(N)))
    expected = clipped(images(), own)
    loader = DataLoader(own.apply(data), batch_size=3, shuffle=True, num_workers=workers)
    seen = 0
    for x, y, index in loader:
        assert torch.equal(y, index) and torch.equal(x, expected[index]) and x.dtype == torch.uint8
        seen += len(x)
    assert seen == N
    part = Subset(own.apply(data), [4, 2])
    assert torch.equal(next(iter(DataLoader(part, batch_size=2)))[0], expected[[4, 2]])
    assert torch.equal(own.apply(data)[-1][0], expected[-1])
    with pytest.raises(IndexError):
        own.apply(data)[N]


def test_a_part_of_the_examples():
    own, data = noise(), TensorDataset(images(), torch.arange(N))
    protected = own.apply(data, indices=[5, 1, 1])
    assert protected.indices.tolist() == [1, 5]
    for i in range(N):
        assert torch.equal(protected[i][0], clipped(images()[i], own[i]) if i in (1, 5) else images()[i])
    for fraction, expected in ((0, 0), (0.4, 3), (0.5, 4), (1.0, 7)):
        drawn = [own.apply(data, fraction, generator=torch.Generator().manual_seed(2)).indices for _ in range(2)]
        assert (
            torch.equal(*drawn) and len(drawn[0].unique()) == expected and torch.equal(drawn[0], drawn[0].sort().values)
        )
    chosen = own.apply(data, indices=np.array([], dtype=np.int64))
    assert chosen.indices.numel() == 0


def test_the_transform_comes_after_the_noise():
    own, data = noise(), TensorDataset(images(), torch.arange(N))
    protected = own.apply(data, indices=[0], transform=lambda image: image.flip(-1))
    assert torch.equal(protected[0][0], clipped(images()[0], own[0]).flip(-1))
    assert torch.equal(protected[1][0], images()[1].flip(-1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda n, d: n.apply(Subset(d, [0])), "len.dataset. = 1 is out of range: 7"),
        (lambda n, d: n.apply(iter(d)), "not a map-style dataset"),
        (lambda n, d: n.apply(d, 1.1), r"fraction = 1.1 is out of range: \[0, 1\]"),
        (lambda n, d: n.apply(d, -0.1), "fraction = -0.1"),
        (lambda n, d: n.apply(d, True), "fraction = True"),
        (lambda n, d: n.apply(d, 0.5, [1]), "fraction = 0.5 is out of range: 1, where indices are given"),
        (lambda n, d: n.apply(d, indices=[7]), "indices reach from 7 to 7"),
        (lambda n, d: n.apply(d, indices=torch.ones(7, dtype=torch.bool)), "integer positions"),
        (lambda n, d: n.apply([x for x, _ in d])[0], "an example is .image, label, ...."),
        (lambda n, d: n.apply([("x", 0)] * N)[0], "yields a str as image"),
        (lambda n, d: n.apply([(x.long(), 0) for x, _ in d])[0], "images of torch.int64"),
        (
            lambda n, d: n.apply([(x[:1], 0) for x, _ in d])[0],
            r"images.shape = \(1, 2, 2\) is out of range: \(3, 2, 2\)",
        ),
        (lambda n, d: Noise(torch.zeros(3)), "values = torch.float32"),
        (lambda n, d: Noise(torch.full((3,), -128, dtype=torch.int8)), "values = -128"),
        (lambda n, d: Noise([1]), "values = list"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(noise(), TensorDataset(images(), torch.arange(N)))
