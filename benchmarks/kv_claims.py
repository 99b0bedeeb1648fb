"""What single cache recipes claim, each against its own ablation in as many bytes, models A and B.

episodes    conversations that return to two topics: one cache per topic, against one for all, of the same bytes in memory (`epicache`)
surprise    facts early in a text, and the loss along a stream three times as long as the model's positions, against a window (`sirllm`)
merging     freed tokens folded into kept ones, against dropping them, by one score (`elastic-cache`, `kvmerger`)
tables      3-bit keys and values with keys turned back before they are packed, against keys as they are stored (`kvquant`)
stretches   needles, against single tokens by the same score (`windowkv`)
sparse      the loss at shares of the cache, against a window (`alisa`)

Divergences are KL in nats from the same model with a whole cache: per answer token of probes, or per token of foreign prose. Intervals are paired 95% bootstraps of
the recipe less its ablation, so that below zero is better. Bytes are all that the cache declares.

    python -m benchmarks.kv_claims [--models a b] [--only CLAIM ...]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch

from benchmarks.results_file import write_results
from haversack import data
from haversack.cost.calibrated import open_tokenizer, token_ids_of, tokenize
from haversack.describe.model import Model, describe_model
from haversack.engine.attention_statistics import AttentionStatistics
from haversack.engine.kv_cache import HaversackCache, KVPlan
from haversack.engine.measure import DamageMeter, paired_bootstrap
from haversack.engine.probe_meter import ProbeMeter, Score
from haversack.engine.quiet import quiet_transformers
from haversack.engine.reading import Reader
from haversack.parts.kv.anchor_merging import AnchorMerge
from haversack.parts.kv.base import Demote, KVOption
from haversack.parts.kv.heavy_hitters import HeavyHitters
from haversack.parts.kv.kernel_merging import KernelMerge
from haversack.parts.kv.latest_attention import LatestAttention
from haversack.parts.kv.non_uniform import NonUniformKV
from haversack.parts.kv.sinks import SinksAndWindow
from haversack.parts.kv.token_windows import TokenWindows
from haversack.probes.suite import Task, make_conversations, make_suite
from haversack.recipes.base import all_recipes
from haversack.recipes.cache_budget import SINK_TOKENS, CacheBudget, Options, selection

CONTEXT_TOKENS, NUM_PER_KIND = 768, 3
CONVERSATION_TOKENS, NUM_TOPICS, NUM_CONVERSATIONS = 600, 2, 4
NUM_SEQUENCES, SEQ_LEN = 4, 768
STREAM_TOKENS, PIECE_TOKENS = 6144, 1024

Figure = dict[str, Any]


class Bench:
    """One model, its probes and its text."""

    def __init__(self, name: str):
        self.name = name
        self.model: Model = describe_model(data.reference_model(name))  # type: ignore[arg-type]
        ids = tokenize(self.model, data.text("foreign-prose"), num_tokens=NUM_SEQUENCES * SEQ_LEN, seq_len=SEQ_LEN)
        self.text = DamageMeter(self.model, ids)
        self.module = self.text.model
        self.tokenizer = open_tokenizer(self.model)

    def meter(self, tasks: Sequence[Task]) -> ProbeMeter:
        return ProbeMeter(self.module, self.model.attention, self.model.dtype, tasks)

    def budget(self, share: float, capacity_tokens: int, statistics: AttentionStatistics | None = None) -> CacheBudget:
        whole = sum(site.bytes_per_token("BF16") for site in self.model.attention) * capacity_tokens
        return CacheBudget(self.model.attention, capacity_tokens, self.model.dtype, int(share * whole), statistics)

    def share(self, options: Options, capacity_tokens: int) -> float:
        whole = sum(site.bytes_per_token("BF16") for site in self.model.attention) * capacity_tokens
        return self.budget(1.0, capacity_tokens).bytes_of(options) / whole

    def asked(self, meter: ProbeMeter, options: Options) -> list[Score]:
        by_site = dict(zip((site.id for site in self.model.attention), options, strict=True))
        return meter.scores(by_site, asked=("after",))

    def read(self, options: Options) -> torch.Tensor:
        """KL at every token of the text, `(sequences, tokens)`."""
        return self.text.kl_per_token({}, dict(zip((site.id for site in self.model.attention), options, strict=True)))

    def suite(self) -> tuple[Task, ...]:
        with quiet_transformers():
            return make_suite(
                self.tokenizer, data.text("foreign-prose"), context_tokens=CONTEXT_TOKENS, num_per_kind=NUM_PER_KIND
            )


def episodes(bench: Bench) -> Iterator[Figure]:
    """Layer budgets come from other conversations than those that judge."""
    sizes = {"context_tokens": CONVERSATION_TOKENS, "num_topics": NUM_TOPICS}
    meter = bench.meter(make_conversations(bench.tokenizer, num_conversations=NUM_CONVERSATIONS, **sizes))
    others = make_conversations(bench.tokenizer, num_conversations=1, seed=1, **sizes)
    statistics = AttentionStatistics(bench.module, bench.model.attention, bench.model.dtype, others)
    for share in (0.3, 0.25):
        budget = bench.budget(share, meter.capacity_tokens, statistics)
        recipe = all_recipes()["epicache"].whole_cache
        assert recipe is not None
        episodic = recipe(budget)
        single = tuple(_as_latest(option) for option in episodic)
        rows = {
            "epicache": episodic,
            "one cache for all": single,
            "heavy hitters": budget.everywhere(lambda n: KVOption(selection(HeavyHitters, n))),
            "window": budget.everywhere(lambda n: KVOption(SinksAndWindow(SINK_TOKENS, n))),
        }
        yield from _asked(bench, meter, "episodes", rows, against="one cache for all")


def _as_latest(option: KVOption) -> KVOption:
    """The same layer without guides: what is left of the recipe when all topics share one cache."""
    score = option.score
    assert score is not None
    fields = {
        name: getattr(score, name) for name in ("sink_tokens", "selected_tokens", "recent_tokens", "block_tokens")
    }
    return replace(option, score=LatestAttention(**fields))


def surprise(bench: Bench) -> Iterator[Figure]:
    meter = bench.meter([task for task in bench.suite() if task.kind in ("needle", "several questions")])
    recipe = all_recipes()["sirllm"].whole_cache
    assert recipe is not None
    for share in (0.5, 0.25):
        budget = bench.budget(share, meter.capacity_tokens)
        rows = {
            "sirllm": recipe(budget),
            "window": budget.everywhere(lambda n: KVOption(SinksAndWindow(SINK_TOKENS, n))),
        }
        yield from _asked(bench, meter, "surprise", rows, against="window")
    ids = [int(token) for token in token_ids_of(bench.model, data.text("foreign-prose"))[:STREAM_TOKENS]]
    for name, options in rows.items():
        losses, held = _stream(bench, options, ids)
        yield {
            "model": bench.name,
            "claim": "stream",
            "cache": name,
            "share_held": bench.share(options, meter.capacity_tokens),
            "bytes": held,
            "nll_by_piece": losses,
        }


def _stream(bench: Bench, options: Options, ids: Sequence[int]) -> tuple[list[float], list[int]]:
    """Nats per token of each piece of a stream, and the bytes held after each."""
    cache = HaversackCache(KVPlan(bench.model.attention, options, 1, len(ids), bench.model.dtype))
    reader = Reader(bench.module, cache, chunk_tokens=64, all_logits=True)
    logits: list[torch.Tensor] = []
    losses, held = [], []
    for chunk in reader.chunks(ids):
        logits.append(reader.read(chunk))
        count = cache.get_seq_length()
        if count % PIECE_TOKENS == 0:
            found = torch.cat(logits)[:-1]  # nobody foretold a piece's first token
            losses.append(
                float(
                    torch.nn.functional.cross_entropy(
                        found.float(), torch.tensor(ids[count - PIECE_TOKENS + 1 : count])
                    )
                )
            )
            held.append(cache.num_bytes())
            logits.clear()
    return losses, held


def merging(bench: Bench) -> Iterator[Figure]:
    ways: dict[str, Demote | None] = {"dropping": None, "elastic-cache": AnchorMerge(), "kvmerger": KernelMerge()}
    for share in (0.75, 0.5, 0.35):
        budget = bench.budget(share, SEQ_LEN)
        rows = {
            name: budget.everywhere(lambda n: KVOption(selection(HeavyHitters, n), demote=way))  # noqa: B023
            for name, way in ways.items()
        }
        yield from _read(bench, "merging", rows, against="dropping")


def tables(bench: Bench) -> Iterator[Figure]:
    tasks = [task for task in bench.suite() if task.announced][:4]
    statistics = AttentionStatistics(bench.module, bench.model.attention, bench.model.dtype, tasks)
    rows: dict[str, Options] = {}
    for bits in (2, 3):
        for turned, name in ((True, "kvquant"), (False, "as stored")):
            part = NonUniformKV(bits, 32, 0, 1, before_rotation=turned)
            fitted = [replace(part, key_table=k, value_table=v) for k, v in statistics.tables(part)]
            rows[name] = tuple(KVOption(represent=one) for one in fitted)
        yield from _read(bench, f"tables of {bits} bits", rows, against="as stored")


def stretches(bench: Bench) -> Iterator[Figure]:
    meter = bench.meter([task for task in bench.suite() if task.kind == "needle"])
    for share in (0.25, 0.12):
        budget = bench.budget(share, meter.capacity_tokens)
        rows = {
            "windowkv": budget.everywhere(lambda n: KVOption(selection(TokenWindows, n))),
            "single tokens": budget.everywhere(lambda n: KVOption(selection(LatestAttention, n))),
        }
        yield from _asked(bench, meter, "stretches", rows, against="single tokens")


def sparse(bench: Bench) -> Iterator[Figure]:
    for share in (0.5, 0.25):
        budget = bench.budget(share, SEQ_LEN)
        rows = {
            "alisa": budget.everywhere(lambda n: KVOption(selection(LatestAttention, n))),
            "window": budget.everywhere(lambda n: KVOption(SinksAndWindow(SINK_TOKENS, n))),
        }
        yield from _read(bench, "sparse", rows, against="window")


def _asked(bench: Bench, meter: ProbeMeter, claim: str, rows: dict[str, Options], *, against: str) -> Iterator[Figure]:
    scores = {name: bench.asked(meter, options) for name, options in rows.items()}
    for name, options in rows.items():
        found = [score.kl for score in scores[name]]
        yield _figure(
            bench,
            claim,
            name,
            bench.share(options, meter.capacity_tokens),
            torch.tensor(found)[:, None],
            None if name == against else torch.tensor([score.kl for score in scores[against]])[:, None],
            block_tokens=1,
            exact=fmean(bool(score.exact) for score in scores[name]),
            nll=fmean(score.nll for score in scores[name]),
            filed_bytes=max(score.filed_bytes for score in scores[name]),
            label=" | ".join(dict.fromkeys(option.label for option in options)),
        )


def _read(bench: Bench, claim: str, rows: dict[str, Options], *, against: str) -> Iterator[Figure]:
    kl = {name: bench.read(options) for name, options in rows.items()}
    whole = bench.text.log_likelihood()
    for name, options in rows.items():
        by_site = dict(zip((site.id for site in bench.model.attention), options, strict=True))
        yield _figure(
            bench,
            claim,
            name,
            bench.share(options, SEQ_LEN),
            kl[name],
            None if name == against else kl[against],
            block_tokens=64,
            nll=-bench.text.log_likelihood(kv=by_site),
            whole_nll=-whole,
        )


def _figure(
    bench: Bench,
    claim: str,
    name: str,
    share: float,
    kl: torch.Tensor,
    other: torch.Tensor | None,
    *,
    block_tokens: int,
    **more: Any,
) -> Figure:
    gap = None if other is None else paired_bootstrap(kl, other, block_tokens=block_tokens)
    return {
        "model": bench.name,
        "claim": claim,
        "cache": name,
        "share_held": share,
        "kl": float(kl.mean()),
        "minus_ablation_95": gap,
        **more,
    }


def table(figures: Sequence[Figure], name: str) -> dict[str, Any]:
    """A model's rows, those of a stream apart."""
    rows = []
    for row in figures:
        if row["model"] != name or row["claim"] == "stream":
            continue
        gap = row["minus_ablation_95"]
        said = "" if gap is None else f"{gap[0]:+.4f} to {gap[1]:+.4f}"
        exact = f"{row['exact']:.0%}" if "exact" in row else ""
        rows.append(
            [
                row["claim"],
                row["cache"],
                f"{row['share_held']:.1%}",
                f"{row['kl']:.4f}",
                said,
                exact,
                f"{row['nll']:.4f}",
            ]
        )
    columns = ["claim", "cache", "held", "KL", "KL minus its ablation's, 95%", "exact", "loss"]
    return {"title": f"model {name}, nats per token", "columns": columns, "rows": rows}


def stream_table(figures: Sequence[Figure]) -> dict[str, Any]:
    streams = [row for row in figures if row["claim"] == "stream"]
    ends = [f"{(i + 1) * PIECE_TOKENS} tokens" for i in range(STREAM_TOKENS // PIECE_TOKENS)]
    rows = [
        [f"{row['model']}, {row['cache']}", str(max(row["bytes"])), *(f"{x:.3f}" for x in row["nll_by_piece"])]
        for row in streams
    ]
    columns = ["cache", "most bytes", *ends]
    return {
        "title": "loss along a stream, nats per token of each piece that ends there",
        "columns": columns,
        "rows": rows,
    }


CLAIMS: dict[str, Callable[[Bench], Iterator[Figure]]] = {
    claim.__name__: claim for claim in (episodes, surprise, merging, tables, stretches, sparse)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["a", "b"], choices=["a", "b"])
    parser.add_argument("--only", nargs="*", choices=list(CLAIMS), help="the results file is written only without it")
    arguments = parser.parse_args()
    figures: list[Figure] = []
    for name in arguments.models:
        bench = Bench(name)
        for claim in arguments.only or CLAIMS:
            for figure in CLAIMS[claim](bench):
                figures.append(figure)
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in figure.items()}, flush=True)
    if not arguments.only and len(arguments.models) == 2:
        print(
            write_results(
                "kv_claims", figures, tables=[table(figures, "a"), table(figures, "b"), stream_table(figures)]
            )
        )


if __name__ == "__main__":
    main()
