"""`clip-tools sweep`."""

from clip_tools.cli.options import Output, apply_best, measured, takes
from clip_tools.measuring.options import SweepOptions
from clip_tools.paths import RESULTS


@takes(SweepOptions)
def sweep(options: SweepOptions, output: Output = RESULTS / "sweep.json") -> None:
    """Search for the best batch limit, queue delay, instances and threads with perf_analyzer; checks Model Analyzer."""
    from clip_tools.measuring import sweep as verb

    apply_best(measured(verb.sweep, options, output, "sweep"), options.apply, options.models)
