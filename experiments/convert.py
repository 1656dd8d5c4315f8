"""What the conversion programs share: their flags, their data, and the way from a teacher to the report."""

import dataclasses
import datetime
import itertools
from collections.abc import Callable, Mapping

from absl import flags
from flax import nnx

from edgespeech.conversion.distil import DistilConfig
from edgespeech.conversion.mixers import CONTROLS, DEFAULT_CONTROLS, control_factory, lpa_factory
from edgespeech.conversion.run import Job, Progressive, Teacher, replacement_order, run_sweep
from edgespeech.data.batching import BatchSource
from edgespeech.data.corpus import Corpus
from edgespeech.errors import InputError
from edgespeech.evaluation.decode import Decoder
from edgespeech.evaluation.report import device, versions, write_report
from edgespeech.evaluation.wer import WerResult
from edgespeech.interop.pretrained import AnyTokenizer, save_pretrained
from edgespeech.models.wav2vec2 import count_parameters
from edgespeech.nn.lpa import LPAConfig
from edgespeech.training.loop import LoopConfig
from experiments import asr, data_flags, program, run
from experiments.flags import define_config, int_list, read_config

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(data_flags)

# --- conversion
define_config("lpa", LPAConfig())
flags.DEFINE_integer(
    "sweep_steps", 150, "Updates of every layer's replacement in the sweep.", lower_bound=1
)
flags.DEFINE_list("replaced", ["2", "4", "6", "8"], "Numbers of replaced layers to report.")
flags.DEFINE_list(
    "controls",
    list(DEFAULT_CONTROLS),
    f"Controls at the largest number of --replaced: 'all', 'none', or some of {', '.join(CONTROLS)}.",
)
flags.DEFINE_integer(
    "window", 8, "Frames to each side that the sliding_window control sees.", lower_bound=1
)
flags.DEFINE_integer("save_every", 200, "Updates between checkpoints.", lower_bound=1)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the teacher is converted.

    Attributes:
        lpa: the mixer that takes attention's place.
        distil: see `DistilConfig`.
        replaced: numbers of replaced layers to report, ascending.
        controls: names of the controls at the largest of them.
        window: frames to each side that the sliding-window control sees.
        sweep_steps: updates of every layer's replacement in the sweep.
        seed: of new parameters and of the steps.
        loop: see `LoopConfig`.
    """

    lpa: LPAConfig
    distil: DistilConfig
    replaced: tuple[int, ...]
    controls: tuple[str, ...]
    window: int
    sweep_steps: int
    seed: int
    loop: LoopConfig


@dataclasses.dataclass(frozen=True)
class Data:
    """The corpora of a run, and their batches.

    Attributes:
        train: what is trained on.
        dev: what the sweep measures its errors on.
        tests: what the WER is reported on, by name, the first one first.
        source: training batches.
        dev_source: batches of dev.
        test_sources: batches of the tests.
    """

    train: Corpus
    dev: Corpus
    tests: Mapping[str, Corpus]
    source: BatchSource
    dev_source: BatchSource
    test_sources: Mapping[str, BatchSource]


def read_recipe(distil: DistilConfig, num_layers: int) -> Recipe:
    """The recipe that the flags describe, for a model of so many layers.

    Raises:
        InputError: a value is out of range.
    """
    replaced = int_list("replaced", 1, num_layers)
    if not replaced:
        raise InputError("--replaced is empty: give at least one number of layers")
    return Recipe(
        lpa=read_config("lpa", LPAConfig()),
        distil=distil,
        replaced=replaced,
        controls=tuple(chosen_controls()),
        window=FLAGS.window,
        sweep_steps=FLAGS.sweep_steps,
        seed=FLAGS.seed,
        loop=LoopConfig(save_every=FLAGS.save_every, quiet=FLAGS.quiet),
    )


def chosen_controls() -> list[str]:
    """The names in --controls.

    Raises:
        InputError: a name is not known.
    """
    names = list(FLAGS.controls)
    if names == ["all"]:
        return list(CONTROLS)
    if names in ([], ["none"]):
        return []
    for name in names:
        if name not in CONTROLS:
            raise InputError(
                f"--controls holds {name!r}: choose 'all', 'none', or from {', '.join(CONTROLS)}"
            )
    return names


def convert(
    title: str,
    workdir: run.Workdir,
    data: Data,
    teacher: Teacher,
    tokenizer: AnyTokenizer,
    make_decoder: Callable[[nnx.GraphDef], Decoder],
    recipe: Recipe,
    about: Mapping,
) -> None:
    """Sweep, replacement and controls, each evaluated and resumable, then report.json, report.md and plots.

    Args:
        title: of the report.
        workdir: of the run; the hybrids are saved in `hybrid_COUNT`.
        data: see `Data`.
        teacher: what is converted.
        tokenizer: of the teacher.
        make_decoder: of a model's structure.
        recipe: see `Recipe`.
        about: what is known of the teacher: its `steps`, `notes` and, for the report's data, `labels`.
    """
    kind, most = data.train.kind, recipe.replaced[-1]

    def evaluate(name: str, decoder: Decoder, state: nnx.State) -> dict[str, WerResult]:
        return asr.evaluate_splits(workdir.path, name, decoder, state, data.test_sources)

    # ---------------------------------------------------------------- teacher
    with workdir.stage("teacher evaluation"):
        teacher_results = evaluate("teacher", make_decoder(teacher.graphdef), teacher.state)
    run.say(f"teacher: {asr.spoken(teacher_results)}")

    # ---------------------------------------------------------------- sweep
    job = Job(workdir.path, data.source, recipe.seed, recipe.loop)
    with workdir.stage("sweep"):
        heldout = [teacher.pairs(b) for b in itertools.islice(data.dev_source.eval_batches(), 12)]
        pulses, errors = run_sweep(
            "lpa", teacher, lpa_factory(recipe.lpa), recipe.sweep_steps, heldout, job
        )
    order = replacement_order(errors)
    run.say("order of replacement: " + " ".join(str(i + 1) for i in order))

    # ---------------------------------------------------------------- replace, distil, evaluate
    rows: list[dict] = []
    with workdir.stage("conversion lpa"):
        path = Progressive("lpa", teacher, pulses, order[:most], recipe.distil, job)
        decoder = make_decoder(path.graphdef)
        for count in recipe.replaced:
            path.advance(count)
            results = evaluate(f"lpa_{count}", decoder, path.state())
            hybrid = path.hybrid()
            hybrid_folder = workdir.path / f"hybrid_{count}"
            # A resumed run has the weights of its newest step, which are not those of an earlier count.
            if not (hybrid_folder / "model.json").exists():
                wer = next(iter(results.values())).wer
                layers = [i + 1 for i in order[:count]]
                facts = {"data": kind, "replaced": layers, "test_wer": wer}
                save_pretrained(hybrid_folder, hybrid, tokenizer, facts)
            rows.append(asr.table_row(results, count, order, hybrid, teacher_results))
            run.say(f"{count} of {len(order)} layers replaced: {asr.spoken(results)}")

    # ---------------------------------------------------------------- controls: same order, same budget
    control_rows: list[dict] = []
    for name in recipe.controls:
        with workdir.stage(f"control {name}"):
            factory = control_factory(name, recipe.window)
            mixers, _ = run_sweep(name, teacher, factory, recipe.sweep_steps, heldout, job)
            path = Progressive(name, teacher, mixers, order[:most], recipe.distil, job)
            path.advance(most)
            results = evaluate(f"control_{name}", make_decoder(path.graphdef), path.state())
            row = asr.table_row(results, most, order, path.hybrid())
            control_rows.append({"name": name} | row)
            run.say(f"control {name} in {most} layers: {asr.spoken(results)}")

    # ---------------------------------------------------------------- report
    others = [data.dev_source, *data.test_sources.values()]
    data_facts = asr.data_facts(data.train, data.dev, data.tests, data.source, others)
    if "labels" in about:
        data_facts["labels"] = about["labels"]
    report = {
        "title": title,
        "command": program.command_line(),
        "date": datetime.date.today().isoformat(),
        "data": data_facts,
        "teacher": asr.rates(teacher_results)
        | {
            "parameters": count_parameters(teacher.model),
            "steps": about.get("steps", 0),
            "config": dataclasses.asdict(teacher.model.config),
        },
        "sweep": [
            {"layer": i + 1, "mse": e.mse, "relative_mse": e.relative_mse, "variance": e.variance}
            for i, e in enumerate(errors)
        ],
        "order": [i + 1 for i in order],
        "hybrids": rows,
        "controls": control_rows,
        "stages": [{"name": n, "seconds": s} for n, s in workdir.read_json("stages.json").items()],
        "versions": versions(),
        "device": device(),
        "seeds": {"seed": recipe.seed},
        "notes": [
            *(f"teacher: {note}" for note in about.get("notes", [])),
            *(n for corpus in (data.train, data.dev, *data.tests.values()) for n in corpus.notes),
        ],
    }
    asr.draw(workdir.path, report, hybrid, teacher.task, next(iter(data.test_sources.values())))
    write_report(workdir.path, report)
    run.say(f"report: {workdir.path / 'report.md'}")
