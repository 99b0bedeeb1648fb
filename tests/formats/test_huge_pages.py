"""Huge pages change no value and no byte count, and are there where the system gives them."""

import mmap
import re
from pathlib import Path

import pytest
import torch

from haversack.formats.huge_pages import HUGE_PAGE_BYTES, on_huge_pages

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.parametrize("num_bytes", [0, 1, 4096, HUGE_PAGE_BYTES - 1, 3 * HUGE_PAGE_BYTES + 5])
def test_the_tensor_is_the_same_whatever_its_size(num_bytes):
    tensor = torch.empty(num_bytes, dtype=torch.uint8)
    assert on_huge_pages(tensor) is tensor
    assert tensor.fill_(7).sum(dtype=torch.int64) == 7 * num_bytes


@pytest.mark.skipif(
    not SWITCH.exists() or "[never]" in SWITCH.read_text(), reason="this system gives no transparent huge pages"
)
def test_whole_huge_pages_within_a_tensor_are_huge():
    own = mmap.mmap(-1, 16 * HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # never touched before
    tensor = on_huge_pages(torch.frombuffer(own, dtype=torch.uint8)).fill_(1)
    assert huge_bytes(tensor.data_ptr() + HUGE_PAGE_BYTES) > 0  # all of it, unless memory is in pieces


def huge_bytes(address: int) -> int:
    """Of the mapping that an address lies in, the bytes that are on huge pages now."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the address is in no mapping")
