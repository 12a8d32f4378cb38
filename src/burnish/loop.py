"""The training loop, of SFT and RL alike. It is closed to features: they enter by what is passed to it."""

from __future__ import annotations

from burnish.run import Run
from burnish.types import StepSource, Trainer


def fit(trainer: Trainer, source: StepSource, run: Run) -> None:
    """Train until `run` has no more steps. What `source` and `trainer` raise goes through."""
    for step in run.steps():
        with run.clock("data_wait"):
            inputs = source.next()  # SFT: the next rows, packed ahead. RL: fresh rollouts.
        stats = trainer.step(inputs)
        source.update(trainer)  # SFT: nothing. RL: publish the new weights.
        run.log(step, stats, inputs)
        run.maybe_evaluate(step, trainer)
        run.maybe_save(step, trainer, source)
