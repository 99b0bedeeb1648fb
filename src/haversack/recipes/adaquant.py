"""AdaQuant's integer program: bits per layer of least summed damage within a byte budget."""

from __future__ import annotations

from haversack.parts.base import Source
from haversack.recipes.allocation import Allocation, Chosen
from haversack.recipes.base import Recipe


def choose(asked: Allocation) -> Chosen:
    """One choice per site, of the least sum of what each costs alone: solved exactly."""
    import numpy as np
    from scipy.optimize import LinearConstraint, milp
    from scipy.sparse import csr_array

    rows = [(i, choice) for i, site in enumerate(asked.sites) for choice in site.choices]
    place = np.array([i for i, _ in rows])
    once = csr_array((np.ones(len(rows)), (place, np.arange(len(rows)))))
    sizes = np.array([[choice.num_bytes for _, choice in rows]], dtype=float)
    damages = np.array([choice.damage for _, choice in rows])
    found = milp(
        damages * (1e3 / max(damages.max(), 1e-30)),  # HiGHS stops at an absolute gap of 1e-6
        integrality=np.ones(len(rows)),
        bounds=(0, 1),
        constraints=[LinearConstraint(once, 1, 1), LinearConstraint(sizes, -np.inf, asked.capacity_bytes)],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        return (0,) * len(asked.sites)
    starts = np.searchsorted(place, np.arange(len(asked.sites)))
    chosen = tuple(int(np.argmax(found.x[place == i])) for i in range(len(starts)))
    return chosen if asked.fits(chosen) else asked.uniform()  # a tolerance must not break a promise


RECIPE = Recipe(
    id="adaquant",
    resident="weights",
    title="integer programming over what each matrix's options cost alone",
    source=Source(
        "Hubara, Nahshan, Hanani, Banner, Soudry",
        2020,
        "Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming",
        "2006.10518",
        "section 4",
    ),
    options=tuple,
    choose=choose,
)
