"""The benchmarks by name: one file each, one line here."""

from collections.abc import Sequence
from importlib import import_module

from trl_vlm.evaluation.benchmark import Benchmark
from trl_vlm.evaluation.benchmarks import amber, chair, claims, hallusion, llava_bench, mmhal, object_halbench, pope

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        pope.POPE,
        pope.POPE_V2,
        chair.CHAIR,
        object_halbench.OBJECT_HALBENCH,
        amber.AMBER,
        mmhal.MMHAL,
        mmhal.MMHAL_V,
        llava_bench.COCO,
        llava_bench.IN_THE_WILD,
        hallusion.HALLUSION,
        claims.CLAIMS,
    )
}


def find_benchmark(name: str) -> Benchmark:
    """The benchmark called `name`, or one of another module: `trl_vlm.testbed.benchmark:CAPTIONS`.

    Raises:
        ValueError: There is none, or there are several of this name.
    """
    found = find_benchmarks(name)
    if len(found) != 1:
        raise ValueError(f"{name!r} names {len(found)} benchmarks ({', '.join(each.name for each in found)}).")
    return found[0]


def find_benchmarks(names: str) -> list[Benchmark]:
    """The benchmarks of a list with commas. A name `module:NAME` may stand for several of them.

    Raises:
        ValueError: There is none of a name.
    """
    return [benchmark for name in names.split(",") for benchmark in _found(name.strip())]


def _found(name: str) -> list[Benchmark]:
    if name in BENCHMARKS:
        return [BENCHMARKS[name]]
    module, _, attribute = name.partition(":")
    try:
        value = getattr(import_module(module), attribute) if attribute else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"the benchmark {name!r} cannot be imported: {error}.") from error
    values: Sequence[object] = value if isinstance(value, list | tuple) else [value]
    found = [each for each in values if isinstance(each, Benchmark)]
    if not found or len(found) < len(values):
        raise ValueError(f"there is no benchmark {name!r}. There are: {', '.join(BENCHMARKS)}; or 'module:NAME'.")
    return found
