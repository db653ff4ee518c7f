"""`clip-tools libraries`."""

from clip_tools.cli.options import Output, measured, takes
from clip_tools.measuring.options import LibrariesOptions
from clip_tools.paths import RESULTS


@takes(LibrariesOptions)
def libraries(options: LibrariesOptions, output: Output = RESULTS / "libraries.json") -> None:
    """Measure how fast `clip-embed search` and `duplicates` are, and which edits they find at which threshold."""
    from clip_tools.measuring import libraries as verb

    measured(verb.libraries, options, output)
