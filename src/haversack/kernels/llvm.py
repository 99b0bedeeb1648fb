"""LLVM IR text to callable addresses, compiled in the process by llvmlite and kept in a cache on disk.

A compiled object is looked up by what made it: the text, the CPU and its features, and the versions of llvmlite and
LLVM. So a cache brought along from another machine is never found, and one that was cut or changed on disk fails its
checksum; both are remade. Compiling takes 20 to 200 ms per kernel, loading from the cache about one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from haversack._version import __version__
from haversack.cache import cache_folder


@dataclass(frozen=True)
class Target:
    """What code is generated for: LLVM's name of the CPU and its features (`+avx512f,-amx-tile,...`)."""

    cpu: str
    features: str

    def has(self, *names: str) -> bool:
        listed = self.features.split(",")
        return all(f"+{name}" in listed for name in names)

    def without(self, *names: str) -> Target:
        """The same CPU with features switched off: to test and measure the paths of lesser machines."""
        kept = [f for f in self.features.split(",") if f[1:] not in names]
        return Target(self.cpu, ",".join([*kept, *(f"-{name}" for name in names)]))


@cache
def host_target() -> Target:
    binding = _binding()
    features = binding.get_host_cpu_features()
    return Target(binding.get_host_cpu_name(), features.flatten() if features else "")


class CompiledModule:
    """The functions of one compiled text; keeps their memory alive."""

    def __init__(self, engine: Any, from_cache: bool):
        self._engine = engine
        self.from_cache = from_cache

    def address(self, function: str) -> int:
        address = self._engine.get_function_address(function)
        assert address, f"compiled module has no function {function}"
        return address


_LOCK = threading.Lock()


def compile_text(text: str, target: Target) -> CompiledModule:
    """Compile IR text for `target`, which must run on this machine, or load the object made earlier."""
    binding = _binding()
    with _LOCK:
        path = cache_folder("kernels") / f"{_key(text, target)}.o"
        code = _read(path)
        from_cache = code is not None
        machine = _machine(binding, target)
        if code is None:
            module = binding.parse_assembly(text)
            module.verify()
            code = machine.emit_object(module)
            _write(path, code)
        engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
        engine.add_object_file(binding.ObjectFileRef.from_data(code))
        engine.finalize_object()
    return CompiledModule(engine, from_cache)


def assembly(text: str, target: Target) -> str:
    """Assembly of IR text, for reading."""
    binding = _binding()
    module = binding.parse_assembly(text)
    module.verify()
    return _machine(binding, target).emit_assembly(module)


@cache
def _binding() -> Any:
    import llvmlite.binding as binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    return binding


def _machine(binding: Any, target: Target) -> Any:
    triple = binding.get_process_triple()
    return binding.Target.from_triple(triple).create_target_machine(
        cpu=target.cpu, features=target.features, opt=3, codemodel="jitdefault", jit=True
    )


def _key(text: str, target: Target) -> str:
    import llvmlite

    llvm = ".".join(map(str, _binding().llvm_version_info))
    made_from = "\n".join([__version__, llvmlite.__version__, llvm, target.cpu, target.features, text])
    return hashlib.sha256(made_from.encode()).hexdigest()[:40]


def _read(path: Path) -> bytes | None:
    """The object, or None where there is none or its checksum (the first 32 bytes) doesn't hold."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return data[32:] if hashlib.sha256(data[32:]).digest() == data[:32] else None


def _write(path: Path, code: bytes) -> None:
    """Write beside, then rename: a reader sees all or nothing. A cache that can't be written is done without."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(code).digest() + code)
        Path(partial).replace(path)
