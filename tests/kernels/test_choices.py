"""Measured choices: kept, followed where they cost no byte, and ignored where they are another machine's."""

import json

import pytest
import torch
from packed_cases import error_of, make_case, make_input

from haversack.kernels import choices, registry
from haversack.kernels.choices import Choice, case_key, choices_file, fastest, keep, kept
from haversack.kernels.format import PackedFormat, PlaneFormat
from haversack.kernels.registry import choose, choose_kernel, kernel_name, packed_matmul, workspace_bytes
from haversack.kernels.threads import at_most, team_threads


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    registry.forget_choices()
    yield
    monkeypatch.undo()
    registry.forget_choices()


FMT = PackedFormat(4, 64, 256, True)


def able_names(num_tokens):
    return [k.NAME for k in registry._contenders(FMT, num_tokens, torch.float32, 16, "cpu")]


def another_matvec():
    """A kernel for one token that no plan would take, and takes no more workspace than the first."""
    able = registry._contenders(FMT, 1, torch.float32, 16, "cpu")
    sizes = [k.workspace_bytes(FMT, 1, 40, torch.float32, 16) for k in able]
    return next((k.NAME for k, size in zip(able[1:], sizes[1:]) if size <= sizes[0]), None)


def test_a_kept_choice_is_followed_and_named():
    other = another_matvec()
    if other is None:
        pytest.skip("this CPU has one kernel for this case")
    case = make_case(40, 256, 4, 64, True)
    x = make_input(1, 256)
    before = packed_matmul(x, case.codes, case.scales, **case.arguments)
    planned = workspace_bytes(1, 40, 256, bits=4, group_size=64)
    keep({case_key(FMT, 1, "float32", 16): Choice(other, 1, {})})
    registry.forget_choices()
    assert kernel_name(1, 40, 256, bits=4, group_size=64) == f"{other} (measured, at most 1 threads)"
    assert workspace_bytes(1, 40, 256, bits=4, group_size=64) == planned
    after = packed_matmul(x, case.codes, case.scales, **case.arguments)
    assert error_of(before, x, case) < 2**-16 > error_of(after, x, case)
    # Another number of tokens, dtype or number of bits is another case.
    for num_tokens, dtype in ((2, torch.float32), (1, torch.bfloat16)):
        assert not choose(FMT, num_tokens, 40, dtype, 16).measured


def test_a_choice_that_would_take_more_memory_is_not_followed():
    """Planned bytes hold whatever was measured: a tile's megabytes don't come in place of a row's kilobytes."""
    for name in ("generic-f32-tiles", *[n for n in able_names(1) if "tiles" in n]):
        keep({case_key(FMT, 1, "float32", 16): Choice(name, 2, {})})
        registry.forget_choices()
        chosen = choose(FMT, 1, 5000, torch.float32, 16)
        assert not chosen.measured and chosen.kernel is choose_kernel(FMT, 1, torch.float32, 16)


def test_what_measuring_finds_can_be_followed_and_computes_the_same():
    case, num_tokens = make_case(40, 256, 4, 64, True), 70
    key, choice = registry.measure_choice(FMT, num_tokens, 40, torch.float32, 16)
    assert key == case_key(FMT, 128, "float32", 16) and (choice.threads or 1) <= torch.get_num_threads()
    assert all(took > 0 for took in choice.microseconds.values())
    names = [*able_names(num_tokens), *[k.NAME for k in registry._widened(FMT, num_tokens, torch.float32, 16)]]
    assert choice.kernel in names and set(choice.microseconds) >= {choice.kernel}
    keep({key: choice})
    registry.forget_choices()
    assert choice.kernel == choose(FMT, num_tokens, 40, torch.float32, 16).kernel.NAME
    x = make_input(num_tokens, 256)
    assert error_of(packed_matmul(x, case.codes, case.scales, **case.arguments), x, case) < 2**-16


def test_planes_are_measured_too():
    key, choice = registry.measure_choice(PlaneFormat(1, 64, 256), 1, 64, torch.float32, 16)
    assert '"layout": "PlaneFormat"' in key and choice.kernel.startswith("llvm-planes-")


def test_another_machines_file_is_ignored_and_remade():
    key = case_key(FMT, 1, "float32", 16)
    path = keep({key: Choice("somewhere-else", 64, {})})
    data = json.loads(path.read_text())
    assert kept(key) is not None
    for change in ({"cpu": "Z80"}, {"cores": 4096}, {"versions": {}}):
        path.write_text(json.dumps(data | {"machine": data["machine"] | change}))
        registry.forget_choices()
        assert kept(key) is None and not choose(FMT, 1, 40, torch.float32, 16).measured
    keep({key: Choice("here", None, {})})
    assert kept(key) == Choice("here", None, {})
    # A kernel that there is none of here, as another version's: the first is taken.
    assert not choose(FMT, 1, 40, torch.float32, 16).measured


@pytest.mark.parametrize("text", ["", "{", "[]", '{"machine": 1}', '{"machine": {}, "choices": []}'])
def test_a_damaged_file_is_ignored(text):
    path = choices_file()
    path.parent.mkdir(parents=True)
    path.write_text(text)
    registry.forget_choices()
    assert kept(case_key(FMT, 1, "float32", 16)) is None


def test_the_first_kernel_stays_unless_another_is_clearly_faster(monkeypatch):
    monkeypatch.setattr(choices, "CONTENDER_SECONDS", 0.0)
    seconds = {"first": 1.0, "slower": 1.5, "a bit faster": 0.97, "faster": 0.5}
    clock = [0.0]
    monkeypatch.setattr(choices.time, "perf_counter", lambda: clock[0])

    def run(name, threads, copy):
        clock[0] += seconds[name] / (threads if threads <= 4 else 4)

    assert fastest(["first", "slower", "a bit faster"], run, 3, 8).kernel == "first"
    assert fastest(["first", "slower", "faster"], run, 3, 4).threads is None  # all that there are
    assert fastest(["first", "slower", "faster"], run, 3, 8) == Choice(
        "faster",
        4,  # eight are no faster than four
        {
            "first": 250000.0, "slower": 375000.0, "faster": 125000.0, "faster, 1 threads": 500000.0,
            "faster, 2 threads": 250000.0, "faster, 4 threads": 125000.0, "faster, 8 threads": 125000.0,
        },
    )  # fmt: skip


def test_threads_are_limited_inside_and_free_again_outside():
    before = torch.get_num_threads()
    torch.set_num_threads(5)  # more than there are cores here
    try:
        with at_most(2):
            assert team_threads(100) == 2 and team_threads(1) == 1 and team_threads(0) == 1
            with at_most(None):
                assert team_threads(100) == 5
        assert team_threads(100) == 5
    finally:
        torch.set_num_threads(before)
