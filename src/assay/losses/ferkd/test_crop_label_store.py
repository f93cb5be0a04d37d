from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from assay.data import CropLabelStore, random_crops
from assay.losses import compress_soft_labels, recover_soft_labels

R, C = 6, 12
EXACT = {"rtol": 0.0, "atol": 0.0}
KINDS = ("hard", "smoothing", "marginal_smoothing_k5", "marginal_smoothing_k10", "marginal_renorm", "full")


def crops(seed=0, count=1, classes=C):
    draw = torch.Generator().manual_seed(seed)
    boxes, flips = random_crops(count * R, generator=draw)
    probs = F.softmax(2 * torch.randn(count, R, classes, generator=draw), -1)
    parts = boxes.view(count, R, 4), flips.view(count, R), probs
    return parts if count > 1 else tuple(part[0] for part in parts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_is_written_is_read(tmp_path, kind, dtype):
    store = CropLabelStore(tmp_path / "labels", R, kind, dtype)
    boxes, flips, probs = crops()
    store.write(3, boxes, flips, probs)
    found = store.read(3)
    torch.testing.assert_close((found.boxes, found.flips), (boxes, flips), **EXACT)
    expected = recover_soft_labels(compress_soft_labels(probs, kind), kind, C)
    close = 1e-7 if dtype == torch.float32 else 1e-3
    torch.testing.assert_close(found.labels, expected, rtol=0, atol=close)
    torch.testing.assert_close(found.labels.sum(-1), torch.ones(R), rtol=0, atol=2e-6)
    again = recover_soft_labels(store.read(3, recover=False).labels, kind, C)
    torch.testing.assert_close(again, found.labels, **EXACT)


def test_float64_is_kept_whole(tmp_path):
    store = CropLabelStore(tmp_path, R, "full", torch.float64)
    boxes, flips, probs = crops()
    store.write(0, boxes, flips, probs.double())
    torch.testing.assert_close(store.read(0).labels, probs.double(), **EXACT)


def test_the_largest_values_are_kept_to_half_precision(tmp_path):
    store = CropLabelStore(tmp_path, R)
    boxes, flips, probs = crops()
    store.write(0, boxes, flips, probs)
    top = probs.topk(5, -1)
    torch.testing.assert_close(store.read(0).labels.gather(1, top.indices), top.values, rtol=2**-11, atol=1e-7)


def test_classes_are_whole_numbers_where_half_precision_has_none(tmp_path):
    for classes in (5000, 40_000):
        store = CropLabelStore(tmp_path / str(classes), R)
        boxes, flips, probs = crops(classes=classes)
        store.write(0, boxes, flips, probs)
        assert torch.equal(store.read(0).labels.argmax(1), probs.argmax(1))


def test_n_crops_are_drawn_without_repetition_by_the_generator(tmp_path):
    store = CropLabelStore(tmp_path, R)
    written = crops(count=4)
    store.write([5, 0, 2, 9], *written)
    seen = set()
    for seed in range(60):
        one, two = (store.read(2, 4, generator=torch.Generator().manual_seed(seed)) for _ in range(2))
        torch.testing.assert_close(one, two, **EXACT)
        places = [int((written[0][2] == box).all(1).nonzero()) for box in one.boxes]
        assert len(set(places)) == 4
        torch.testing.assert_close(one.flips, written[1][2][places], **EXACT)
        torch.testing.assert_close(one.labels, store.read(2).labels[places], **EXACT)
        seen.add(tuple(places))
    assert len(seen) > 40
    torch.manual_seed(0)
    chosen = store.read(2, 3)
    torch.manual_seed(0)
    torch.testing.assert_close(store.read(2, 3), chosen, **EXACT)


def test_several_images_at_once(tmp_path):
    one, many = CropLabelStore(tmp_path / "one", R), CropLabelStore(tmp_path / "many", R)
    boxes, flips, probs = crops(count=3)
    for k, image in enumerate((4, 1, 7)):
        one.write(image, boxes[k], flips[k], probs[k])
    many.write(torch.tensor([4, 1, 7]), boxes, flips, probs)
    assert (tmp_path / "one/crops.bin").read_bytes() == (tmp_path / "many/crops.bin").read_bytes()
    found = one.read(torch.tensor([7, 7, 4]))
    assert found.boxes.shape == (3, R, 4) and found.labels.shape == (3, R, C)
    torch.testing.assert_close(found.boxes, boxes[[2, 2, 0]], **EXACT)
    drawn = many.read([1, 4], 2)
    assert drawn.boxes.shape == (2, 2, 4) and drawn.flips.shape == (2, 2) and drawn.labels.shape == (2, 2, C)
    assert many.read([1], 2, recover=False).labels.shape == (1, 2, 2, 5)


def test_writing_goes_on_where_it_stopped(tmp_path):
    first = CropLabelStore(tmp_path, R)
    first.write(0, *crops(0))
    first.write(2, *crops(2))
    del first
    again = CropLabelStore(tmp_path, R)
    assert again.written.tolist() == [0, 2] and len(again) == 2
    assert np.int64(2) in again and "2" not in again and -1 not in again
    todo = [k for k in range(4) if k not in again]
    assert todo == [1, 3]
    for k in todo:
        again.write(k, *crops(k))
    again.write(2, *crops(7))  # replaces
    again.flush()
    whole = CropLabelStore(tmp_path, R)
    for k, seed in ((0, 0), (1, 1), (2, 7), (3, 3)):
        torch.testing.assert_close(whole.read(k).boxes, crops(seed)[0], **EXACT)


def test_an_image_half_written_counts_as_not_written(tmp_path):
    store = CropLabelStore(tmp_path, R)
    store.write([0, 1], *crops(count=2))
    (tmp_path / "written.bin").write_bytes(b"\1\0")  # as a process leaves it that dies before the flag
    again = CropLabelStore(tmp_path, R)
    assert 1 not in again and 0 in again
    with pytest.raises(ValueError, match="image_id = 1 is out of range: its crops were never written"):
        again.read([0, 1])
    (tmp_path / "crops.bin").write_bytes((tmp_path / "crops.bin").read_bytes()[:-1])  # or in the middle of growing
    assert CropLabelStore(tmp_path, R).written.tolist() == [0]


def test_a_reader_sees_what_is_written_later(tmp_path):
    reader, writer = CropLabelStore(tmp_path, R), CropLabelStore(tmp_path, R)
    with pytest.raises(ValueError, match=r"image_id = 0 .* never written"):
        reader.read(0)
    for k in (0, 5, 3):
        writer.write(k, *crops(k))
        torch.testing.assert_close(reader.read(k).boxes, crops(k)[0], **EXACT)


def test_two_objects_that_write_in_turns(tmp_path):
    one, other = CropLabelStore(tmp_path, R), CropLabelStore(tmp_path, R)
    one.write(0, *crops(0))
    with pytest.raises(ValueError, match=r"probs.shape = \(1, 6, 13\)"):
        other.write(1, *crops(1, classes=13))
    other.write(1, *crops(1))
    one.write(2, *crops(2))
    for k in range(3):
        torch.testing.assert_close(CropLabelStore(tmp_path, R).read(k).boxes, crops(k)[0], **EXACT)


class Labelled(Dataset):
    def __init__(self, store):
        self.store = store

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return (*self.store.read(index, 2), index)


def test_it_travels_to_workers(tmp_path):
    store = CropLabelStore(tmp_path, R)
    store.write(range(4), *crops(count=4))
    torch.testing.assert_close(pickle.loads(pickle.dumps(store)).read(2), store.read(2), **EXACT)
    assert len(pickle.dumps(store)) < 2000  # by its path, not by its contents
    loader = DataLoader(Labelled(store), batch_size=2, num_workers=1, multiprocessing_context="spawn")
    boxes, flips, labels, index = next(iter(loader))
    assert boxes.shape == (2, 2, 4) and flips.shape == (2, 2) and labels.shape == (2, 2, C) and index.tolist() == [0, 1]


def test_the_files_are_as_documented(tmp_path):
    CropLabelStore(tmp_path, R).write([1, 0], *crops(count=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["crops.bin", "header.json", "written.bin"]
    header = json.loads((tmp_path / "header.json").read_text())
    crop = np.dtype([(name, kind, tuple(shape)) for name, kind, shape in header["crop"]])
    assert crop.itemsize == 16 + 1 + 5 * 2 + 5 * 2 and header["num_classes"] == C
    raw = np.memmap(tmp_path / "crops.bin", crop, "r").reshape(-1, R)
    boxes, flips, probs = crops(count=2)
    np.testing.assert_array_equal(raw["box"][0], boxes[1])
    np.testing.assert_array_equal(raw["flip"][1] != 0, flips[0])
    np.testing.assert_array_equal(raw["classes"][0], probs[1].topk(5, -1).indices)
    assert (tmp_path / "written.bin").read_bytes() == b"\1\1"


# --- wrong use


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_crops": 0}, "num_crops = 0 is out of range: an integer >= 1"),
        ({"label": "top5"}, "kind = 'top5' is out of range"),
        ({"dtype": torch.int8}, "dtype = torch.int8"),
        ({"num_crops": R + 1}, f"num_crops = {R + 1} is out of range: {R}, as .*header.json has it"),
        ({"label": "full"}, "label = 'full' is out of range: 'marginal_smoothing_k5'"),
        ({"dtype": torch.float32}, "dtype = 'float32' is out of range: 'float16'"),
    ],
)
def test_a_store_is_what_it_was_made_as(tmp_path, options, message):
    CropLabelStore(tmp_path, R).write(0, *crops())
    with pytest.raises(ValueError, match=message):
        CropLabelStore(tmp_path, **{"num_crops": R, **options})


def test_other_files_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"path = .* is out of range: a folder"):
        CropLabelStore(tmp_path / "file", R)
    for text in ("{", "[]", "{}", '{"num_classes": "many"}'):
        (tmp_path / "header.json").write_text(text)
        with pytest.raises(ValueError, match="is no header of a CropLabelStore"):
            CropLabelStore(tmp_path, R)
    (tmp_path / "header.json").write_text('{"num_classes": 3, "format": "another"}')
    with pytest.raises(ValueError, match=r"format = 'assay\.CropLabelStore' is out of range: 'another'"):
        CropLabelStore(tmp_path, R)


def changed(place, value):
    parts = list(crops())
    parts[place] = value(parts[place].clone())
    return parts


@pytest.mark.parametrize(
    ("image_id", "parts", "message"),
    [
        (-1, crops(), "image_id = -1 is out of range"),
        (0.5, crops(), "image_id = 0.5"),
        ([0, 0], crops(count=2), r"image_id = \[0, 0\] is out of range: different images"),
        ([], crops(), r"image_id = \[\]"),
        (0, changed(0, lambda boxes: boxes[1:]), r"boxes.shape = \(1, 5, 4\) is out of range: \(1, 6, 4\)"),
        (0, changed(0, lambda boxes: boxes + 1), "boxes = .* is out of range: .* inside"),
        (0, changed(0, lambda boxes: boxes - 1), "boxes = "),
        (0, changed(0, lambda boxes: boxes * torch.tensor([1, 1, 0, 1])), "h and w above 0"),
        (0, changed(0, lambda boxes: boxes * torch.nan), "boxes = "),
        (0, changed(1, lambda flips: flips[1:]), r"flips.shape = \(1, 5\)"),
        (0, changed(2, lambda probs: probs[:, 1:]), r"probs.shape = \(1, 6, 11\) .* \(1, 6, 12\)"),
        (0, changed(2, lambda probs: probs[:, 0]), r"probs.shape = \(1, 6\)"),
        (0, changed(2, lambda probs: probs.long()), "floating point"),
        (0, changed(2, lambda probs: 2 * probs), "probs is out of range: .* sum to 1"),
        (0, changed(2, lambda probs: probs.log()), "probs is out of range"),
        (0, changed(2, lambda probs: probs * torch.nan), "probs is out of range"),
    ],
)
def test_crops_that_do_not_fit_are_refused_and_nothing_is_written(tmp_path, image_id, parts, message):
    store = CropLabelStore(tmp_path, R)
    store.write(8, *crops())
    before = (tmp_path / "crops.bin").read_bytes()
    with pytest.raises(ValueError, match=message):
        store.write(image_id, *parts)
    assert (tmp_path / "crops.bin").read_bytes() == before and store.written.tolist() == [8]


@pytest.mark.parametrize(
    ("image_id", "n", "message"),
    [
        (0, 0, f"n = 0 is out of range: None or an integer in .1, {R}."),
        (0, R + 1, f"n = {R + 1}"),
        (0, 1.5, "n = 1.5"),
        (1, 1, "image_id = 1 is out of range"),
        (99, 1, "image_id = 99 is out of range"),
        ("0", 1, "image_id = '0'"),
    ],
)
def test_what_is_not_there_is_not_read(tmp_path, image_id, n, message):
    store = CropLabelStore(tmp_path, R)
    store.write([0, 2], *crops(count=2))
    with pytest.raises(ValueError, match=message):
        store.read(image_id, n)


def test_a_single_class_makes_no_store(tmp_path):
    boxes, flips, _ = crops()
    with pytest.raises(ValueError, match=r"probs.shape = \(1, 6, 1\)"):
        CropLabelStore(tmp_path / "new", R).write(0, boxes, flips, torch.ones(R, 1))
    assert not (tmp_path / "new").exists()
