"""Where the settings of the next trial come from: a list of them, or Optuna."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgespeech.errors import InputError
from launch.sweep.space import Parameter, Settings, folder_name, real_text
from launch.sweep.trial import Trial


class Source(Protocol):
    """What asks for trials."""

    def ask(self) -> Trial | None:
        """The next trial, None when there is no other."""
        ...

    def tell(self, trial: Trial) -> None:
        """Takes the outcome of a trial into account."""
        ...


class Listed:
    """Given trials, in order."""

    def __init__(self, trials: Sequence[Trial]):
        self._left = iter(trials)

    def ask(self) -> Trial | None:
        """See `Source`."""
        return next(self._left, None)

    def tell(self, trial: Trial) -> None:
        """See `Source`: what comes next is settled."""


def trials_of(settings: Sequence[Settings]) -> list[Trial]:
    """A trial for each of the settings, named after them."""
    return [Trial(folder_name(one), one) for one in settings]


def trials_of_rows(rows: Mapping[str, Settings], settings: Sequence[Settings]) -> list[Trial]:
    """A trial for every row with each of the settings, named after both.

    Raises:
        InputError: a row has a flag that the settings have as well.
    """
    for name, flags in rows.items():
        for flag in sorted(flags.keys() & {flag for one in settings for flag in one}):
            raise InputError(f"row {name} has --{flag}, and --sweep has it as well: give it once")
    return [
        Trial(",".join(filter(None, (name, folder_name(one)))), {**flags, **one})
        for name, flags in rows.items()
        for one in settings
    ]


class OptunaSearch:
    """Trials that Optuna proposes (Akiba et al., 2019, arXiv 1907.10902), by its TPE sampler.

    It keeps what it knows in a database of its own, so that a search goes on where it was: trials that an interrupted
    sweep had begun come first.

    Args:
        space: what is searched.
        count: trials in all, those of earlier turns included.
        path: of the database, SQLite.
        seed: of the proposals.
        maximise: whether more is better.

    Raises:
        InputError: Optuna is not installed.
    """

    def __init__(
        self, space: Sequence[Parameter], count: int, path: Path, seed: int, maximise: bool
    ):
        try:
            optuna: Any = importlib.import_module("optuna")
        except ImportError as error:
            raise InputError(
                f"--search=optuna needs a package that is not here ({error}): pip install 'edgespeech[sweep]'"
            ) from error
        self._optuna, self._space, self._count = optuna, space, count
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # Trials under way count as bad ones, so that parallel proposals differ. The seed is new in every turn, or a
        # search that goes on would draw its first trials again.
        self._study = optuna.create_study(
            storage=f"sqlite:///{path}",
            study_name="sweep",
            load_if_exists=True,
            direction="maximize" if maximise else "minimize",
        )
        done = len(self._study.get_trials(deepcopy=False))
        turn_seed = int(np.random.SeedSequence([seed, done]).generate_state(1)[0])
        self._study.sampler = optuna.samplers.TPESampler(seed=turn_seed, constant_liar=True)
        running = (optuna.trial.TrialState.RUNNING,)
        self._begun = self._study.get_trials(deepcopy=False, states=running)
        self._numbers: dict[str, int] = {}

    def ask(self) -> Trial | None:
        """See `Source`."""
        if self._begun:
            begun = self._begun.pop(0)
            return self._trial(begun.number, begun.params)
        if len(self._study.get_trials(deepcopy=False)) >= self._count:
            return None
        made = self._study.ask(self._distributions())
        return self._trial(made.number, made.params)

    def tell(self, trial: Trial) -> None:
        """See `Source`."""
        failed = self._optuna.trial.TrialState.FAIL
        number = self._numbers[trial.name]
        if trial.value is None:
            self._study.tell(number, state=failed)
        else:
            self._study.tell(number, trial.value)

    def _distributions(self) -> dict[str, Any]:
        kinds = self._optuna.distributions
        return {
            p.flag: kinds.CategoricalDistribution(p.choices)
            if p.choices
            else kinds.FloatDistribution(p.low, p.high, log=p.log)
            for p in self._space
        }

    def _trial(self, number: int, values: dict[str, Any]) -> Trial:
        settings = {
            flag: value if isinstance(value, str) else real_text(value)
            for flag, value in values.items()
        }
        # Two trials may have the same settings, and each is told on its own.
        name = f"{number:04d},{folder_name(settings)}"
        self._numbers[name] = number
        return Trial(name, settings)
