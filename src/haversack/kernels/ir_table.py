"""LLVM IR that finds the nearest of a table's values, by one comparison per border between neighbours."""

from __future__ import annotations

from itertools import pairwise

from haversack.kernels.ir import Function, Value, float_constant, lanes_of, splat_constant, vector


def nearest_entry(f: Function, values: Value, table: tuple[float, ...]) -> tuple[Value, Value]:
    """Place and value, both float vectors, of the entry of a rising table nearest to every one of `values`."""
    type_ = values.type
    place, value = splat_constant(type_, "0.0"), splat_constant(type_, float_constant(table[0]))
    for number, (low, high) in enumerate(pairwise(table), 1):
        border = splat_constant(type_, float_constant((low + high) / 2))
        beyond = f.value(vector(lanes_of(type_), "i1"), f"fcmp ogt {values}, {border.name}")
        place = f.value(type_, f"select {beyond}, {splat_constant(type_, f'{number}.0')}, {place}")
        value = f.value(type_, f"select {beyond}, {splat_constant(type_, float_constant(high))}, {value}")
    return place, value
