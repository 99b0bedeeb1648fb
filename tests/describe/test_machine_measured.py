"""Measuring: every rate is there and plausible, honest about short memory, a busy processor and what is missing."""

import json
import os
import subprocess
import sys

import pytest

from haversack.describe import measure_machine
from haversack.describe.machine import Rates
from haversack.describe.measure_machine import (
    _CpuTimes,
    _open_uncached,
    affordable_sweep_bytes,
    disk_rates,
    measure,
    own_pages,
    runtime_pages,
    thread_counts,
)

MIB = 2**20


def test_thread_counts_include_one_and_all():
    assert [thread_counts(cores) for cores in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_a_sweep_takes_at_most_half_of_what_is_available():
    assert affordable_sweep_bytes(100 << 30, 4 << 30) == 4 << 30
    assert affordable_sweep_bytes(3 << 30, 4 << 30) == 3 << 29
    assert affordable_sweep_bytes(0, 4 << 30) == MIB


def test_a_small_measurement_is_whole_and_says_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr(measure_machine, "RUNTIME_IMPORTS", ("json", "haversack.no_such_room"))
    monkeypatch.setattr(measure_machine, "usable_cores", lambda: 1)
    lines = []
    result = measure(tmp_path, lines.append, sweep_bytes=16 * MIB, disk_bytes=8 * MIB, seconds_per_rate=0.01)
    rates = Rates.from_dict(json.loads(json.dumps(result["rates"])))
    assert set(rates.read_bytes_per_second) == set(rates.copy_bytes_per_second) == {1}
    assert 1e8 < rates.read_rate() < 1e12
    assert {"fp32", "bf16"} <= set(rates.matmul_flops_per_second)
    assert rates.matmul_rate("fp32") > 1e7
    assert rates.disk_read_bytes_per_second > 1e5 and "8 MiB" in rates.disk_read_method
    assert rates.swept_bytes == 16 * MIB and any("caches may flatter" in note for note in rates.notes)
    assert rates.runtime_imports == ("json",) and any("no_such_room" in note for note in rates.notes)
    assert list(tmp_path.iterdir()) == [] and len(lines) == 4


def test_pages_follow_what_a_process_holds():
    code = (
        "from haversack.describe.measure_machine import own_pages; before = own_pages()[0]\n"
        "held = bytearray(b'x') * (64 << 20); print(own_pages()[0] - before)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert abs(int(out.stdout) - 64 * MIB) < MIB
    assert all(num_bytes > MIB for num_bytes in own_pages())


def test_the_runtime_grows_with_what_it_imports():
    notes = []
    assert runtime_pages(("json",), notes)[0] < runtime_pages(("json", "numpy"), notes)[0]
    assert notes == []


def test_a_runtime_that_cannot_start_is_noted():
    notes = []
    assert runtime_pages(("no_such_library",), notes) == (None, None)
    assert "No module named 'no_such_library'" in notes[0]


def test_a_full_disk_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(measure_machine.psutil, "disk_usage", lambda _: type("Usage", (), {"free": MIB}))
    notes = []
    assert disk_rates(tmp_path, 8 * MIB, notes) == (None, "")
    assert "less than" in notes[0]


def test_without_o_direct_pages_are_dropped(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(8192))
    monkeypatch.delattr(os, "O_DIRECT")
    fd, method = _open_uncached(str(tmp_path / "file"), 8192)
    os.close(fd)
    assert method == "read after posix_fadvise(DONTNEED)"


def test_own_work_is_not_taken_for_a_disturbance():
    before = _CpuTimes.now()
    after = _CpuTimes(before.busy + 1.0, before.own + 1.0, before.clock + 1.0)
    assert after.others_share_since(before) == pytest.approx(0, abs=1e-9)
    disturbed = _CpuTimes(before.busy + 1.0, before.own + 0.5, before.clock + 1.0)
    assert disturbed.others_share_since(before) == pytest.approx(0.5 / os.cpu_count())
