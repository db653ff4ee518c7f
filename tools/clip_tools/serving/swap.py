"""`clip-tools swap`: a running server goes from one named configuration to another, and no request is lost."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_embed.served import Served
from clip_tools.errors import ToolError
from clip_tools.paths import MODELS
from clip_tools.repository import ENSEMBLE, TEXT_ENSEMBLE, Model, check_files, deployment, text_deployment
from clip_tools.serving import keyring
from clip_tools.serving.machine import Machine
from clip_tools.serving.manifests import check_manifests, check_towers
from clip_tools.serving.model_control import ModelControl
from clip_tools.serving.proof import check_text_vectors, check_vectors
from clip_tools.serving.serve import PROBE_TEXT, check_plans, probe_image
from clip_tools.serving.told import tell
from clip_tools.serving.towers import Towers
from clip_tools.verification.engine import Engine
from clip_tools.verification.sample import Sample

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# Not a gate of precision, which is what `clip-tools verify` has: on the probe BF16 read 0.9998 to FP32 (ViT-B-32 shape,
# OpenAI's weights), and other weights -0.07.
MIN_COSINE_OF_SAME_WEIGHTS = 0.8

_DRAIN_LIMIT_S = 60.0
_POLL_S = 0.1
_NO_ROOM = ("Exceeds maximum queue size", "Request timeout expired")  # Triton's words


@dataclass(frozen=True)
class SwapOptions:
    """What to swap to. `name` is a named configuration; `models` is this side's copy of the server's repository.

    `check_vectors` holds the new engine to open_clip's embeddings of the export's sample.
    """

    name: str
    models: Path = MODELS
    settle_s: float = 2.0
    allow_other_weights: bool = False
    check_vectors: bool = False


@dataclass(frozen=True)
class Step:
    """One change or check; `do` may return a remark. `undo` is for when a later step fails, or this one itself with
    `undo_own_failure`.
    """

    title: str
    do: Callable[[], str | None]
    undo: Callable[[], None] | None = None
    undo_own_failure: bool = False


def check_deployment(url: str, options: SwapOptions) -> None:
    """Raises ToolError for a file that cannot be what the server at `url` is to load, before it is asked to.

    A server that this user runs here is held to what `clip-tools serve` asks. Of another one's files only those that
    are also here are looked at.
    """
    models, texts = deployment(options.models, options.name), text_deployment(options.models, options.name)
    if keyring.runs_here(url):
        check_files(models)
        check_manifests([*models, *texts])
        check_plans(models)
    else:
        here = [model for model in [*models, *texts] if model.file and model.file.is_file()]
        check_manifests(here, backends=("onnxruntime", "tensorrt"))


def same_configuration(present: Any, wanted: Any) -> bool:
    """Whether a model that has `present`, as a server completed it, need not be loaded again for `wanted`, from a file.

    When in doubt, no: loading a model again with the configuration that it has costs time and changes nothing.
    """
    plain = []
    for config in (present, wanted):
        one = type(config)()
        one.CopyFrom(config)
        for field in ("name", "platform", "backend", "runtime", "version_policy", "model_transaction_policy"):
            one.ClearField(field)
        if one.default_model_filename in ("model.onnx", "model.plan", "model.py"):
            one.ClearField("default_model_filename")
        for group in one.instance_group:
            group.ClearField("name")
            if not any(wish.kind for wish in wanted.instance_group):  # KIND_AUTO: the server has chosen
                group.ClearField("kind")
                group.ClearField("gpus")
        del one.model_warmup[:]  # what is loaded is warm
        for memory in ("input_pinned_memory", "output_pinned_memory"):
            one.optimization.ClearField(memory)
        if one.HasField("dynamic_batching") and list(one.dynamic_batching.preferred_batch_size) == [one.max_batch_size]:
            one.dynamic_batching.ClearField("preferred_batch_size")
        one.optimization.SetInParent()
        plain.append(one)
    return bool(plain[0] == plain[1])


def check_embeds(control: ModelControl, model: str, like: "npt.NDArray[np.float32] | None") -> None:
    """Raises ToolError unless `model` gives unit vectors for two images; with `like`, the same weights' as those."""
    import numpy as np

    got = _embed_probe(control, model)
    if got.ndim != 2 or len(got) != 2 or not np.allclose(np.linalg.norm(got, axis=1), 1, atol=1e-2):
        raise ToolError(f"{model} answers {got.shape}, norm {np.linalg.norm(got):.3f}, where two unit vectors were due")
    cosine = 1.0 if like is None else float((got * like).sum(axis=1).min()) if got.shape == like.shape else 0.0
    if cosine < MIN_COSINE_OF_SAME_WEIGHTS:
        raise ToolError(
            f"{model} was built from other weights: its vectors have cosine {cosine:.2f} to those served now, and an "
            "index that holds both is worthless; build it from the same export, or give --allow-other-weights"
        )


def _embed_probe(control: ModelControl, model: str) -> "npt.NDArray[np.float32]":
    """One by one, since an engine may take no batch."""
    side = control.configuration(model).input[0].dims[0]
    return _answers(partial(control.embed_pixels, model, pixels[None]) for pixels in probe_pixels(side))


def probe_pixels(side: int = 224) -> "npt.NDArray[np.uint8]":
    """Two different images, (2, side, side, 3) uint8 RGB: colours that run across and down, and the first mirrored."""
    import numpy as np

    ramp = np.linspace(0, 255, side, dtype=np.uint8)
    across, down = np.meshgrid(ramp, ramp)
    image = np.stack([across, down, 255 - across], axis=-1)
    return np.stack([image, image[:, ::-1]])


def plan_swap(control: ModelControl, options: SwapOptions) -> list[Step]:
    """The steps from what the server runs now to the configuration asked for; none when it runs that already.

    A model that is new is loaded beside the present one and asked before the ensemble changes. A model of the same name
    is loaded again in place: Triton makes the new one ready first, then moves the requests over; so it can be asked
    only when it serves already, and one that does not load changes nothing. The text tower of a server that has one is
    loaded again where it is configured otherwise, or where the weights may be others.

    Raises ToolError when the text tower is of other weights than the engine asked for, or both than what is served.
    """
    models = deployment(options.models, options.name)
    towers = Towers.of(options.models, options.name)
    for model in models:
        towers.fit(model.config)
    tell(models)
    *wanted, ensemble = models
    before = control.configuration(ENSEMBLE)
    if not options.allow_other_weights:
        _check_weights(before, ensemble.config)
    ready = set(control.ready_models())
    texts = text_deployment(options.models, options.name) if TEXT_ENSEMBLE in ready else []
    check_towers([*wanted, ensemble], texts)
    present = [step.model_name for step in before.ensemble_scheduling.step if step.model_name in ready]
    like = None
    if present and not options.allow_other_weights:
        like = _embed_probe(control, present[-1])
    steps: list[Step] = []
    machine = _machine_of([control.configuration(name) for name in present])
    for model in wanted:
        old = control.configuration(model.name) if model.name in ready else None
        machine.fit(model.config, old)
        if old is not None and same_configuration(old, model.config):
            continue
        steps.append(_load(control, model.name, model.config, old))
        if model is wanted[-1]:
            steps.append(
                Step(f"{model.name} embeds", lambda name=model.name: check_embeds(control, name, like))  # type: ignore[misc]
            )
            if options.check_vectors:
                steps.append(
                    Step(f"{model.name} held to open_clip", partial(_check_vectors, control, options, model.name))
                )
    if not same_configuration(before, ensemble.config):
        steps.append(
            Step(
                f"{ENSEMBLE} goes through {wanted[-1].name}",
                lambda: control.load(ENSEMBLE, ensemble.config),
                undo=lambda: control.load(ENSEMBLE, before),
                undo_own_failure=True,  # Triton unloads an ensemble whose new configuration does not load
            )
        )
    steps += _text_steps(control, options, texts, machine)
    if steps:
        steps.append(Step(f"{ENSEMBLE} embeds", lambda: _check_ensemble(control)))
        if options.check_vectors:
            steps.append(Step(f"{ENSEMBLE} held to open_clip", partial(_check_vectors, control, options)))
    in_use = {model.name for model in wanted} | _used_by_others(control, ready)
    for name in present:
        if name not in in_use:
            steps.append(_retire(control, name, control.configuration(name), options.settle_s))
    return steps


def _check_weights(before: Any, asked: Any) -> None:
    """Raises ToolError where the ensembles' configurations say that the weights are not the same.

    Loading any model reads its file again, so an export under a running server must not slip in with a swap.
    """
    served, found = (
        Served.of({name: one.string_value for name, one in config.parameters.items()}).provenance
        for config in (before, asked)
    )
    if served and found and not served.has_weights_of(found):
        raise ToolError(
            f"expected the weights that are served, {served}, found files of {found}: their vectors do not belong in "
            "one index. Export the served weights again, or swap with --allow-other-weights"
        )


def _text_steps(control: ModelControl, options: SwapOptions, texts: Sequence[Model], machine: Machine) -> list[Step]:
    """Load those models of the text tower in place that change."""
    steps = []
    towers = Towers.of(options.models, options.name)
    for model in texts:
        towers.fit(model.config)
        old = control.configuration(model.name)
        machine.fit(model.config, old)
        may_be_other = options.allow_other_weights and model.file is not None
        if may_be_other or not same_configuration(old, model.config):
            steps.append(_load(control, model.name, model.config, old))
    if steps:

        def check() -> str | None:
            if not options.check_vectors:
                _check_answer(TEXT_ENSEMBLE, partial(control.embed_text, PROBE_TEXT.encode()))
                return None
            return check_text_vectors(
                texts, partial(_one_by_one, lambda sample: (partial(control.embed_text, text) for text in sample.files))
            )

        steps.append(Step(f"{TEXT_ENSEMBLE} embeds", check))
    return steps


def _machine_of(present: Sequence[Any]) -> Machine:
    """The server's machine, which may be another: it has a GPU where a model runs on one."""
    here = Machine.here()
    on_gpu = any(group.kind == group.KIND_GPU for config in present for group in config.instance_group)
    return replace(here, has_gpu=here.has_gpu or on_gpu)


def _load(control: ModelControl, name: str, config: Any, old: Any | None) -> Step:
    if old is None:
        return Step(
            f"{name} loaded",
            lambda: control.load(name, config),
            undo=lambda: control.unload(name),
            undo_own_failure=True,
        )
    return Step(
        f"{name} loaded anew, in place", lambda: control.load(name, config), undo=lambda: control.load(name, old)
    )


def _check_vectors(control: ModelControl, options: SwapOptions, model: str | None = None) -> str:
    """Of the engine `model` alone, on open_clip's own pixels, or of the whole ensemble; an image at a time."""

    def questions(sample: Sample) -> "Iterable[Callable[[], npt.NDArray[np.float32]]]":
        if model is None:
            return (partial(control.embed_image, image) for image in sample.files)
        return (partial(control.embed_pixels, model, pixels[None]) for pixels in sample.inputs)

    engine = Engine(models=options.models, config_name=options.name)
    return check_vectors(engine, partial(_one_by_one, questions), on_pixels=model is not None)


def _one_by_one(
    questions: "Callable[[Sample], Iterable[Callable[[], npt.NDArray[np.float32]]]]", sample: Sample
) -> "npt.NDArray[np.float32]":
    return _answers(questions(sample))


def _answers(questions: "Iterable[Callable[[], npt.NDArray[np.float32]]]") -> "npt.NDArray[np.float32]":
    import numpy as np

    return np.concatenate([_when_there_is_room(ask) for ask in questions])


def _check_ensemble(control: ModelControl) -> None:
    _check_answer(ENSEMBLE, partial(control.embed_image, probe_image()))


def _check_answer(model: str, ask: "Callable[[], npt.NDArray[np.float32]]") -> None:
    import numpy as np

    got = _when_there_is_room(ask)
    if got.ndim != 2 or len(got) != 1 or not np.isclose(np.linalg.norm(got), 1, atol=1e-2):
        raise ToolError(f"{model} answers {got.shape}, norm {np.linalg.norm(got):.3f}, where a unit vector was due")


def _when_there_is_room(ask: "Callable[[], npt.NDArray[np.float32]]") -> "npt.NDArray[np.float32]":
    """The answer, also of a server so busy that it refuses some: then a swap is what helps."""
    deadline = time.monotonic() + _DRAIN_LIMIT_S
    while True:
        try:
            return ask()
        except ToolError as error:
            if not any(words in str(error) for words in _NO_ROOM) or time.monotonic() > deadline:
                raise
        time.sleep(_POLL_S)


def _used_by_others(control: ModelControl, ready: set[str]) -> set[str]:
    """The models that other ensembles of the server go through."""
    others = (control.configuration(name) for name in ready - {ENSEMBLE})
    return {step.model_name for config in others for step in config.ensemble_scheduling.step}


def _retire(control: ModelControl, name: str, config: Any, settle_s: float) -> Step:
    def unload_when_idle() -> str | None:
        if not becomes_idle(control, name, settle_s):
            return "no: it still gets requests, which are not the ensemble's, so it stays"
        control.unload(name)
        return None

    return Step(f"{name} unloaded", unload_when_idle, undo=lambda: control.load(name, config), undo_own_failure=True)


def becomes_idle(control: ModelControl, model: str, settle_s: float, *, limit_s: float = _DRAIN_LIMIT_S) -> bool:
    """Whether the model comes to answer nothing for `settle_s`, within `limit_s`.

    Requests that were in preprocess when the ensemble changed still go to the model that it went through. Triton 24.10
    answered them all when that was unloaded at once (12 clients, images of 12 megapixels), but promises it nowhere. The
    check of the ensemble went through the same queue after them, so at most one image an instance can be left there.
    """
    deadline = time.monotonic() + limit_s
    seen, since = control.answered(model), time.monotonic()
    while time.monotonic() - since < settle_s:
        if time.monotonic() > deadline:
            return False
        time.sleep(min(_POLL_S, settle_s / 5))
        if (now := control.answered(model)) != seen:
            seen, since = now, time.monotonic()
    return True


def swap(control: ModelControl, options: SwapOptions, say: Callable[[str], None]) -> None:
    """Do the steps, `say` each; when one fails, undo those done and raise ToolError with which and why."""
    steps = plan_swap(control, options)
    if not steps:
        say(f"the server runs {options.name} already")
    done: list[Step] = []
    for number, step in enumerate(steps, start=1):
        started = time.monotonic()
        try:
            remark = step.do()
        except BaseException as error:
            undone = _undo(control, options, [*done, *([step] if step.undo_own_failure else [])], say)
            if not isinstance(error, ToolError):
                raise
            raise ToolError(
                f"swap to {options.name} failed at step {number} of {len(steps)} ({step.title}): {error}; {undone}",
                exit_code=error.exit_code,
            ) from error
        done.append(step)
        say(f"{number}/{len(steps)} {step.title}{f': {remark}' if remark else ''} ({time.monotonic() - started:.1f} s)")
    control.forget_failures(_model_names(options))  # of an earlier swap


def _model_names(options: SwapOptions) -> list[str]:
    return sorted(path.parent.name for path in options.models.glob("*/config.pbtxt"))


def _undo(control: ModelControl, options: SwapOptions, done: list[Step], say: Callable[[str], None]) -> str:
    """Undo the steps, last first, and say how the server is then."""
    failed = []
    for step in reversed(done):
        if step.undo is None:
            continue
        try:
            step.undo()
            say(f"undone: {step.title}")
        except ToolError as error:
            failed.append(f"{step.title}: {error}")
            break  # an ensemble that could not go back still needs the model that would be unloaded next
    try:
        _check_ensemble(control)
        control.forget_failures(_model_names(options))
    except ToolError as error:
        failed.append(str(error))
    if failed:
        return f"and it could not be undone ({'; '.join(failed)}): restart the server"
    return "everything is as before"
