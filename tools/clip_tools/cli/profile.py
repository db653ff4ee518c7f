"""`clip-tools profile`."""

from clip_tools.cli.options import Output, apply_best, measured, takes
from clip_tools.measuring.options import ProfileOptions
from clip_tools.paths import RESULTS


@takes(ProfileOptions)
def profile(options: ProfileOptions, output: Output = RESULTS / "profile.json") -> None:
    """Search for the best configuration of the ensemble with the real Model Analyzer."""
    from clip_tools.measuring import profile as verb

    apply_best(measured(verb.profile, options, output, "model-analyzer"), options.apply, options.models)
