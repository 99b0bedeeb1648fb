import ctypes

import pytest
import torch

from haversack.errors import UsageError
from haversack.kernels import read_bandwidth


def test_every_byte_is_read():
    """The sum of all words comes out, so nothing was skipped."""
    data = torch.arange(3 * read_bandwidth.TURN_BYTES // 8)
    total = ctypes.c_int64()
    read_bandwidth._reader()(data.data_ptr(), 3, ctypes.addressof(total), 2)
    assert total.value == int(data.sum())


def test_rate_is_plausible_and_small_reads_are_refused():
    rate = read_bandwidth.read_bytes_per_second(torch.zeros(64 << 20, dtype=torch.uint8))
    assert 1e8 < rate < 1e13
    with pytest.raises(UsageError, match="at least"):
        read_bandwidth.read_bytes_per_second(torch.zeros(100))
