"""What the conversion programs of recognition share: their data, and the way from a teacher to the report."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags
from flax import nnx

from edgespeech.conversion.run import Teacher
from edgespeech.data.batching import BatchSource
from edgespeech.data.corpus import Corpus
from edgespeech.evaluation.decode import Decoder
from edgespeech.evaluation.report import write_report
from edgespeech.evaluation.wer import WerResult
from edgespeech.interop.pretrained import AnyTokenizer
from edgespeech.models.wav2vec2 import count_parameters
from experiments import asr, data_flags, recipe, run, shared
from experiments.facts import run_facts
from experiments.recipe import Recipe
from experiments.replacement import Measure, keep_hybrid, replace_layers

flags.adopt_module_key_flags(data_flags)
flags.adopt_module_key_flags(recipe)
HELDOUT_BATCHES = 12  # of the sweep


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


@dataclasses.dataclass
class RecognitionBench:
    """The `Bench` of recognition: word errors on every test split.

    Attributes:
        workdir: of the run; the hybrids are saved in `hybrid_COUNT`.
        data: see `Data`.
        tokenizer: of the teacher.
        make_decoder: of a model's structure.
        teacher: its results, which every row is compared with.
    """

    workdir: run.Workdir
    data: Data
    tokenizer: AnyTokenizer
    make_decoder: Callable[[nnx.GraphDef], Decoder]
    teacher: Mapping[str, WerResult] | None = None

    def measure(self, graphdef: nnx.GraphDef) -> Measure:
        """See `Bench`; results are `WerResult`s by split."""
        decoder = self.make_decoder(graphdef)
        return lambda name, state: asr.evaluate_splits(
            self.workdir.path, name, decoder, state, self.data.test_sources
        )

    def row(
        self, results: Mapping[str, WerResult], count: int, order: tuple[int, ...], model: Any
    ) -> dict[str, Any]:
        """See `Bench`."""
        return asr.table_row(results, count, order, model, self.teacher)

    def spoken(self, results: Mapping[str, WerResult]) -> str:
        """See `Bench`."""
        return asr.spoken(results)

    def keep(
        self, model: Any, count: int, order: tuple[int, ...], results: Mapping[str, WerResult]
    ) -> None:
        """See `Bench`."""
        facts = {
            "data": self.data.train.kind,
            "replaced": [i + 1 for i in order[:count]],
            "test_wer": next(iter(results.values())).wer,
        }
        keep_hybrid(self.workdir, model, count, self.tokenizer, facts)


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
    bench = RecognitionBench(workdir, data, tokenizer, make_decoder)
    with (
        workdir.stage("teacher evaluation"),
        shared.part("score", workdir.path, "hypotheses/teacher*.jsonl"),
    ):
        teacher_results = bench.measure(teacher.graphdef)("teacher", teacher.state)
    bench.teacher = teacher_results
    run.say(f"teacher: {asr.spoken(teacher_results)}")
    done = replace_layers(
        workdir, teacher, data.source, data.dev_source, HELDOUT_BATCHES, bench, recipe
    )

    # ---------------------------------------------------------------- report
    others = [data.dev_source, *data.test_sources.values()]
    data_facts = asr.data_facts(data.train, data.dev, data.tests, data.source, others)
    if "labels" in about:
        data_facts["labels"] = about["labels"]
    facts = run_facts(workdir, recipe.seed)
    report = facts | {
        "title": title,
        "data": data_facts,
        "teacher": asr.rates(teacher_results)
        | {
            "parameters": count_parameters(teacher.model),
            "steps": about.get("steps", 0),
            "config": dataclasses.asdict(teacher.model.config),
        },
        "sweep": done.sweep,
        "order": [i + 1 for i in done.order],
        "hybrids": done.hybrids,
        "controls": done.controls,
        "notes": [
            *(f"teacher: {note}" for note in about.get("notes", [])),
            *(n for corpus in (data.train, data.dev, *data.tests.values()) for n in corpus.notes),
        ],
    }
    asr.draw(
        workdir.path, report, done.hybrid, teacher.task, next(iter(data.test_sources.values()))
    )
    write_report(workdir.path, report)
    run.say(f"report: {workdir.path / 'report.md'}")
