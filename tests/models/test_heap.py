"""Memory that is free in glibc's heap goes back to the system."""

import pytest
import torch

from lapora.models import heap

psutil = pytest.importorskip("psutil")
MIB = 2**20
needs_glibc = pytest.mark.skipif(heap._glibc() is None, reason="needs glibc 2.33 or later")


def resident() -> int:
    return psutil.Process().memory_info().rss


def cut_the_heap() -> list[torch.Tensor]:
    """Free 570 MiB in pieces of 19 MiB; what is returned stays between them."""
    for _ in range(2):  # the first round makes glibc keep blocks of this size in its heap
        tensors = [torch.ones(MIB // 4) for _ in range(600)]
        kept = tensors[::20]
        del tensors
    return kept


@needs_glibc
def test_free_pages_between_tensors_are_returned():
    kept = cut_the_heap()
    assert heap.free_bytes() >= 500 * MIB
    before = resident()
    heap.return_freed_memory()
    assert before - resident() > 400 * MIB
    assert all(bool((each == 1).all()) for each in kept)


@needs_glibc
def test_pages_are_returned_once(monkeypatch):
    """glibc counts them as free after that, but batches that add little to them have nothing to return."""
    kept = cut_the_heap()
    heap.return_freed_memory()
    returned = []
    monkeypatch.setattr(heap._glibc(), "malloc_trim", returned.append)
    for _ in range(3):
        torch.ones(10 * MIB)
        heap.return_freed_memory()
    assert heap.free_bytes() >= 500 * MIB
    assert not returned
    kept += cut_the_heap()
    heap.return_freed_memory()
    assert returned == [0]


@needs_glibc
def test_little_free_memory_is_kept_for_the_next_batch(monkeypatch):
    monkeypatch.setattr(heap, "LARGE", 2**50)
    kept = cut_the_heap()
    before = resident()
    heap.return_freed_memory()
    assert abs(before - resident()) < 50 * MIB
    assert len(kept) == 30
    monkeypatch.undo()
    heap.return_freed_memory()


def test_another_c_library_has_nothing_to_return(monkeypatch):
    monkeypatch.setattr(heap, "_glibc", lambda: None)
    assert heap.free_bytes() == 0
    heap.return_freed_memory()
