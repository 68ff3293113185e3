"""A fleet of home PCs on a simulated clock: the gateway's own ordering against simple policies and an oracle.

`python -m benchmarks.fleet_sim` runs 10 seeds at 2, 6 and 10 jobs a second and prints medians and ratios; `--seeds 1`
is quicker. `--results FILE` keeps every run as a line of JSON and skips those that are in it already; `--plots FOLDER`
draws them. `--large` runs 10 minutes of 10,000 nodes at 600 jobs a second instead.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.fleet.product import Fanlight
from benchmarks.fleet.run import Policy, Result, Simulation
from benchmarks.fleet.simple import AffinityWithSpill, LeastLoaded, Oracle, Random
from benchmarks.fleet.world import Options
from services.gateway.ordering.replication import Replication, Terms

# Seeds below it are for choosing prices and thresholds.
FIRST_SEED = 101
RATES = (2.0, 6.0, 10.0)
# Seconds of waiting work above which the affinity policy spills over, by rate: of several those with its least median
# p95; with less it never comes out of fetching after the cold start. As published, then on Fanlight's own workers.
SPILL_PLAIN_S = {2.0: 25.0, 6.0: 120.0, 10.0: 360.0}
SPILL_S = {2.0: 30.0, 6.0: 120.0, 10.0: 360.0}
# Where a result line keeps this many of its latencies, for plots.
KEPT = 400

Maker = Callable[[Simulation, int], Policy]
FANLIGHT, SPILL, ORACLE, LEAST = "fanlight", "affinity with spill", "oracle", "least loaded"
ASKED, OURS = "fanlight, nothing unasked", "affinity with spill, our workers"


def only_asked(simulation: Simulation, seed: int) -> Policy:
    policy = Fanlight(simulation, seed, Replication(Terms(unasked_share=0.0)))
    policy.name = ASKED
    return policy


def spill(simulation: Simulation, seed: int) -> Policy:
    return AffinityWithSpill(simulation, seed, threshold_s(SPILL_PLAIN_S, simulation))


def spill_on_ours(simulation: Simulation, seed: int) -> Policy:
    policy = AffinityWithSpill(simulation, seed, threshold_s(SPILL_S, simulation), with_loras=True)
    policy.name = OURS
    return policy


def threshold_s(tuned: Mapping[float, float], simulation: Simulation) -> float:
    """Of the tuned rate that is nearest."""
    rate = min(tuned, key=lambda each: abs(each - simulation.options.rate_per_s))
    return tuned[rate]


MAKERS: dict[str, Maker] = {
    ORACLE: Oracle,
    FANLIGHT: Fanlight,
    ASKED: only_asked,
    SPILL: spill,
    OURS: spill_on_ours,
    LEAST: LeastLoaded,
    "random": Random,
}


def run(name: str, options: Options, seed: int) -> Result:
    options = replace(options, plain_workers=name == SPILL)
    simulation = Simulation(options, seed)
    return simulation.run(MAKERS[name](simulation, seed), seed)


def runs(names: Sequence[str], rates: Sequence[float], seeds: Sequence[int], path: Path | None) -> Iterator[Result]:
    done = {(r.policy, r.rate_per_s, r.seed): r for r in (load(path) if path and path.exists() else [])}
    yield from done.values()
    for seed in seeds:
        for rate in rates:
            for name in names:
                if (name, rate, seed) not in done:
                    began_s = time.process_time()
                    result = run(name, Options(rate_per_s=rate), seed)
                    print(line(result), f"[{time.process_time() - began_s:.0f} s of CPU]", flush=True)
                    if path:
                        keep(result, path)
                    yield result


def load(path: Path) -> list[Result]:
    return [Result(**json.loads(text)) for text in path.read_text().splitlines()]


def keep(result: Result, path: Path) -> None:
    latencies_s = result.latencies_s
    step = max(1, len(latencies_s) // KEPT)
    with path.open("a") as file:
        file.write(json.dumps(asdict(replace(result, latencies_s=[round(x, 2) for x in latencies_s[::step]]))) + "\n")


def line(result: Result) -> str:
    return (
        f"{result.policy:35} {result.rate_per_s:4.0f}/s seed {result.seed}: p50 {result.p50_s:6.1f}"
        f"  p95 {result.p95_s:7.1f}  p99 {result.p99_s:7.1f} s  {result.gb_per_1000:6.1f} GB/1,000"
        f"  done {result.done:.3f}"
    )


def median_of(results: Sequence[Result], name: str, rate: float) -> Result | None:
    """The median of each figure over the seeds."""
    found = [each for each in results if each.policy == name and each.rate_per_s == rate]
    if not found:
        return None
    medians = {
        field: statistics.median(getattr(each, field) for each in found)
        for field in ("p50_s", "p95_s", "p99_s", "gb_per_1000", "done")
    }
    return replace(found[0], seed=len(found), latencies_s=(), **medians)


def report(results: Sequence[Result], rates: Sequence[float]) -> None:
    for rate in rates:
        print(f"\nmedians at {rate:.0f} jobs a second (seed: how many)")
        medians = {name: found for name in MAKERS if (found := median_of(results, name, rate))}
        for found in medians.values():
            print(line(found))
        for ours in (FANLIGHT, ASKED):
            for other in (ORACLE, SPILL, OURS, LEAST):
                if ours in medians and other in medians:
                    print(ratios(medians[ours], medians[other]))


def ratios(ours: Result, other: Result) -> str:
    parts = [f"{name} {getattr(ours, f'{name}_s') / getattr(other, f'{name}_s'):.3f}" for name in ("p50", "p95", "p99")]
    if other.gb_per_1000:
        parts.append(f"bytes {ours.gb_per_1000 / other.gb_per_1000:.2f}")
    return f"  {ours.policy} / {other.policy}: {', '.join(parts)}"


def large() -> None:
    options = Options(nodes=10_000, rate_per_s=600.0, duration_s=600.0, warm_up_s=300.0, drain_s=300.0)
    began_s, used_s = time.perf_counter(), time.process_time()
    result = run(FANLIGHT, options, FIRST_SEED)
    print(line(result))
    print(f"{time.perf_counter() - began_s:.0f} s, {time.process_time() - used_s:.0f} s of CPU,", end=" ")
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--rates", type=lambda text: [float(each) for each in text.split(",")], default=list(RATES))
    parser.add_argument("--policies", type=lambda text: text.split(";"), default=list(MAKERS))
    parser.add_argument("--results", type=Path)
    parser.add_argument("--plots", type=Path)
    parser.add_argument("--large", action="store_true")
    options = parser.parse_args()
    if options.large:
        large()
        return
    seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)
    results = list(runs(options.policies, options.rates, seeds, options.results))
    report(results, options.rates)
    if options.plots:
        from benchmarks.fleet.plots import draw

        draw(results, options.rates, options.plots)


if __name__ == "__main__":
    main()
