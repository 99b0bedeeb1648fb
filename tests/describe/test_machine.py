"""Machines: what is detected agrees with the system, cgroup limits count, the table has sources, files round-trip."""

import json
import os
import subprocess
import sys

import psutil
import pytest

from haversack.describe import machine as machine_module
from haversack.describe.machine import (
    Device,
    Machine,
    Rates,
    cgroup_headroom_bytes,
    detect,
    from_file,
    machine_names,
    measured,
    named,
    rates_file,
)
from haversack.errors import MachineError, OutputError

GIB = 2**30


def test_detect_agrees_with_the_system():
    machine = detect()
    assert machine.memory_bytes == psutil.virtual_memory().total
    assert 0 < machine.available_bytes <= machine.memory_bytes
    assert machine.cores == len(os.sched_getaffinity(0)) or machine.cores < os.cpu_count()
    assert machine.disk is not None and 0 <= machine.disk.free_bytes <= machine.disk.capacity_bytes
    assert machine.read_rate() is None and machine.matmul_rate("bf16") is None
    assert machine.tiers()["device"] == machine.available_bytes
    assert f"{machine.cores} cores" in machine.describe()


def test_detect_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from haversack.describe.machine import detect, named; detect(); named('h100-80gb');"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert out.stdout.strip() == "[]"


def cgroup(folder, **values):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def test_cgroup_v2_limits_count_at_every_level(tmp_path):
    (tmp_path / "self").write_text("0::/user/job\n")
    cgroup(tmp_path / "fs/user", memory__max=8 * GIB, memory__current=7 * GIB, memory__stat="inactive_file 0")
    cgroup(tmp_path / "fs/user/job", memory__max="max", memory__current=GIB)
    assert cgroup_headroom_bytes(tmp_path / "self", tmp_path / "fs") == GIB
    stat = f"anon 5\ninactive_file {GIB // 2}\nfile 3"
    cgroup(tmp_path / "fs/user/job", memory__max=2 * GIB, memory__current=2 * GIB, memory__stat=stat)
    assert cgroup_headroom_bytes(tmp_path / "self", tmp_path / "fs") == GIB // 2


def test_cgroup_v1_limits_count_and_its_largest_number_is_no_limit(tmp_path):
    (tmp_path / "self").write_text("9:name=systemd:/\n4:cpu,memory:/job\n")
    v1 = tmp_path / "fs/memory/job"
    cgroup(v1, memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=5)
    assert cgroup_headroom_bytes(tmp_path / "self", tmp_path / "fs") is None
    cgroup(v1, memory__limit_in_bytes=GIB, memory__usage_in_bytes=5, memory__stat="total_inactive_file 2")
    assert cgroup_headroom_bytes(tmp_path / "self", tmp_path / "fs") == GIB - 3
    cgroup(v1, memory__usage_in_bytes=2 * GIB)
    assert cgroup_headroom_bytes(tmp_path / "self", tmp_path / "fs") == 0
    assert cgroup_headroom_bytes(tmp_path / "missing", tmp_path / "fs") is None


def test_the_smaller_of_cgroup_and_system_is_available(monkeypatch):
    monkeypatch.setattr(machine_module, "cgroup_headroom_bytes", lambda: 12345)
    assert detect().available_bytes == 12345


def test_the_table_has_fifteen_machines_with_sources():
    names = machine_names()
    assert len(names) >= 15
    for name in names:
        machine = named(name)
        source = machine.devices[0].source if machine.devices else machine.rates.source
        assert len(source) > 20
        assert machine.tiers()["device"] >= 8e9
        assert 1e10 < machine.read_rate() < 1e13
        rates = machine.devices[0].matmul_flops_per_second if machine.devices else {"fp32": machine.matmul_rate("fp32")}
        assert rates and all(1e11 < rate < 1e16 for rate in rates.values())
        assert Machine.from_dict(json.loads(json.dumps(machine.to_dict()))) == machine
    assert named("H100-80GB").devices[0].memory_bytes == 80 * 10**9
    assert len(named("dgx-h100-8x80gb").devices) == 8


def test_an_unknown_name_lists_the_nearest():
    with pytest.raises(MachineError, match=r"'h100-80g'; did you mean .*h100-80gb"):
        named("h100-80g")
    with pytest.raises(MachineError, match=r"a100-40gb.*v100-32gb"):
        named("!")


def test_machines_round_trip_through_a_file(tmp_path):
    rates = Rates({1: 1e10, 2: 1.5e10}, {1: 5e9}, {"bf16": {1: 1e11, 2: 2e11}}, 1e9, "O_DIRECT", 10, 20, ("torch",), 4)
    machine = Machine("mine", 2, 8 * GIB, 4 * GIB, "cpu", detect().disk, (Device("gpu", 5, 4),), rates, ("note",))
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(machine.to_dict()))
    assert from_file(path) == machine
    assert rates.read_rate(1) == 1e10 and rates.read_rate(3) == 1.5e10 and rates.read_rate() == 1.5e10
    assert rates.matmul_rate("bf16", 1) == 1e11 and rates.matmul_rate("int8") is None


def test_products_of_8_bit_activations_take_the_rate_of_integers_where_there_is_one():
    host = Machine("host", 2, GIB, GIB, rates=Rates(matmul_flops_per_second={"bf16": {2: 2e11}, "int8": {2: 5e11}}))
    assert (host.product_rate(), host.product_rate(8)) == (2e11, 5e11)
    without = Machine("older", 2, GIB, GIB, rates=Rates(matmul_flops_per_second={"fp32": {2: 1e11}}))
    assert without.product_rate(8) == without.product_rate() == 1e11
    assert Machine("unmeasured", 2, GIB, GIB).product_rate(8) is None
    accelerator = named("h100-80gb")  # its kernels multiply floats
    assert accelerator.product_rate(8) == accelerator.matmul_rate("bf16")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "can't be read"),
        ("[]", "must hold an object"),
        ('{"name": "x"}', "cores"),
        ('{"name": "x", "cores": 2, "memory_bytes": 10, "available_bytes": 11}', "more than"),
        ('{"name": "x", "cores": -2, "memory_bytes": 10, "available_bytes": 1}', "cores is -2"),
        ('{"name": "x", "cores": 0, "memory_bytes": 0, "available_bytes": 0}', "neither"),
        ('{"name": "x", "cores": 1, "memory_bytes": 9, "available_bytes": 1, "rates": {"speed": 1}}', "speed"),
        (
            '{"name": "x", "cores": 1, "memory_bytes": 9, "available_bytes": 1,'
            '"rates": {"read_bytes_per_second": {"1": 0}}}',
            "above zero",
        ),
    ],
)
def test_wrong_machine_files_are_refused(tmp_path, text, complaint):
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(MachineError, match=complaint):
        from_file(tmp_path / "m.json")
    with pytest.raises(MachineError, match="no machine file"):
        from_file(tmp_path / "missing.json")


def test_rates_are_measured_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def measure(folder, progress):
        calls.append(folder)
        progress("reading memory")
        return {"rates": Rates({1: 1e10}, source=f"measured {len(calls)}").to_dict(), "devices": []}

    monkeypatch.setattr(machine_module, "_measure", measure)
    lines = []
    assert measured(progress=lines.append).rates.source == "measured 1"
    assert measured().read_rate() == 1e10 and len(calls) == 1 and lines == ["reading memory"]
    assert measured(remeasure=True).rates.source == "measured 2"
    path = rates_file(detect())
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing half-written is left
    path.write_text(path.read_text()[:-20])
    assert measured().rates.source == "measured 3"  # a damaged cache file is measured again
    path.write_text(path.read_text().replace(f'"version": {machine_module.RATES_VERSION}', '"version": 0'))
    assert measured().rates.source == "measured 4"


def test_a_cache_folder_that_cannot_be_made_is_explained(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="cache folder"):
        measured()


def fake_measurement(tmp_path, monkeypatch, script: str) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(machine_module.sys, "executable", str(program))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_measuring_process_that_fails_is_reported_with_its_last_words(tmp_path, monkeypatch):
    fake_measurement(tmp_path, monkeypatch, "echo Traceback >&2; echo 'OSError: no memory' >&2; exit 3")
    with pytest.raises(MachineError, match="failed with exit code 3: OSError: no memory; name a machine"):
        measured()
    assert not rates_file(detect()).exists()


def test_progress_and_rates_come_from_the_measuring_process(tmp_path, monkeypatch):
    rates = json.dumps({"rates": Rates({1: 1e10}).to_dict(), "devices": []})
    fake_measurement(tmp_path, monkeypatch, f"""echo a library speaks; echo '{{"progress": "step"}}'; echo '{rates}'""")
    lines = []
    assert measured(progress=lines.append).read_rate() == 1e10
    assert lines == ["step"]
