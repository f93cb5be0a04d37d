from __future__ import annotations

import functools

import pytest
import torch
from scipy import sparse
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from assay.losses import (
    chunked_decoupled_softmax,
    chunked_soft_topk_loss,
    decoupled_softmax,
    encode_in_chunks,
    positives_from_csr,
    soft_topk_loss,
)
from assay.losses.decoupled_softmax.test_decoupled_softmax import Largest

N, C, D = 6, 23, 5
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
SIZES = [5, 23, 100]
CASES = [
    (chunked_decoupled_softmax, decoupled_softmax, {}),
    (chunked_decoupled_softmax, decoupled_softmax, {"temperature": 0.3, "normalize": "sum"}),
    (chunked_decoupled_softmax, decoupled_softmax, {"num_sampled_positives": 2}),
    (chunked_soft_topk_loss, soft_topk_loss, {"k": 2, "n_iter": 60}),
    (chunked_soft_topk_loss, soft_topk_loss, {"k": "num_pos", "temperature": 0.5, "alpha": 3.0, "n_iter": 60}),
    (chunked_soft_topk_loss, soft_topk_loss, {"k": 3, "n_iter": 60, "sample_positives": False, "normalize": "sum"}),
]


def embeddings(dtype=torch.float64):
    torch.manual_seed(0)
    return torch.randn(N, D, dtype=dtype), torch.randn(C, D, dtype=dtype)


def relevance():
    torch.manual_seed(1)
    indices = torch.stack([torch.randperm(C)[:5] for _ in range(N)])
    values = torch.rand(N, 5) * (torch.arange(5) < torch.tensor([5, 1, 0, 2, 3, 4])[:, None])
    return indices, values


def drawing(options):
    sampled = options.get("num_sampled_positives") or (
        isinstance(options.get("k"), int) and "sample" not in str(options)
    )
    return {"generator": torch.Generator().manual_seed(5)} if sampled else {}


def gradients(loss, queries, labels):
    inputs = queries.clone().requires_grad_(), labels.clone().requires_grad_()
    value = loss(*inputs)
    return value.detach(), *torch.autograd.grad(value.pow(2).sum(), inputs)


def named(case):
    """Functions by their names: their addresses differ between the processes that run the tests."""
    return f"{case[0].__name__}-{case[2]}"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES, ids=named)
def test_value_and_gradients_are_those_of_the_plain_loss(case, size):
    chunked, plain, options = case
    queries, labels = embeddings()
    target = relevance()
    for reduction in ("mean", "none"):
        settings = {**options, "weights": torch.rand(N, 5, dtype=torch.float64), "reduction": reduction}
        ones = gradients(
            lambda q, x, s=settings: chunked(q, x, target, chunk_size=size, **s, **drawing(options)), queries, labels
        )
        others = gradients(lambda q, x, s=settings: plain(q @ x.T, target, **s, **drawing(options)), queries, labels)
        for one, other in zip(ones, others, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("case", CASES[:2] + CASES[4:], ids=named)
def test_a_dense_target_is_turned_into_lists(case):
    chunked, plain, options = case
    queries, labels = embeddings()
    dense = torch.zeros(N, C).scatter_add(1, *relevance())
    for weights in (None, torch.rand(N, C, dtype=torch.float64)):
        for target in (dense, dense > 0):
            one = chunked(queries, labels, target, chunk_size=4, weights=weights, **options)
            torch.testing.assert_close(one, plain(queries @ labels.T, target, weights=weights, **options), **CLOSE)


def test_rows_without_positives_or_negatives():
    queries, labels = embeddings()
    for fill in (False, True):
        target = torch.full((N, C), fill)
        for chunked, plain in (
            (chunked_decoupled_softmax, decoupled_softmax),
            (
                functools.partial(chunked_soft_topk_loss, k="num_pos", n_iter=60),
                functools.partial(soft_topk_loss, k="num_pos", n_iter=60),
            ),
        ):
            ones = gradients(lambda q, x, f=chunked, t=target: f(q, x, t, chunk_size=4), queries, labels)
            others = gradients(lambda q, x, f=plain, t=target: f(q @ x.T, t), queries, labels)
            for one, other in zip(ones, others, strict=True):
                assert one.isfinite().all()
                torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("chunked", [chunked_decoupled_softmax, functools.partial(chunked_soft_topk_loss, k=5)])
def test_no_more_scores_than_a_chunk_are_held(chunked):
    queries, labels = torch.randn(64, 4, requires_grad=True), torch.randn(5000, 4, requires_grad=True)
    target = torch.randint(5000, (64, 6)), torch.ones(64, 6)
    with Largest() as largest:
        chunked(queries, labels, target, chunk_size=256).backward()
    assert largest.elements <= max(64 * 257, labels.numel()) < 64 * 5000 / 10
    assert queries.grad.isfinite().all() and labels.grad.isfinite().all()


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=named)
def test_half_precision_and_autocast_are_computed_in_single(case):
    chunked, plain, options = case
    queries, labels = (x.bfloat16() for x in embeddings())
    exact = plain(queries.double() @ labels.double().T, relevance(), **options, **drawing(options))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q, x = queries.float().requires_grad_(), labels.float().requires_grad_()
        value = chunked(q, x, relevance(), chunk_size=4, **options, **drawing(options))
        value.backward()
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)
    with_double = gradients(
        lambda q, x: chunked(q, x, relevance(), **options, **drawing(options)).sqrt(), queries.double(), labels.double()
    )
    torch.testing.assert_close(q.grad.double(), with_double[1], rtol=1e-4, atol=1e-5)
    half = queries.requires_grad_()
    value = chunked(half, labels, relevance(), **options, **drawing(options))
    value.backward()
    assert value.dtype == half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(value.double(), exact, rtol=0.01, atol=0.01)


def test_a_temperature_may_be_learned():
    queries, labels = embeddings()
    temperature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda t: chunked_decoupled_softmax(queries, labels, relevance(), temperature=t, chunk_size=4), temperature
    )


def test_arguments_out_of_range_are_named():
    queries, labels = embeddings()
    for arguments, options, message in [
        ((queries, labels[:, 1:], relevance()), {}, r"labels.shape = \(23, 4\) with queries of shape \(6, 5\)"),
        ((queries, labels, torch.ones(N, C - 1)), {}, r"target.shape = \(6, 22\) is out of range: \(6, 23\)"),
        ((queries, labels, torch.ones(N, C)), {"weights": torch.ones(N, 5)}, r"weights.shape = \(6, 5\)"),
        ((queries, labels, relevance()), {"weights": torch.ones(N, C)}, r"weights.shape = \(6, 23\)"),
        ((queries, labels[:9], relevance()), {}, r"target\[0\] = \d+ is out of range: \[0, 9\)"),
        ((queries, labels, relevance()), {"chunk_size": 0}, "chunk_size = 0 is out of range: an integer >= 1"),
        ((queries, labels, relevance()), {"temperature": -1}, "temperature = -1 is out of range"),
        ((queries, labels, relevance()), {"reduction": "max"}, "reduction = 'max' is out of range"),
    ]:
        for loss in (chunked_decoupled_softmax, chunked_soft_topk_loss):
            with pytest.raises(ValueError, match=message):
                loss(*arguments, **options)
    with pytest.raises(ValueError, match="k = 23 is out of range"):
        chunked_soft_topk_loss(queries, labels, relevance(), k=23)


# --- gradient caching on the label encoder


class Encoder(nn.Module):
    """With dropout, and a count of the activations that are alive."""

    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.out = nn.EmbeddingBag(50, 16), nn.Linear(16, 400), nn.Linear(400, D)
        self.activations, self.most, self.calls = [], 0, 0

    def forward(self, words):
        hidden = self.hidden(self.embed(words)).tanh()  # kept for backward, by tanh itself
        self.activations.append((StorageWeakRef(hidden.untyped_storage()), len(hidden)))
        alive = sum(size for storage, size in self.activations if not storage.expired())
        self.calls, self.most = self.calls + 1, max(self.most, alive)
        return self.out(nn.functional.dropout(hidden, 0.3))


def trained(encode):
    """Gradients of a loss to which labels and queries contribute, dropout and all."""
    torch.manual_seed(0)
    encoder, queries = Encoder(), nn.Linear(4, D)
    words, inputs = torch.randint(50, (C, 6)), torch.randn(N, 4)
    labels = encode(encoder, words)
    after = torch.rand(3)
    decoupled_softmax(queries(inputs) @ labels.T, relevance()).backward()
    return encoder, labels.detach(), after, [p.grad for p in (*encoder.parameters(), *queries.parameters())]


def test_gradients_are_exactly_those_of_plain_backward_dropout_included():
    def plain(encoder, words):
        return torch.cat([encoder(part) for part in words.split(5)])

    _, labels, after, expected = trained(plain)
    cached = functools.partial(encode_in_chunks, chunk_size=5)
    for result in (
        trained(cached),
        trained(lambda encoder, words: cached(lambda w, unused: encoder(w), (words, words))),
        trained(lambda encoder, words: cached(lambda words: encoder(words), {"words": words})),
    ):
        assert torch.equal(result[1], labels) and torch.equal(result[2], after)
        for one, other in zip(result[3], expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


def test_no_more_activations_than_a_chunk_are_kept():
    encoder, *_ = trained(lambda encoder, words: torch.cat([encoder(part) for part in words.split(5)]))
    assert encoder.most == C and encoder.calls == 5
    encoder, *_ = trained(functools.partial(encode_in_chunks, chunk_size=5))
    assert encoder.most == 5 and encoder.calls == 10


def test_the_encoder_alone_may_need_no_gradient():
    encoder = Encoder().requires_grad_(False)
    assert not encode_in_chunks(encoder, torch.randint(50, (C, 6))).requires_grad
    words = torch.randn(C, 3, requires_grad=True)
    encode_in_chunks(torch.tanh, words, chunk_size=4).sum().backward()
    torch.testing.assert_close(words.grad, 1 - words.detach().tanh() ** 2)


def test_inputs_that_do_not_fit_are_named():
    for inputs in ((torch.zeros(3), torch.zeros(4)), torch.zeros(0, 2), {}):
        with pytest.raises(ValueError, match="inputs of lengths"):
            encode_in_chunks(torch.tanh, inputs)
    with pytest.raises(ValueError, match=r"chunk_size = 2.5 is out of range"):
        encode_in_chunks(torch.tanh, torch.zeros(3, 2), chunk_size=2.5)


# --- sparse rows


@pytest.mark.parametrize("form", [sparse.csr_array, sparse.csr_matrix, sparse.coo_array, sparse.csc_matrix])
def test_sparse_rows_are_the_dense_target(form):
    torch.manual_seed(0)
    dense = torch.rand(5, 8, dtype=torch.float64) * (torch.rand(5, 8) < 0.4)
    dense[2] = 0
    matrix = form(dense.numpy())
    indices, values = positives_from_csr(matrix, dtype=torch.float64)
    assert indices.shape == values.shape == (5, int((dense > 0).sum(1).max()))
    rebuilt = torch.zeros_like(dense).scatter_add(1, indices, values)
    torch.testing.assert_close(rebuilt, dense, rtol=0, atol=0)
    scores = torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(decoupled_softmax(scores, (indices, values)), decoupled_softmax(scores, dense))
    assert (indices.diff(dim=1)[(values[:, 1:] > 0)] > 0).all()


def test_sparse_matrices_with_doubles_zeros_or_nothing():
    matrix = sparse.csr_matrix(([1.0, 0.5, 0.0, 2.0], ([0, 0, 0, 1], [2, 2, 1, 0])), shape=(3, 4))
    unsorted = sparse.csr_matrix((matrix.data, matrix.indices, matrix.indptr), shape=(3, 4), copy=True)
    before = unsorted.data.copy()
    indices, values = positives_from_csr(unsorted)
    assert indices.tolist() == [[2], [0], [0]] and values.tolist() == [[1.5], [2.0], [0.0]]
    assert (unsorted.data == before).all() and values.dtype == torch.float32
    indices, values = positives_from_csr(sparse.csr_matrix((2, 4), dtype=bool))
    assert indices.tolist() == [[0], [0]] and not values.any()
    with pytest.raises(ValueError, match=r"matrix holds -1\.0, which is out of range"):
        positives_from_csr(sparse.csr_matrix([[-1.0, 1.0]]))
    with pytest.raises(ValueError, match="matrix = a ndarray is out of range"):
        positives_from_csr(torch.ones(2, 2).numpy())
