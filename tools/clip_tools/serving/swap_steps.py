"""The steps that take a running server from one named configuration to another."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from clip_embed.server_info import ServerInfo
from clip_tools.errors import ToolError
from clip_tools.paths import MODELS
from clip_tools.repository import ENSEMBLE, TEXT_ENSEMBLE, Model, deployment, parameters_of, text_deployment
from clip_tools.serving import swap_checks
from clip_tools.serving.machine import Machine
from clip_tools.serving.manifests import check_towers
from clip_tools.serving.model_control import ModelControl
from clip_tools.serving.provenance import set_provenance
from clip_tools.serving.served_repository import adapt_config
from clip_tools.serving.towers import Towers

_IDLE_LIMIT_S = 60.0
_POLL_S = 0.1


@dataclass(frozen=True)
class SwapOptions:
    """What to swap to.

    Args:
        name: a named configuration.
        models: a copy of the server's model repository.
        settle_s: how long the old engine must be idle before it is unloaded.
        check_vectors: verify the new engine against open_clip, on the export's sample.
    """

    name: str
    models: Path = MODELS
    settle_s: float = 2.0
    allow_other_weights: bool = False
    check_vectors: bool = False


@dataclass(frozen=True)
class Step:
    """One change or check. `do` may return a note.

    `undo` runs if a later step fails, and with `undo_own_failure` also if this step fails.
    """

    title: str
    do: Callable[[], str | None]
    undo: Callable[[], None] | None = None
    undo_own_failure: bool = False


def swap_steps(control: ModelControl, options: SwapOptions) -> list[Step]:
    """The steps from the running configuration to the one asked for; none if the server runs that already.

    A new model is loaded beside the running one and checked before the ensemble changes. A model of the same name is
    loaded in place: Triton makes the new one ready, then moves the requests over. So it is checked only once it serves,
    and one that does not load changes nothing. The text tower is loaded again if its configuration changes, or if the
    weights may.

    Raises ToolError if the text tower and the engine have different weights, or other weights than the running ones.
    """
    models = deployment(options.models, options.name)
    towers = Towers.of(options.models, options.name)
    for model in models:
        towers.apply_to(model.config)
    set_provenance(models)
    *target, ensemble = models
    engine = target[-1].name
    before = control.configuration(ENSEMBLE)
    if not options.allow_other_weights:
        _check_weights(before, ensemble.config)
    ready = set(control.ready_models())
    texts = text_deployment(options.models, options.name) if TEXT_ENSEMBLE in ready else []
    check_towers(models, texts)
    running = [step.model_name for step in before.ensemble_scheduling.step if step.model_name in ready]
    like = None
    if running and not options.allow_other_weights:
        like = swap_checks.embed_probe(control, running[-1])
    machine = _machine_of([control.configuration(name) for name in running])
    verify = (control, options.models, options.name)
    steps: list[Step] = []
    for model in target:
        old = control.configuration(model.name) if model.name in ready else None
        machine.apply_to(model.config, old)
        if old is not None and same_configuration(old, model.config):
            continue
        steps.append(_load(control, model.name, model.config, old))
        if model.name == engine:
            steps.append(Step(f"{engine} embeds", partial(swap_checks.check_engine, control, engine, like)))
            if options.check_vectors:
                check = partial(swap_checks.verify_engine, *verify, engine)
                steps.append(Step(f"{engine} verified against open_clip", check))
    if not same_configuration(before, ensemble.config):
        steps.append(
            Step(
                f"{ENSEMBLE} goes through {engine}",
                partial(control.load, ENSEMBLE, ensemble.config),
                undo=partial(control.load, ENSEMBLE, before),
                undo_own_failure=True,  # Triton unloads an ensemble whose new configuration does not load
            )
        )
    steps += _text_steps(control, options, texts, towers, machine)
    if steps:
        steps.append(Step(f"{ENSEMBLE} embeds", partial(swap_checks.check_ensemble, control)))
        if options.check_vectors:
            check = partial(swap_checks.verify_ensemble, *verify)
            steps.append(Step(f"{ENSEMBLE} verified against open_clip", check))
    in_use = {model.name for model in target} | _used_by_others(control, ready)
    steps += [_unload(control, name, options.settle_s) for name in running if name not in in_use]
    return steps


def same_configuration(running: Any, target: Any) -> bool:
    """Whether a model that runs `running`, as the server completed it, need not be loaded again for `target`.

    False in doubt: to load a model again costs time and changes nothing.
    """
    plain = []
    for config in (running, target):
        one = type(config)()
        one.CopyFrom(config)
        for field in ("name", "platform", "backend", "runtime", "version_policy", "model_transaction_policy"):
            one.ClearField(field)
        if one.default_model_filename in ("model.onnx", "model.plan", "model.py"):
            one.ClearField("default_model_filename")
        for group in one.instance_group:
            group.ClearField("name")
            if not any(wish.kind for wish in target.instance_group):  # KIND_AUTO: the server has chosen
                group.ClearField("kind")
                group.ClearField("gpus")
        del one.model_warmup[:]  # a loaded model is warm
        for memory in ("input_pinned_memory", "output_pinned_memory"):
            one.optimization.ClearField(memory)
        if one.HasField("dynamic_batching") and list(one.dynamic_batching.preferred_batch_size) == [one.max_batch_size]:
            one.dynamic_batching.ClearField("preferred_batch_size")
        one.optimization.SetInParent()
        plain.append(one)
    return bool(plain[0] == plain[1])


def becomes_idle(control: ModelControl, model: str, settle_s: float, *, limit_s: float = _IDLE_LIMIT_S) -> bool:
    """Whether the model answers nothing for `settle_s`, within `limit_s`.

    Requests that were in preprocess when the ensemble changed still go to the old model. Triton 24.10 answered all of
    them when it was unloaded at once (12 clients, images of 12 megapixels), but does not promise it. The check of the
    ensemble went through the same queue after them, so at most one image for each instance is left.
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


def _check_weights(before: Any, target: Any) -> None:
    """Raises ToolError if the ensembles' configurations name different weights.

    Triton reads a model's file whenever it loads the model. A swap must not bring in an export of other weights.
    """
    served, found = (ServerInfo.of(parameters_of(config)).provenance for config in (before, target))
    if served and found and not served.has_weights_of(found):
        raise ToolError(
            f"expected the weights that are served, {served}, found files of {found}: an index must not mix their "
            "vectors. Export the served weights again, or swap with --allow-other-weights"
        )


def _text_steps(
    control: ModelControl, options: SwapOptions, texts: Sequence[Model], towers: Towers, machine: Machine
) -> list[Step]:
    """Load the models of the text tower that change, in place."""
    steps = []
    for model in texts:
        old = control.configuration(model.name)
        adapt_config(model.config, towers, machine, old)
        may_have_other_weights = options.allow_other_weights and model.file is not None
        if may_have_other_weights or not same_configuration(old, model.config):
            steps.append(_load(control, model.name, model.config, old))
    if steps and options.check_vectors:
        check = partial(swap_checks.verify_text_ensemble, control, texts)
        steps.append(Step(f"{TEXT_ENSEMBLE} verified against open_clip", check))
    elif steps:
        steps.append(Step(f"{TEXT_ENSEMBLE} embeds", partial(swap_checks.check_text_ensemble, control)))
    return steps


def _machine_of(running: Sequence[Any]) -> Machine:
    """The server's machine: like this one, but with a GPU if a model runs on one."""
    here = Machine.here()
    on_gpu = any(group.kind == group.KIND_GPU for config in running for group in config.instance_group)
    return replace(here, has_gpu=here.has_gpu or on_gpu)


def _load(control: ModelControl, name: str, config: Any, old: Any | None) -> Step:
    load = partial(control.load, name, config)
    if old is None:
        return Step(f"{name} loaded", load, undo=partial(control.unload, name), undo_own_failure=True)
    return Step(f"{name} loaded again, in place", load, undo=partial(control.load, name, old))


def _unload(control: ModelControl, name: str, settle_s: float) -> Step:
    config = control.configuration(name)

    def unload_when_idle() -> str | None:
        if not becomes_idle(control, name, settle_s):
            return "no, it stays loaded: it still gets requests from elsewhere"
        control.unload(name)
        return None

    return Step(f"{name} unloaded", unload_when_idle, undo=partial(control.load, name, config), undo_own_failure=True)


def _used_by_others(control: ModelControl, ready: set[str]) -> set[str]:
    """The models that other ensembles of the server use."""
    others = (control.configuration(name) for name in ready - {ENSEMBLE})
    return {step.model_name for config in others for step in config.ensemble_scheduling.step}
