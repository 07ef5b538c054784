import numpy as np
import pytest
import torch
from lora_builders import SMALL, base_model, lora_base, train
from torch import nn
from trainer_builders import rows, tiny_model

from rlorch.engine.model import Head
from rlorch.engine.top_k import top_k_logprobs
from rlorch.engine.trainer import TorchTrainer
from rlorch.errors import UserError
from rlorch.specs import TrainerSpec, WeightsSpec

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_model(tmp_path_factory)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
def test_the_likeliest_tokens_equal_a_sort_of_the_whole_distribution(chunk_tokens):
    torch.manual_seed(0)
    head = Head(nn.Linear(8, 50, bias=False), scale=0.5, softcap=3.0)
    hidden_ND = torch.randn(10, 8)
    ids_NK, values_NK = top_k_logprobs(head, hidden_ND, 4, chunk_tokens)
    for position in range(10):
        logits_V = torch.tanh(head.linear(hidden_ND[position]) * 0.5 / 3.0) * 3.0
        probabilities = (logits_V.double().exp() / logits_V.double().exp().sum()).tolist()
        likeliest = sorted(range(50), key=lambda token: -probabilities[token])[:4]
        assert ids_NK[position].tolist() == likeliest
        expected = [np.log(probabilities[token]) for token in likeliest]
        np.testing.assert_allclose(values_NK[position].tolist(), expected, rtol=1e-5)
    assert not values_NK.requires_grad


def test_rows_get_their_own_likeliest_tokens_whatever_the_micro_batches(directory):
    datums = rows(1, [14, 3, 9])
    spec = TrainerSpec(threads=1, micro_batch_tokens=16, logprob_chunk_tokens=5)
    engine = TorchTrainer(directory, spec, WeightsSpec())
    result = engine.forward(datums, 3)
    plain = engine.forward(datums)
    assert plain.top_k is None
    assert result.top_k is not None
    assert all((a == b).all() for a, b in zip(result.logprobs, plain.logprobs, strict=True))
    model = base_model(directory)
    for datum, (ids_TK, values_TK) in zip(datums, result.top_k, strict=True):
        with torch.no_grad():
            scores_TV = model(torch.tensor(datum.tokens_T)[None]).logits[0].log_softmax(-1)
        assert (ids_TK.dtype, values_TK.dtype) == (np.int64, np.float32)
        assert ids_TK.shape == values_TK.shape == (len(datum.tokens_T), 3)
        np.testing.assert_array_equal(ids_TK, scores_TV.argsort(-1, descending=True)[:, :3].numpy())
        np.testing.assert_allclose(values_TK, scores_TV.sort(-1, descending=True)[0][:, :3].numpy(), atol=2e-5)


def test_an_adapter_has_likeliest_tokens_of_its_own(directory):
    base = lora_base(directory)
    adapter = base.add(SMALL)
    datums = rows(1, [14])
    train(adapter, datums, 3)
    top = adapter.forward(datums, 128).top_k[0]
    targets = datums[0].loss_inputs["target_tokens"]
    scored = [float(top[1][t][top[0][t] == target][0]) for t, target in enumerate(targets)]
    np.testing.assert_allclose(scored, adapter.forward(datums).logprobs[0], atol=1e-6)
    assert (base.forward(datums, 1).top_k[0][1] != top[1][:, :1]).any()


def test_more_likeliest_tokens_than_there_are_tokens_is_refused(directory):
    base = lora_base(directory)
    for k in (-1, 129):
        with pytest.raises(UserError, match=f"top_k is {k}; it must be between 1 and"):
            base.forward(rows(1, [4]), k)
