"""Scratch: memory is used again when nothing uses it any more, and not before."""

import pytest
import torch

from subspace_peft.projections import scratch


@pytest.fixture(autouse=True)
def no_buffers(monkeypatch):
    monkeypatch.setattr(scratch, "_buffers", [])


def test_memory_in_use_is_not_given_again():
    like = torch.zeros(1)
    tensors = [scratch.empty(like, (1000,)).fill_(i) for i in range(4)]
    views = [tensor[10:20].detach() for tensor in tensors]
    del tensors
    for i in range(4, 8):
        scratch.empty(like, (500, 2)).fill_(i)
    for i, view in enumerate(views):
        assert torch.equal(view, torch.full((10,), float(i)))


def test_memory_that_is_free_is_given_again():
    like = torch.zeros(1, dtype=torch.float64)
    tensor = scratch.empty(like, (1000,))
    at = tensor.data_ptr()
    del tensor
    again = scratch.empty(torch.zeros(1), (30, 20))
    assert again.data_ptr() == at
    assert again.is_contiguous()
    assert not again._is_view()


def test_memory_that_other_processes_share_is_not_given_again():
    tensor = scratch.empty(torch.zeros(1), (1000,)).share_memory_()
    at = tensor.data_ptr()
    del tensor
    assert scratch.empty(torch.zeros(1), (1000,)).data_ptr() != at


def test_memory_of_which_somebody_has_the_storage_is_not_given_again():
    storage = scratch.empty(torch.zeros(1), (1000,)).fill_(1).untyped_storage()
    scratch.empty(torch.zeros(1), (1000,)).fill_(2)
    assert torch.equal(torch.empty(0).set_(storage, 0, (1000,)), torch.ones(1000))


def test_it_is_that_of_the_tensor_whatever_the_default_device():
    with torch.device("meta"):
        assert scratch.empty(torch.zeros(1, device="cpu"), (26,)).device.type == "cpu"


def test_what_is_larger_than_a_buffer_is_not_kept(monkeypatch):
    monkeypatch.setattr(scratch, "BUFFER_BYTES", 100)
    held = list(scratch._buffers)
    assert scratch.empty(torch.zeros(1), (26,)).shape == (26,)
    assert scratch._buffers == held


def test_without_a_count_of_users_no_memory_is_given_again(monkeypatch):
    monkeypatch.setattr(scratch, "USERS", None)
    assert scratch.empty(torch.zeros(1), (26,)).shape == (26,)
    assert not scratch._buffers
