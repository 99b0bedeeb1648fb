"""Machines: capacities of memory, device and disk, and rates that were measured or have a source.

`detect()` is instant and knows no rates; `measured()` adds rates, measured once and kept in a cache file; `named()`
reads the sourced table `machines.toml`; `from_file()` reads a machine that `to_dict` wrote. Nothing here imports torch
unless devices are asked for.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from haversack.cache import cache_folder
from haversack.errors import MachineError, MissingDependencyError, OutputError
from haversack.units import format_bytes

RATES_VERSION = 2
"""Raised when the meaning of a measured rate changes, so that older cache files are measured again."""


@dataclass(frozen=True)
class Rates:
    """What the host does per second, by number of threads, and what its runtime takes; an empty mapping is *unknown*.

    `read_bytes_per_second[threads]` is the median of several sweeps over `swept_bytes` of distinct memory;
    `copy_bytes_per_second` counts each byte once (it is read and written). `matmul_flops_per_second[dtype][threads]`
    counts `2 m n k`; dtypes are `fp32`, `bf16`, `int8`. `disk_read_bytes_per_second` was read as `disk_read_method`
    says. `runtime_private_bytes` and `runtime_file_bytes` are a fresh process after `runtime_imports`, split into
    anonymous pages and file-backed ones; `training_private_bytes` one that is about to train. `source` says when or
    where the numbers come from; `notes` what could not be measured, and why.
    """

    read_bytes_per_second: Mapping[int, float] = field(default_factory=dict)
    copy_bytes_per_second: Mapping[int, float] = field(default_factory=dict)
    matmul_flops_per_second: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    disk_read_bytes_per_second: float | None = None
    disk_read_method: str = ""
    runtime_private_bytes: int | None = None
    runtime_file_bytes: int | None = None
    runtime_imports: tuple[str, ...] = ()
    swept_bytes: int = 0
    source: str = ""
    notes: tuple[str, ...] = ()
    training_private_bytes: int | None = None

    def read_rate(self, threads: int | None = None) -> float | None:
        """Bytes/s of reading memory with at most `threads` threads (None: as many as were measured), or None."""
        return _best_up_to(self.read_bytes_per_second, threads)

    def matmul_rate(self, dtype: str, threads: int | None = None) -> float | None:
        """Operations/s of a large matrix product in `dtype` with at most `threads` threads, or None."""
        return _best_up_to(self.matmul_flops_per_second.get(dtype, {}), threads)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rates:
        fields = dict(data)
        for name in ("read_bytes_per_second", "copy_bytes_per_second"):
            fields[name] = _by_threads(fields.get(name, {}), name)
        fields["matmul_flops_per_second"] = {
            str(dtype): _by_threads(row, f"matmul_flops_per_second.{dtype}")
            for dtype, row in dict(fields.get("matmul_flops_per_second", {})).items()
        }
        for name in ("runtime_imports", "notes"):
            fields[name] = tuple(fields.get(name, ()))
        return cls(**fields)


@dataclass(frozen=True)
class Device:
    """An accelerator with memory of its own.

    `memory_bytes` is its capacity and `available_bytes` what is free now (the capacity, for a machine from the table).
    `matmul_flops_per_second[dtype]` is the dense rate. `link_bytes_per_second` is host to device, one way.
    """

    name: str
    memory_bytes: int
    available_bytes: int
    read_bytes_per_second: float | None = None
    matmul_flops_per_second: Mapping[str, float] = field(default_factory=dict)
    link_bytes_per_second: float | None = None
    source: str = ""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Device:
        return cls(**data)


@dataclass(frozen=True)
class Disk:
    """The file system under `path`, in bytes. `attention_bytes_per_second` is how fast a drive that computes attends to keys and values that it holds (None: it
    can't); nothing here measures it, so that it comes from a machine file."""

    path: str
    capacity_bytes: int
    free_bytes: int
    attention_bytes_per_second: float | None = None


@dataclass(frozen=True)
class Machine:
    """One host and its devices.

    `cores` are those this process may use (affinity and cgroup quota). `available_bytes` is the smaller of what the
    system calls available and what the memory cgroups leave. Both are 0 for a named accelerator whose host is not
    stated.
    """

    name: str
    cores: int
    memory_bytes: int
    available_bytes: int
    cpu_model: str = ""
    disk: Disk | None = None
    devices: tuple[Device, ...] = ()
    rates: Rates = field(default_factory=Rates)
    notes: tuple[str, ...] = ()

    def tiers(self) -> dict[str, int]:
        """Available bytes by tier; `device` is where the model computes: the first accelerator, else main memory."""
        tiers = {"device": self.devices[0].available_bytes if self.devices else self.available_bytes}
        if self.devices and self.available_bytes:
            tiers["host"] = self.available_bytes
        if self.disk is not None:
            tiers["disk"] = self.disk.free_bytes
        return tiers

    def read_rate(self, threads: int | None = None) -> float | None:
        """Bytes/s at which weights are read where the model computes, or None where nobody measured."""
        return self.devices[0].read_bytes_per_second if self.devices else self.rates.read_rate(threads or self.cores)

    def matmul_rate(self, dtype: str, threads: int | None = None) -> float | None:
        """Operations/s of a large matrix product where the model computes, or None where nobody measured."""
        if self.devices:
            return self.devices[0].matmul_flops_per_second.get(dtype)
        return self.rates.matmul_rate(dtype, threads or self.cores)

    def product_rate(self, activation_bits: int = 16) -> float | None:
        """Operations/s of weights times activations of so many bits, or None where nobody measured: bfloat16's rate, else
        float32's; for 8-bit activations int8's where it was measured, on the CPU, whose kernels multiply integers."""
        integers = self.matmul_rate("int8") if activation_bits == 8 and not self.devices else None
        return integers or self.matmul_rate("bf16") or self.matmul_rate("fp32")

    def describe(self) -> str:
        """One line for a terminal."""
        parts = []
        if self.cores:
            parts.append(f"{self.cores} cores, {format_bytes(self.available_bytes)} available")
        parts += [f"{device.name} with {format_bytes(device.available_bytes)}" for device in self.devices]
        if (rate := self.read_rate()) is not None:
            parts.append(f"reads {rate / 1e9:.4g} GB/s")
        return f"{self.name}: {', '.join(parts)}"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Machine:
        """The machine that `to_dict` wrote. Raises MachineError naming what is missing or contradicts itself."""
        try:
            fields = dict(data)
            fields["disk"] = Disk(**fields["disk"]) if fields.get("disk") else None
            fields["devices"] = tuple(Device.from_dict(device) for device in fields.get("devices", ()))
            fields["rates"] = Rates.from_dict(fields.get("rates", {}))
            fields["notes"] = tuple(fields.get("notes", ()))
            machine = cls(**fields)
            _check(machine)
        except MachineError:
            raise
        except (TypeError, ValueError, AttributeError) as error:
            raise MachineError(f"the machine's description is wrong: {error}.") from None
        return machine


def detect(*, devices: bool = False, disk_path: str | Path = ".") -> Machine:
    """This machine, instantly and without rates. With `devices`, torch is imported and asked for CUDA devices
    (which creates a context on each, of some hundred MB)."""
    import psutil

    memory = psutil.virtual_memory()
    headroom = cgroup_headroom_bytes()
    usage = shutil.disk_usage(_existing(Path(disk_path)))
    return Machine(
        name="this machine",
        cores=usable_cores(),
        memory_bytes=memory.total,
        available_bytes=memory.available if headroom is None else min(headroom, memory.available),
        cpu_model=cpu_model(),
        disk=Disk(str(Path(disk_path).absolute()), usage.total, usage.free),
        devices=_cuda_devices() if devices else (),
    )


def known(*, disk_path: str | Path = ".") -> Machine:
    """This machine, instantly, with the rates that `measured` left in its cache file, if it ever ran."""
    machine = detect(disk_path=disk_path)
    kept = _read_rates(rates_file(machine))
    return machine if kept is None else dataclasses.replace(machine, rates=Rates.from_dict(kept["rates"]))


def measured(
    *,
    remeasure: bool = False,
    devices: bool = False,
    disk_path: str | Path = ".",
    progress: Callable[[str], None] | None = None,
) -> Machine:
    """This machine with rates, measured once (under a minute) in processes of their own and kept in `rates_file`.

    `progress` is called with one line per step. Raises MachineError if the measuring process fails.
    """
    machine = detect(devices=devices, disk_path=disk_path)
    path = rates_file(machine)
    kept = None if remeasure else _read_rates(path)
    if kept is None:
        _make_folder(path.parent)
        kept = _measure(path.parent, progress or (lambda line: None))
        keep(path, json.dumps({"version": RATES_VERSION, **kept}, indent=1))
    by_name = {device["name"]: device for device in kept["devices"]}
    return dataclasses.replace(
        machine,
        rates=Rates.from_dict(kept["rates"]),
        devices=tuple(dataclasses.replace(d, **by_name.get(d.name, {})) for d in machine.devices),
    )


def rates_file(machine: Machine) -> Path:
    """Where measured rates of this CPU model, core count and memory (in whole GiB) are kept."""
    key = f"{machine.cpu_model}|{machine.cores}|{round(machine.memory_bytes / 2**30)}"
    return cache_folder() / f"machine-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"


def named(name: str) -> Machine:
    """A machine of the sourced table. Raises MachineError listing the nearest names."""
    table = _table()
    row = table.get(name.lower().strip())
    if row is None:
        near = difflib.get_close_matches(name.lower(), table, n=3, cutoff=0.4) or sorted(table)
        raise MachineError(f"no machine is named {name!r}; did you mean {', '.join(near)}?")
    memory_bytes = row["memory_bytes"]
    if row["kind"] == "cpu":
        threads = row["cores"]
        rates = Rates(
            read_bytes_per_second={threads: row["read_bytes_per_second"]},
            matmul_flops_per_second={k: {threads: v} for k, v in row["matmul_flops_per_second"].items()},
            source=row["source"],
        )
        return Machine(name, row["cores"], memory_bytes, memory_bytes, cpu_model=row["title"], rates=rates)
    device = Device(
        name=row["title"],
        memory_bytes=memory_bytes,
        available_bytes=memory_bytes,
        read_bytes_per_second=row["read_bytes_per_second"],
        matmul_flops_per_second=row["matmul_flops_per_second"],
        link_bytes_per_second=row.get("link_bytes_per_second"),
        source=row["source"],
    )
    notes = ("the host of this accelerator is not stated",)
    return Machine(name, 0, 0, 0, devices=(device,) * row.get("count", 1), notes=notes)


def machine_names() -> tuple[str, ...]:
    """Names that `named` knows."""
    return tuple(sorted(_table()))


def from_file(path: str | Path) -> Machine:
    """A machine from a JSON file with the fields of `Machine.to_dict`."""
    try:
        data = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise MachineError(f"there is no machine file {str(path)!r}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise MachineError(f"the machine file {str(path)!r} can't be read: {error}.") from None
    if not isinstance(data, dict):
        raise MachineError(f"the machine file {str(path)!r} holds a {type(data).__name__}, but must hold an object.")
    return Machine.from_dict(data)


def usable_cores() -> int:
    """Cores this process may use: affinity, cut by a cgroup v2 CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))


def cpu_model() -> str:
    """The CPU's name as the system tells it."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def cgroup_headroom_bytes(
    proc_cgroup: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Bytes this process may still allocate under its memory cgroups (v2 and v1, each level), or None without a limit.

    Headroom is the limit minus what is charged, less inactive file pages, which the kernel reclaims first.
    """
    try:
        lines = proc_cgroup.read_text().splitlines()
    except OSError:
        return None
    headrooms = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            root, limit, used, inactive = mount, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, used = mount / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            inactive = "total_inactive_file"
        else:
            continue
        # Inside a container the group's path may not exist below the mount; its own group is then the mount itself.
        folder = root / group.strip("/")
        while True:
            headroom = _group_headroom(folder, limit, used, inactive)
            if headroom is not None:
                headrooms.append(headroom)
            if folder == root:
                break
            folder = folder.parent
    return max(0, min(headrooms)) if headrooms else None


def _group_headroom(folder: Path, limit: str, used: str, inactive: str) -> int | None:
    try:
        text = (folder / limit).read_text().strip()
        # v1 writes "no limit" as the largest page-aligned 64-bit number.
        if text == "max" or int(text) >= 2**62:
            return None
        charged = int((folder / used).read_text())
        stat = (folder / "memory.stat").read_text() if (folder / "memory.stat").exists() else ""
    except (OSError, ValueError):
        return None
    match = re.search(rf"^{inactive} (\d+)$", stat, re.MULTILINE)
    return int(text) - charged + (int(match[1]) if match else 0)


def _cuda_devices() -> tuple[Device, ...]:
    try:
        import torch
    except ImportError:
        raise MissingDependencyError("devices were asked for, which needs torch: pip install torch.") from None
    if not torch.cuda.is_available():
        return ()
    found = []
    for index in range(torch.cuda.device_count()):
        free_bytes, capacity_bytes = torch.cuda.mem_get_info(index)
        found.append(Device(torch.cuda.get_device_name(index), capacity_bytes, free_bytes, source="torch.cuda"))
    return tuple(found)


def _measure(folder: Path, progress: Callable[[str], None]) -> dict[str, Any]:
    """Run `measure_machine` in a process of its own, so that its memory and thread settings leave no trace here."""
    command = [sys.executable, "-m", "haversack.describe.measure_machine", "--disk", str(folder)]
    # Threads that spin while they wait take the processor from those that work whenever anything else runs.
    environment = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"} | os.environ
    result = None
    with tempfile.TemporaryFile("w+") as complaints:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=complaints, text=True, env=environment
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                message = json.loads(line) if line.startswith("{") else {}
                if "progress" in message:
                    progress(message["progress"])
                elif "rates" in message:
                    result = message
        complaints.seek(0)
        complaint = complaints.read().strip().splitlines()
    if process.returncode or result is None:
        raise MachineError(
            f"measuring this machine failed with exit code {process.returncode}"
            f"{': ' + complaint[-1] if complaint else ''}; name a machine from the table instead."
        )
    return result


def _read_rates(path: Path) -> dict[str, Any] | None:
    """The kept measurement, or None where there is none, or one of another version, or an unreadable one."""
    try:
        kept = json.loads(path.read_text())
        Rates.from_dict(kept["rates"])
        return kept if kept["version"] == RATES_VERSION and isinstance(kept["devices"], list) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def keep(path: Path, text: str) -> None:
    """Write a file of measurements whole or not at all. Raises OutputError."""
    _make_folder(path.parent)
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
            file.write(text)
        Path(file.name).replace(path)
    except OSError as error:
        raise OutputError(f"the measured rates can't be written to {str(path)!r}: {error.strerror}.") from None


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the cache folder {str(folder)!r} can't be made: {error.strerror}.") from None


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    return tomllib.loads(files("haversack.describe").joinpath("machines.toml").read_text())


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _by_threads(row: Mapping[Any, Any], name: str) -> dict[int, float]:
    rates = {int(threads): float(rate) for threads, rate in dict(row).items()}
    for threads, rate in rates.items():
        if threads < 1 or not rate > 0:
            raise MachineError(f"{name} is {rate} at {threads} threads, but both must be above zero.")
    return dict(sorted(rates.items()))


def _best_up_to(row: Mapping[int, float], threads: int | None) -> float | None:
    rates = [rate for count, rate in row.items() if threads is None or count <= threads]
    return max(rates) if rates else None


def _check(machine: Machine) -> None:
    counts = {"cores": machine.cores, "memory_bytes": machine.memory_bytes, "available_bytes": machine.available_bytes}
    for index, device in enumerate(machine.devices):
        counts |= {f"devices[{index}].memory_bytes": device.memory_bytes}
        counts |= {f"devices[{index}].available_bytes": device.available_bytes}
    rates = {
        "rates.disk_read_bytes_per_second": machine.rates.disk_read_bytes_per_second,
        "rates.runtime_private_bytes": machine.rates.runtime_private_bytes,
        "rates.training_private_bytes": machine.rates.training_private_bytes,
    }
    for index, device in enumerate(machine.devices):
        rates[f"devices[{index}].read_bytes_per_second"] = device.read_bytes_per_second
        for dtype, rate in dict(device.matmul_flops_per_second).items():
            rates[f"devices[{index}].matmul_flops_per_second.{dtype}"] = rate
    for name, value in rates.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
            raise MachineError(f"the machine's {name} is {value!r}, but must be a number above zero.")
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise MachineError(f"the machine's {name} is {value!r}, but must be a whole number, not negative.")
    if not machine.devices and not (machine.cores and machine.memory_bytes):
        raise MachineError("the machine has neither cores with memory nor devices: state one of them.")
    pairs = [(machine.name, machine.memory_bytes, machine.available_bytes)]
    pairs += [(device.name, device.memory_bytes, device.available_bytes) for device in machine.devices]
    for name, memory_bytes, available_bytes in pairs:
        if available_bytes > memory_bytes:
            raise MachineError(
                f"{name} has {format_bytes(available_bytes)} available, more than its {format_bytes(memory_bytes)}."
            )
