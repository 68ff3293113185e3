"""A fleet of home PCs on a simulated clock: the gateway's own ordering against simple policies and an oracle.

`python -m benchmarks.fleet_sim` runs 10 seeds at 2, 6 and 10 jobs a second and prints medians and ratios; `--seeds 1`
is quicker. `--results FILE` keeps every run as a line of JSON and skips those that are in it already; `--plots FOLDER`
draws them. `--large` runs 10 minutes of 10,000 nodes at 600 jobs a second instead.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.figures import RATIO, Report, arguments
from benchmarks.fleet.product import Fanlight
from benchmarks.fleet.run import Policy, Result, Simulation
from benchmarks.fleet.simple import AffinityWithSpill, LeastLoaded, Oracle, Random
from benchmarks.fleet.world import Options
from services.gateway.scheduler.replication import Replication, ReplicationPolicy

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
    policy = Fanlight(simulation, seed, Replication(ReplicationPolicy(speculative_share=0.0)))
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


def runs(
    names: Sequence[str], rates: Sequence[float], seeds: Sequence[int], path: Path | None, shape: Options
) -> Iterator[Result]:
    done = {(r.policy, r.rate_per_s, r.seed): r for r in (load(path) if path and path.exists() else [])}
    yield from done.values()
    for seed in seeds:
        for rate in rates:
            for name in names:
                if (name, rate, seed) not in done:
                    began_s = time.process_time()
                    result = run(name, replace(shape, rate_per_s=rate), seed)
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


# Goals of Fanlight's medians over another policy's, by the policy, the figure and the rate; 0: at every rate.
GOALS: dict[tuple[str, str, float], float] = {
    (LEAST, "p95", 2.0): 0.01,
    (LEAST, "bytes", 2.0): 0.15,
    (SPILL, "p95", 0.0): 0.6,
    (SPILL, "p99", 0.0): 0.2,
    (SPILL, "bytes", 0.0): 1.8,
    (ORACLE, "p50", 0.0): 1.5,
    (ORACLE, "p95", 0.0): 4.0,
}


def add(results: Sequence[Result], rates: Sequence[float], report: Report) -> None:
    """Of each policy the medians over seeds with the least and the most, then Fanlight's over the others'."""
    for rate in rates:
        for name in MAKERS:
            found = [each for each in results if each.policy == name and each.rate_per_s == rate]
            if found:
                row = f"{rate:.0f} jobs a second, {name}, {len(found)} seeds"
                for share in ("p50", "p95", "p99"):
                    report.add(row, [getattr(each, f"{share}_s") for each in found], "s", column=share)
                report.add(row, [each.gb_per_1000 for each in found], "GB", column="for 1,000 jobs")
                report.add(row, statistics.median(each.done for each in found), "", column="share that was done")
    for rate in rates:
        ours = median_of(results, FANLIGHT, rate)
        for other in (ORACLE, SPILL, OURS, LEAST):
            theirs = median_of(results, other, rate)
            if ours and theirs:
                add_ratios(ours, theirs, report)


def add_ratios(ours: Result, theirs: Result, report: Report) -> None:
    ratios = {name: getattr(ours, f"{name}_s") / getattr(theirs, f"{name}_s") for name in ("p50", "p95", "p99")}
    if theirs.gb_per_1000:
        ratios["bytes"] = ours.gb_per_1000 / theirs.gb_per_1000
    for name, ratio in ratios.items():
        goal = GOALS.get((theirs.policy, name, 0.0), GOALS.get((theirs.policy, name, ours.rate_per_s)))
        row = f"{ours.rate_per_s:.0f} jobs a second, {ours.policy} over {theirs.policy}"
        report.add(row, ratio, RATIO, column="for 1,000 jobs" if name == "bytes" else name, goal=goal)


def large(report: Report, *, smoke: bool) -> None:
    options = Options(nodes=10_000, rate_per_s=600.0, duration_s=600.0, warm_up_s=300.0, drain_s=300.0)
    if smoke:
        options = replace(options, nodes=100, rate_per_s=6.0, duration_s=60.0, warm_up_s=30.0, drain_s=30.0)
    began_s, used_s = time.perf_counter(), time.process_time()
    result = run(FANLIGHT, options, FIRST_SEED)
    what = f"{options.nodes:,} nodes, {options.duration_s * options.rate_per_s:,.0f} jobs"
    report.add(f"{what}, simulated in", time.perf_counter() - began_s, "s")
    report.add(f"{what}, of CPU", time.process_time() - used_s, "s")
    report.add(f"{what}, memory at most", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, "GB")
    report.add(f"{what}, share done {options.drain_s:.0f} s after the last one came", result.done, "")


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--rates", type=lambda text: [float(each) for each in text.split(",")], default=list(RATES))
    parser.add_argument("--policies", type=lambda text: text.split(";"), default=list(MAKERS))
    parser.add_argument("--results", type=Path)
    parser.add_argument("--plots", type=Path)
    parser.add_argument("--large", action="store_true")
    asked = parser.parse_args(argv)
    report = Report()
    if asked.large:
        large(report, smoke=asked.smoke)
    else:
        simulate(asked, report)
    report.save(asked.json)
    return 0


def simulate(asked: argparse.Namespace, report: Report) -> None:
    seeds, rates, shape = range(FIRST_SEED, FIRST_SEED + asked.seeds), asked.rates, Options()
    if asked.smoke:
        seeds, rates, shape = (
            seeds[:1],
            rates[:1],
            replace(shape, nodes=20, duration_s=120.0, warm_up_s=30.0, drain_s=60.0),
        )
    results = list(runs(asked.policies, rates, seeds, asked.results, shape))
    add(results, rates, report)
    if asked.plots:
        from benchmarks.fleet.plots import draw

        draw(results, rates, asked.plots)


if __name__ == "__main__":
    sys.exit(main())
