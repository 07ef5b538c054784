import numpy as np
import pytest
import torch
from torch import nn

from rlorch.engine.logprobs import target_logprobs
from rlorch.engine.model import Head

pytestmark = pytest.mark.engine

N, D, V = 37, 16, 50


def case(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    linear = nn.Linear(D, V, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(V, D, generator=generator))
        linear.bias.copy_(torch.randn(V, generator=generator))
    hidden_ND = torch.randn(N, D, generator=generator, dtype=dtype).requires_grad_()
    targets_N = torch.randint(V, (N,), generator=generator)
    return linear, hidden_ND, targets_N, torch.randn(N, generator=generator)


def slow(head, hidden_ND, targets_N):
    logits_NV = head.linear(hidden_ND).float() * head.scale
    if head.softcap is not None:
        logits_NV = head.softcap * torch.tanh(logits_NV / head.softcap)
    return torch.log_softmax(logits_NV, -1)


@pytest.mark.parametrize("chunk", [1, 5, 36, 37, 100])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 3.0)])
def test_chunks_equal_full_logits_in_value_gradient_and_entropy(chunk, scale, softcap):
    linear, hidden_ND, targets_N, upstream_N = case()
    head = Head(linear, scale, softcap)
    full_NV = slow(head, hidden_ND, targets_N)
    expected_N = full_NV.gather(-1, targets_N[:, None])[:, 0]
    wanted = torch.autograd.grad((expected_N * upstream_N).sum(), [hidden_ND, linear.weight, linear.bias])
    found_N, entropy_N = target_logprobs(head, hidden_ND, targets_N, chunk, with_entropy=True)
    got = torch.autograd.grad((found_N * upstream_N).sum(), [hidden_ND, linear.weight, linear.bias])
    torch.testing.assert_close(found_N, expected_N, rtol=1e-6, atol=1e-6)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert entropy_N is not None
    assert not entropy_N.requires_grad
    torch.testing.assert_close(entropy_N, -(full_NV.exp() * full_NV).sum(-1), rtol=1e-5, atol=1e-6)


def test_the_softmax_is_float32_whatever_the_head_computes_in():
    linear, hidden_ND, targets_N, _ = case(torch.bfloat16)
    found_N, _ = target_logprobs(Head(linear), hidden_ND, targets_N, 10)
    assert found_N.dtype == torch.float32
    torch.testing.assert_close(found_N, slow(Head(linear), hidden_ND, targets_N).gather(-1, targets_N[:, None])[:, 0])


def test_no_more_rows_of_logits_than_a_chunk_are_ever_computed_or_kept():
    linear, hidden_ND, targets_N, _ = case()
    sizes = []

    class Watched(nn.Module):
        def forward(self, x):
            sizes.append(len(x))
            return linear(x)

    kept = []

    def remember(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        found_N, _ = target_logprobs(Head(Watched()), hidden_ND, targets_N, 10, with_entropy=True)
    assert sizes == [10, 10, 10, 7]
    assert not [shape for shape in kept if shape[-1:] == (V,)]
    found_N.sum().backward()
    assert sorted(sizes[4:]) == [7, 10, 10, 10]


def test_no_positions_give_no_log_probs():
    linear, hidden_ND, targets_N, _ = case()
    found_N, entropy_N = target_logprobs(Head(linear), hidden_ND[:0], targets_N[:0], 10, with_entropy=True)
    assert entropy_N is not None
    assert (found_N.shape, entropy_N.shape) == ((0,), (0,))
    assert np.isfinite(found_N.detach().numpy()).all()
