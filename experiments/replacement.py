"""From a trained teacher to hybrids and controls: the stages that every conversion program runs."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from flax import nnx

from edgespeech.conversion.mixers import MixerFactory, control_factory, lpa_factory
from edgespeech.conversion.run import Job, Progressive, Teacher, replacement_order, run_sweep
from edgespeech.conversion.sweep import LayerError
from edgespeech.interop.pretrained import AnyTokenizer, save_pretrained
from experiments import run, shared
from experiments.recipe import Recipe

# Results of one model on the test data; `replace_layers` hands them on and does not look into them.
Measure = Callable[[str, nnx.State], Any]


class Bench(Protocol):
    """How the models of one task are measured."""

    def measure(self, graphdef: nnx.GraphDef) -> Measure:
        """A function `(name, state) -> results` for models of one structure, which compiles once."""
        ...

    def row(self, results: Any, count: int, order: tuple[int, ...], model: Any) -> dict[str, Any]:
        """A model with the first `count` layers of the order replaced, as a row of the report."""
        ...

    def spoken(self, results: Any) -> str:
        """Results, for the terminal."""
        ...

    def keep(self, model: Any, count: int, order: tuple[int, ...], results: Any) -> None:
        """Saves a hybrid."""
        ...


class Replaced(NamedTuple):
    """What `replace_layers` leaves.

    Attributes:
        sweep: rows of the sweep, one a layer.
        order: of replacement, layers from 0, all of them.
        hybrids: rows of the hybrids, by ascending number of layers.
        controls: rows of the controls.
        hybrid: the last hybrid.
    """

    sweep: list[dict[str, Any]]
    order: tuple[int, ...]
    hybrids: list[dict[str, Any]]
    controls: list[dict[str, Any]]
    hybrid: Any


def replace_layers(
    workdir: run.Workdir,
    teacher: Teacher,
    source: Any,
    heldout: Any,
    num_heldout: int,
    bench: Bench,
    recipe: Recipe,
) -> Replaced:
    """Sweep, progressive replacement, and controls in the same order with the same budget; each stage is resumable.

    Args:
        workdir: of the run.
        teacher: what is converted.
        source: training batches.
        heldout: batches that the sweep measures its errors on.
        num_heldout: how many of them.
        bench: see `Bench`.
        recipe: see `Recipe`.
    """
    # ---------------------------------------------------------------- sweep
    job = Job(workdir.path, source, recipe.seed, recipe.loop)

    def sweep(name: str, factory: MixerFactory) -> tuple[list[nnx.Module], list[LayerError]]:
        return run_sweep(
            name,
            teacher,
            factory,
            recipe.sweep_steps,
            pairs,
            job,
            curriculum=recipe.distil.curriculum,
            fit=recipe.distil.init == "fit",
        )

    with workdir.stage("sweep"), shared.part("sweep", workdir.path, "checkpoints/sweep_lpa"):
        pairs = [teacher.pairs(b) for b in itertools.islice(heldout.eval_batches(), num_heldout)]
        pulses, errors = sweep("lpa", lpa_factory(recipe.lpa, recipe.distil.init))
    order = replacement_order(errors, recipe.order, recipe.seed)
    most = recipe.replaced[-1]
    run.say("order of replacement: " + " ".join(str(i + 1) for i in order))

    def budget(path: Progressive, count: int) -> dict[str, int]:
        return {
            "updates": recipe.sweep_steps + recipe.distil.num_steps(count, most),
            "trained_parameters": path.trained_parameters(),
        }

    # ---------------------------------------------------------------- replace, distil, evaluate
    rows: list[dict[str, Any]] = []
    with workdir.stage("conversion lpa"):
        path = Progressive("lpa", teacher, pulses, order[:most], recipe.distil, job)
        measure = bench.measure(path.graphdef)
        for count in recipe.replaced:
            path.advance(count)
            results = measure(f"lpa_{count}", path.state())
            hybrid = path.hybrid()
            bench.keep(hybrid, count, order, results)
            rows.append(bench.row(results, count, order, hybrid) | budget(path, count))
            run.say(f"{count} of {len(order)} layers replaced: {bench.spoken(results)}")

    # ---------------------------------------------------------------- controls: same order, same budget
    controls: list[dict[str, Any]] = []
    for name in recipe.controls:
        with workdir.stage(f"control {name}"):
            factory = control_factory(name, recipe.window, recipe.distil.init)
            mixers, _ = sweep(name, factory)
            path = Progressive(name, teacher, mixers, order[:most], recipe.distil, job)
            path.advance(most)
            results = bench.measure(path.graphdef)(f"control_{name}", path.state())
            row = bench.row(results, most, order, path.hybrid())
            controls.append({"name": name} | row | budget(path, most))
            run.say(f"control {name} in {most} layers: {bench.spoken(results)}")
    return Replaced([_sweep_row(i, e) for i, e in enumerate(errors)], order, rows, controls, hybrid)


def keep_hybrid(
    workdir: run.Workdir, model: Any, count: int, tokenizer: AnyTokenizer | None, facts: dict
) -> None:
    """Saves a hybrid in `hybrid_COUNT`, once: a resumed run has the weights of its newest step, not of this count."""
    folder = workdir.path / f"hybrid_{count}"
    if not (folder / "model.json").exists():
        save_pretrained(folder, model, tokenizer, facts)


def _sweep_row(layer: int, error: LayerError) -> dict[str, Any]:
    return {
        "layer": layer + 1,
        "mse": error.mse,
        "relative_mse": error.relative_mse,
        "variance": error.variance,
    }
