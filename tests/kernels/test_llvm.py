import pytest

from haversack.kernels import llvm

TEXT = "define i64 @answer() {\n  ret i64 42\n}\n"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "haversack" / "kernels"


def _run(module: llvm.CompiledModule) -> int:
    import ctypes

    return ctypes.CFUNCTYPE(ctypes.c_int64)(module.address("answer"))()


def test_the_second_time_comes_from_the_cache(cache):
    first = llvm.compile_text(TEXT, llvm.host_target())
    again = llvm.compile_text(TEXT, llvm.host_target())
    assert (first.from_cache, again.from_cache) == (False, True)
    assert _run(first) == _run(again) == 42
    assert [p.suffix for p in cache.iterdir()] == [".o"]


@pytest.mark.parametrize("damage", [lambda d: d[:40], lambda d: d[:-1] + b"?", lambda d: b"", lambda d: b"x" * 99])
def test_a_damaged_cache_is_remade(cache, damage):
    llvm.compile_text(TEXT, llvm.host_target())
    (path,) = cache.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    module = llvm.compile_text(TEXT, llvm.host_target())
    assert not module.from_cache and _run(module) == 42
    assert llvm.compile_text(TEXT, llvm.host_target()).from_cache


def test_a_cache_of_another_cpu_is_not_found(cache):
    llvm.compile_text(TEXT, llvm.Target("x86-64" if llvm.host_target().has("sse2") else "generic", ""))
    assert not llvm.compile_text(TEXT, llvm.host_target()).from_cache


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "haversack").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _run(llvm.compile_text(TEXT, llvm.host_target())) == 42
