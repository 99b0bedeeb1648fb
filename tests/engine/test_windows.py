"""Texts are cut so that what calibrates, what steers and what judges are not the same tokens."""

import pytest
import torch

from haversack.engine.windows import NUM_JUDGE, NUM_SEARCH, text_windows
from haversack.errors import UsageError


def mixed(num_windows, seq_len):
    """Windows that repeat one to many different ids: easy to hard; which one is told by its first id."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(num_windows):
        variety = 1 + (i * 7) % 50
        rows.append(torch.randint(0, variety, (seq_len,), generator=generator) + 100)
        rows[-1][0] = 1000 + i
    return torch.cat(rows).tolist()


@pytest.mark.parametrize(("num_windows", "wanted"), [(200, 64), (70, 64), (40, 64), (9, 64), (8, 2)])
def test_no_window_serves_two_ends(num_windows, wanted):
    found = text_windows(mixed(num_windows, 32), wanted * 32, 32)
    parts = [set(part[:, 0].tolist()) for part in (found.calibration, found.search, found.judge)]
    assert all(parts) and sum(map(len, parts)) == len(set.union(*parts))
    assert len(parts[0]) == min(wanted, num_windows - max(num_windows // 4, min(24, num_windows - wanted)))
    if num_windows >= wanted + NUM_SEARCH + NUM_JUDGE:
        assert (len(parts[1]), len(parts[2])) == (NUM_SEARCH, NUM_JUDGE) and found.notes == ()
    elif num_windows < wanted:
        assert found.notes


def test_measuring_windows_run_from_easy_to_hard():
    found = text_windows(mixed(200, 64), 64 * 64, 64)
    for part in (found.search, found.judge):
        variety = torch.tensor([len(row.unique()) for row in part], dtype=torch.float32)
        ranks = torch.arange(len(part), dtype=torch.float32)
        assert torch.corrcoef(torch.stack([variety, ranks]))[0, 1] > 0.9
        assert variety.max() > 3 * variety.min()


def test_short_texts_are_used_and_said():
    found = text_windows(range(10), 64, 16)
    assert found.calibration.tolist() == [list(range(10))] and "less than a sequence" in found.notes[0]
    assert torch.equal(found.judge, found.calibration) and "promise too little" in found.notes[-1]
    found = text_windows(range(40), 64, 16)
    assert found.calibration.shape == (2, 16) and "not the 4" in found.notes[0]
    with pytest.raises(UsageError, match="longer text"):
        text_windows([1], 64, 16)
