"""Preemption under Hugging Face's Trainer: at a signal Trainer itself saves, into its own folder, and the run ends.

The engine's checkpoint alone lacks Trainer's files, and Trainer couldn't resume from it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ucp_deepspeed.integrations.huggingface_trainers import is_first

logger = logging.getLogger("ucp_deepspeed")


@contextmanager
def saving_at_signals(trainer: Any) -> Iterator[None]:
    """Have a Trainer save at a signal while it trains in the block, if its engine will have ``on_signal``."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):  # type: ignore[misc]
        """Has Trainer save at the end of the step in which all ranks agree on a signal, and ends the run then."""

        is_asked = False

        def ask(self) -> None:
            """Note that the run shall end; the engine calls it within the step."""
            self.is_asked = True

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Take the save over from the engine."""
            engine = trainer.deepspeed
            if engine.universal_checkpoint_config.save.on_signal is None:
                return
            from ucp_deepspeed.engine.saving.preemption import leave_to

            if not args.save_only_model:
                leave_to(engine, self.ask, f"into a checkpoint of Trainer's in {args.output_dir}")
            elif is_first():
                logger.warning(
                    "with save_only_model Trainer saves nothing to go on from: at a signal the engine's state alone is saved, "
                    "which resume_from_checkpoint doesn't take; leave save_only_model out"
                )

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Ask for a save, and for nothing that takes time before it."""
            if self.is_asked:
                control.should_save, control.should_training_stop, control.should_evaluate = True, True, False

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """End the run, on all ranks, when all is on disk."""
            if self.is_asked:
                from ucp_deepspeed.engine.saving.preemption import end

                end(trainer.deepspeed)

    stop = Stop()
    trainer.add_callback(stop)
    try:
        yield
    finally:
        trainer.remove_callback(stop)
