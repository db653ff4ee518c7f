"""`clip-tools swap`: takes a running server from one named configuration to another, without losing a request."""

import time
from collections.abc import Callable

from clip_tools.errors import ToolError
from clip_tools.repository import check_files, deployment, text_deployment
from clip_tools.serving import key_files
from clip_tools.serving.manifests import check_manifests, check_plans
from clip_tools.serving.model_control import ModelControl
from clip_tools.serving.swap_checks import check_ensemble
from clip_tools.serving.swap_steps import Step, SwapOptions, swap_steps


def check_deployment(url: str, options: SwapOptions) -> None:
    """Raises ToolError for a missing or wrong model file, before the server at `url` is asked to load it.

    The files of a server of this user and machine are checked as by `clip-tools serve`; those of another server only if
    they are also on this machine.
    """
    models, texts = deployment(options.models, options.name), text_deployment(options.models, options.name)
    if key_files.runs_here(url):
        check_files(models)
        check_manifests([*models, *texts])
        check_plans(models)
    else:
        here = [model for model in [*models, *texts] if model.file and model.file.is_file()]
        check_manifests(here, backends=("onnxruntime", "tensorrt"))


def swap(control: ModelControl, options: SwapOptions, say: Callable[[str], None]) -> None:
    """Do the steps, and `say` each. If one fails, undo those done and raise ToolError with the step and the reason."""
    steps = swap_steps(control, options)
    if not steps:
        say(f"the server runs {options.name} already")
    done: list[Step] = []
    for number, step in enumerate(steps, start=1):
        started = time.monotonic()
        try:
            note = step.do()
        except BaseException as error:
            undone = _undo(control, options, [*done, *([step] if step.undo_own_failure else [])], say)
            if not isinstance(error, ToolError):
                raise
            raise ToolError(
                f"swap to {options.name} failed at step {number} of {len(steps)} ({step.title}): {error}; {undone}",
                exit_code=error.exit_code,
            ) from error
        done.append(step)
        say(f"{number}/{len(steps)} {step.title}{f': {note}' if note else ''} ({time.monotonic() - started:.1f} s)")
    control.forget_failures(_model_names(options))  # of an earlier swap


def _undo(control: ModelControl, options: SwapOptions, done: list[Step], say: Callable[[str], None]) -> str:
    """Undo the steps, last first; one line about the state of the server."""
    failed = []
    for step in reversed(done):
        if step.undo is None:
            continue
        try:
            step.undo()
            say(f"undone: {step.title}")
        except ToolError as error:
            failed.append(f"{step.title}: {error}")
            break  # an ensemble that was not restored still needs the model that would be unloaded next
    try:
        check_ensemble(control)
        control.forget_failures(_model_names(options))
    except ToolError as error:
        failed.append(str(error))
    if failed:
        return f"and it could not be undone ({'; '.join(failed)}): restart the server"
    return "everything is as before"


def _model_names(options: SwapOptions) -> list[str]:
    return sorted(path.parent.name for path in options.models.glob("*/config.pbtxt"))
