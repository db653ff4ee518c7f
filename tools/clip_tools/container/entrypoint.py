"""The container's first process: it builds what the server needs, then keeps tritonserver running.

`settings` reads the environment, `start` decides what to do, `build` exports and builds, `container_repository` writes
the model repository, `server` runs it. Flags of the command line go to tritonserver.
"""

import contextlib
import dataclasses
import itertools
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from clip_tools import proxy
from clip_tools.accuracy.sample import FILE as SAMPLE
from clip_tools.container.build import ensure_plan, export
from clip_tools.container.container_repository import write_container_repository
from clip_tools.container.server import ContainerServer, flags_in, options_in
from clip_tools.container.settings import Settings
from clip_tools.container.start import Available, Start, decide_start, find_available
from clip_tools.digest import files_of
from clip_tools.errors import ToolError
from clip_tools.export.export_text import MERGES
from clip_tools.export.manifest import manifest_path
from clip_tools.paths import MODELS
from clip_tools.repository import ENSEMBLE, deployment, graph_name, text_deployment
from clip_tools.serving.machine import Machine, available_cores
from clip_tools.serving.manifests import check_towers, wrong_file
from clip_tools.serving.provenance import write_provenance
from clip_tools.serving.serve import warning_if_untrained
from clip_tools.serving.serve_options import ServeOptions
from clip_tools.serving.server import repository_flags
from clip_tools.serving.supervisor import Say, Supervisor
from clip_tools.serving.vector_check import WrongVectors

_FALLBACK = "TRT_FALLBACK=1: serving the ONNX model through clip_onnx instead"


def prepare(settings: Settings, folder: Path, say: Say, *, models: Path = MODELS, with_plan: bool = True) -> list[str]:
    """Build everything and write the repository to `folder`; returns the server's command without the user's flags.

    A plan that cannot be built raises ToolError. With TRT_FALLBACK=1 it is reported instead, and clip_onnx serves with
    the plan's batch sizes, as it does with `with_plan=False`.
    """
    found = find_available(settings, models)
    without = dataclasses.replace(settings, skip_build=True)
    plan: Path | None = None
    try:
        start, graphs = _make_graphs(settings if with_plan else without, found, say)
        if start.graph is not None:
            if "model.onnx" not in graphs:
                say("model.onnx is not mounted: this server cannot be swapped to `onnx` or fall back to it")
            plan = ensure_plan(settings, graphs[start.graph], found.gpu, say)
    except ToolError as error:
        if settings.skip_build or not settings.fallback or not with_plan:
            raise
        say(f"TensorRT plan: {error}")
        say(_FALLBACK)
        start, graphs = _make_graphs(without, found, say)
    served = graphs[start.graph or found.onnx_engine_file]
    built = [*itertools.chain.from_iterable(map(files_of, graphs.values()))]
    built += [*map(manifest_path, graphs.values()), served.with_name(SAMPLE)]
    files = {f"clip_onnx/1/{path.name}": path for path in built if path.is_file()}
    files |= _text_files(settings.onnx_dir / "text")
    if plan is not None:
        files |= {f"clip_trt/1/{path.name}": path for path in (plan, *plan.parent.glob("*.json"))}
    max_batch = None if settings.skip_build else settings.max_batch
    machine = Machine(available_cores(), found.gpu is not None, settings.preprocess_instances)
    write_container_repository(
        models, folder, files=files, max_batch=max_batch, machine=machine, config_name=start.config_name
    )
    check_towers(deployment(folder, start.config_name), text_deployment(folder, start.config_name))
    return ["tritonserver", *repository_flags(folder, start.config_name)]


def _text_files(folder: Path) -> dict[str, Path]:
    """The files of a mounted text tower of `export-onnx --text --output FOLDER/model.onnx`, by their place."""
    model = folder / "model.onnx"
    if not model.is_file():
        return {}
    if wrong := wrong_file(model):
        raise ToolError(f"{wrong}; it is damaged or was replaced: export it again with --text")
    beside = [path for path in (manifest_path(model), folder / SAMPLE) if path.is_file()]
    return {
        **{f"clip_text_onnx/1/{path.name}": path for path in (*files_of(model), *beside)},
        f"tokenize/1/{MERGES}": folder / MERGES,
    }


def _make_graphs(settings: Settings, found: Available, say: Say) -> tuple[Start, dict[str, Path]]:
    start = decide_start(settings, found)
    exported = {graph_name(precision): export(settings, precision, say) for precision in start.exports}
    graphs = {**found.onnx, **exported}
    for graph in graphs.values():
        if wrong := wrong_file(graph):
            raise ToolError(f"{wrong}; it is damaged or was replaced: export it again")
    return start, graphs


def served_folder() -> Path:
    """The folder of the served repository: the image's CLIP_MODELS, which `clip-tools swap` reads."""
    return Path(tempfile.gettempdir()) / "clip-embed-served"


def _say(line: str) -> None:
    sys.stderr.write(f"clip-embed: {line}\n")
    sys.stderr.flush()


def main(arguments: Sequence[str]) -> None:
    """Prepare, then serve until SIGTERM. An error ends the container with one line and an exit code."""
    # Linux ignores the default action of signals in process 1, so only a handler can end a build.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    proxy.bypass_for_localhost()
    try:
        settings = Settings.from_environment(os.environ)
        options = options_in(arguments, settings.keys)
        try:
            _serve(settings, options, arguments)
        except WrongVectors as error:
            if settings.skip_build or not settings.fallback:
                raise
            _say(f"TensorRT plan: {error}")
            _say(_FALLBACK)
            _serve(settings, options, arguments, with_plan=False)
    except ToolError as error:
        _say(str(error))
        sys.exit(error.exit_code)
    except OSError as error:
        _say(f"{error}: user {os.getuid()} must be able to read the mounted files and write to the volume")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _serve(settings: Settings, options: ServeOptions, arguments: Sequence[str], *, with_plan: bool = True) -> None:
    folder = served_folder()
    shutil.rmtree(folder, ignore_errors=True)
    command = [*prepare(settings, folder, _say, with_plan=with_plan), *arguments]
    config_name = flags_in(command).get("model-config-name")
    write_provenance(folder, config_name)
    options = dataclasses.replace(
        options,
        models=folder,
        config_name=config_name,
        check_vectors=settings.check_vectors,
        open_metadata=settings.open_metadata,
    )
    if settings.cache_dir.is_dir():  # ort-trt keeps its engines in .cache of the working directory
        with contextlib.suppress(OSError):
            os.chdir(settings.cache_dir)
            Path(".cache/ort-trt").mkdir(parents=True, exist_ok=True)
    _say(f"starting {' '.join(command)}")
    processes = Machine.here(settings.preprocess_instances).describe_preprocess(MODELS, config_name)
    ready_line = f"{ENSEMBLE} embeds, {processes}\n{warning_if_untrained(options)}".strip()
    supervisor = Supervisor(lambda: ContainerServer(options, command), _say, ready_line)
    with supervisor.stopping_on_signals():
        supervisor.run()


if __name__ == "__main__":
    main(sys.argv[1:])
